"""Every number of the search and the fits that was chosen by measuring, with its entry in benchmarks/LOG.md.

Where an entry is named, the figures that decided are there. "unmeasured" marks a first guess that nothing contradicted.
"""

from dataclasses import dataclass

FIT_PIXELS = 320 * 96 * 96


@dataclass(frozen=True)
class FitThresholds:
    """How many images weights are fitted on, and how often they are fitted again."""

    pixels: int = FIT_PIXELS  # of the images per classifier ("2026-11-24 Initial weights", more images help)
    detection_share: float = 0.5  # of these pixels, for a detector ("2026-11-25 Detectors")
    fewest_pixels: int = FIT_PIXELS // 16  # where memory is short (unmeasured)
    positions: int = 4096  # rows per layer and task ("2026-11-25 What a fit matches")
    more_images: int = (
        4  # times as many, where there are fewer rows than half the inputs ("2026-11-26 Rows for wide layers")
    )
    max_fits: int = 3  # with other task weights ("2026-11-25 What a fit matches")
    full_validation_from: float = 0.97  # of the targets on the screening subset ("2026-11-26 The last thousandth")
    refit_from: float = 0.97  # of the targets, predicted for the next task weights (unmeasured)


@dataclass(frozen=True)
class BalanceThresholds:
    """How task weights of a fit follow what was reached: slopes of (accuracy / target) over the logarithm of a weight.

    All from "2026-11-25 What a fit matches" (task weights follow measured slopes).
    """

    usual_slope: float = 0.12
    min_slope: float = 0.08
    max_slope: float = 0.4
    min_move: float = 0.03  # of the logarithm of a weight: a smaller move says nothing of the slope
    max_move: float = 1.1  # a larger one goes beyond where the line holds


@dataclass(frozen=True)
class SensitivityThresholds:
    """How sensitivity is predicted, and what it decides."""

    method: str = (
        "fitted_error"  # of gemel.fitting.sensitivity.METHODS ("2026-11-24 Holding back a little", "The search")
    )
    pixels: int = FIT_PIXELS // 4  # of the images per task (unmeasured)
    alignment_pixels: int = FIT_PIXELS // 8  # to check aligned models, and to compare activations (unmeasured)
    infeasible: float = 0.25  # from this sensitivity on a group is left to training ("2026-11-25 Detectors")
    infeasible_share: float = 0.25  # of the possible saving that is left to training at first ("2026-11-25 Detectors")
    held_back: float = (
        0.002  # of the possible saving that the second jump leaves out ("2026-11-24 Holding back a little")
    )


@dataclass(frozen=True)
class ReleaseThresholds:
    """How much of what a failing task shares is released for it; twice as much each time it fails again."""

    near: float = 0.93  # of its target: from here on a task needs little ("2026-11-24 The search")
    share_when_near: float = 0.03  # of the bytes that it shares ("2026-11-24 The search")
    share_when_far: float = 0.25  # the same ("2026-11-24 The search")


@dataclass(frozen=True)
class FillThresholds:
    """When what is missing is filled in by parts, with adapters or with training."""

    far: float = 0.8  # of its target: below, a part is not halved ("2026-11-26 On a GPU")
    worth_a_fit: float = 0.01  # of the possible saving: smaller parts are not halved ("2026-11-25 What a fit matches")
    smallest_part: float = 0.25  # of what was missing at first: the same ("2026-11-26 On a GPU")
    worth_adapters: float = 0.03  # of the possible saving: if less is missing, no adapters ("2026-11-26 Low-rank")


@dataclass(frozen=True)
class Thresholds:
    """All of them."""

    fit: FitThresholds = FitThresholds()
    balance: BalanceThresholds = BalanceThresholds()
    sensitivity: SensitivityThresholds = SensitivityThresholds()
    release: ReleaseThresholds = ReleaseThresholds()
    fill: FillThresholds = FillThresholds()


THRESHOLDS = Thresholds()
