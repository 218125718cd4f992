"""Every number of the search and the fits that was chosen by measuring, with its entry in benchmarks/LOG.md.

Where an entry is named, the figures that decided are there. "unmeasured" marks a first guess that nothing contradicted.
"""

from dataclasses import dataclass

FIT_PIXELS = 320 * 96 * 96


@dataclass(frozen=True)
class FitThresholds:
    """How many images weights are fitted on, and how often they are fitted again."""

    # Of the images per classifier ("2026-11-28 Half as many images").
    pixels: int = FIT_PIXELS // 2
    # Of these pixels, for a detector ("2026-11-25 Detectors").
    detection_share: float = 0.5
    # Bytes of a fit on a CPU ("2026-11-26 Fits in bounded memory").
    memory: int = 2 << 30
    # The same on another device, of its memory (unmeasured).
    share_of_device: float = 0.25
    # Where memory is short (unmeasured).
    fewest_pixels: int = FIT_PIXELS // 16
    # Rows per layer and task ("2026-11-25 What a fit matches").
    positions: int = 4096
    # Times as many at most, doubled while there are fewer rows than half the inputs: "2026-11-26 Rows for wide layers",
    # "2026-11-28 Half as many images".
    more_images: int = 4
    # With other task weights ("2026-11-25 What a fit matches").
    max_fits: int = 3
    # Of the targets on the screening subset ("2026-11-26 The last thousandth").
    full_validation_from: float = 0.97
    # The probability that all tasks meet their targets in a trial, from which on nothing is screened, and everything is
    # tied before sensitivity is predicted: "2026-11-27 Screening", "2026-11-27 Everything at once", also on workloads
    # left out (a half itself is unmeasured).
    no_screening_from: float = 0.5
    # The same, from which on the next fit is on twice as many images ("2026-11-28 Half as many images").
    more_images_from: float = 1.0
    # Of the targets, predicted for the next task weights ("2026-11-27 Fitting again, from a margin on").
    refit_from: float = 1.008


@dataclass(frozen=True)
class BalanceThresholds:
    """How task weights of a fit follow what was reached: slopes of (accuracy / target) over the logarithm of a weight.

    Task weights follow measured slopes: "2026-11-25 What a fit matches". The limits themselves are unmeasured.
    """

    usual_slope: float = 0.12
    min_slope: float = 0.08
    max_slope: float = 0.4
    min_move: float = 0.03  # of the logarithm of a weight: a smaller move says nothing of the slope
    max_move: float = 1.1  # a larger one goes beyond where the line holds


@dataclass(frozen=True)
class SensitivityThresholds:
    """How sensitivity is predicted, and what it decides."""

    # Of gemel.fitting.sensitivity.METHODS ("2026-11-24 Holding back a little", "2026-11-24 The search").
    method: str = "fitted_error"
    # Of the images per task (unmeasured).
    pixels: int = FIT_PIXELS // 4
    # Per task at most: more of them, where they are small, give no more rows (unmeasured).
    images: int = 128
    # Of the images that aligned models are checked on, and activations compared on (unmeasured).
    alignment_pixels: int = FIT_PIXELS // 8
    # From this error of its fitted weights on, a first layer is given by one task ("2026-11-26 The last thousandth").
    misfit: float = 0.25


@dataclass(frozen=True)
class SearchThresholds:
    """How much a task ties in the next trial: the unmeasured ones are first guesses."""

    # Deviation of accuracy / target between two fits of one configuration (unmeasured).
    noise: float = 0.02
    # Deviation of an expected loss, relative to it ("2026-11-26 A search by expected saving").
    uncertainty: float = 0.6
    # Of the possible saving, expected of a trial (unmeasured).
    worth_a_trial: float = 0.01
    # Of what adapters could save: if a trial is expected to save less, they come first ("2026-11-27 Imitation").
    little: float = 0.33
    # Of the possible saving: only where adapters could save as much (unmeasured).
    much: float = 0.15
    # Of the possible saving: what the time of one more trial counts ("2026-11-27 Losses of classifiers").
    one_more_trial: float = 0.1
    # Of accuracy / target, of a classifier before the first trial, times a power of its sensitivity; chosen with whole
    # workloads left out ("2026-11-27 Losses of classifiers").
    classifier_loss: float = 0.02
    # That power ("2026-11-27 Losses of classifiers").
    classifier_exponent: float = 0.3
    # The same of a detector, per unit of its sensitivity ("2026-11-26 A search by").
    detector_loss: float = 2.0
    # Floating-point operations on the images of a fit: from here on, the first fit that saves something is kept
    # ("2026-11-27 Fewer seconds"), and large and late layers of classifiers come first where not everything does
    # ("2026-11-27 A small step first"; halved with the images in "2026-11-28 Half as many images").
    long_fit: float = 6.5e10
    # Of the possible saving, that they save ("2026-11-27 A small step first").
    first_step: float = 0.9
    # Of the possible saving, that the first trial after a failure saves ("2026-11-27 A small step first").
    small_step: float = 0.5


@dataclass(frozen=True)
class GoalThresholds:
    """How trials that just reach a memory goal spare tasks."""

    # Of so many tasks each is spared in one of the first trials (unmeasured).
    spared_tasks: int = 3
    # There, times as much counts what that task loses (unmeasured).
    spared_weight: float = 3.0


@dataclass(frozen=True)
class PrivateTrainingThresholds:
    """What a training of private parameters is expected to gain before any was measured.

    Of the gap to the unmerged model's accuracy, the share that a step closes (its logarithm falls by as much).
    """

    # Trained by labels and the unmerged model ("2026-11-26 A short training after a fit").
    classifier_rate: float = 0.006
    # The same of a detector whose predictions cannot be compared ("2026-11-26 A short training after a fit").
    detector_rate: float = 0.01
    # Trained to predict what the unmerged model does ("2026-11-27 Imitation").
    imitation_rate: float = 0.015
    # Of a short training of that kind: fewer lose more than they gain ("2026-11-28 Very short imitation").
    fewest_imitation_steps: int = 16
    # That count as much as so many measured steps (unmeasured).
    steps: int = 20
    # Of a training at length, also where fewer are expected to be enough (unmeasured).
    least_steps: int = 40
    # A smaller gap, in accuracy / target, is what one evaluation shows ("2026-11-28 What a task lacks by chance").
    least_gap: float = 0.005


@dataclass(frozen=True)
class PrecisionThresholds:
    """When training steps compute in bfloat16 ("2026-11-27 Training steps in bfloat16")."""

    # Times as fast as in float32, forward and backward pass of a batch.
    speedup: float = 1.2
    # Of the loss in float32, at most.
    loss_difference: float = 0.02
    # A loss below this counts as this (unmeasured).
    least_loss: float = 0.05
    # Of the angle between the gradients, at least.
    cosine: float = 0.8
    # Of a step in float32 on a CPU: below, the ratio is noise, and another run of the same seed may choose otherwise.
    least_seconds: float = 0.1
    # Of a training: with fewer, measuring takes what it could gain.
    least_steps: int = 24
    # Of the loss, at most, and of the angle between the gradients, at least, where a step is compiled (unmeasured).
    compiled_difference: float = 0.001
    compiled_cosine: float = 0.999


@dataclass(frozen=True)
class FillThresholds:
    """When what is missing is filled in by parts, with adapters or with training."""

    # Of its target: below, a part is not halved ("2026-11-26 On a GPU").
    far: float = 0.8
    # Of the possible saving: smaller parts are not halved ("2026-11-25 What a fit matches").
    worth_a_fit: float = 0.01
    # Of what was missing at first: the same ("2026-11-26 On a GPU").
    smallest_part: float = 0.25
    # Of the possible saving: if they could save less, no adapters ("2026-11-26 Low-rank"; 0.02 itself is unmeasured).
    worth_adapters: float = 0.02
    # Of the possible saving: if less is missing, no training (unmeasured).
    worth_training: float = 0.002
    # Of the bytes of adapters, when they are made smaller ("2026-11-28 Larger adapters first").
    smaller_adapters: float = 2 / 3
    # Of the possible saving: if they would save less, they are not made smaller ("2026-11-28 Adapters smaller still").
    worth_smaller_adapters: float = 0.015
    # The power of predicted error per byte that adapters are in proportion to ("2026-11-27 Adapters where it hurts").
    adapter_exponent: float = 0.25


@dataclass(frozen=True)
class Thresholds:
    """All of them."""

    fit: FitThresholds = FitThresholds()
    balance: BalanceThresholds = BalanceThresholds()
    sensitivity: SensitivityThresholds = SensitivityThresholds()
    search: SearchThresholds = SearchThresholds()
    goal: GoalThresholds = GoalThresholds()
    private: PrivateTrainingThresholds = PrivateTrainingThresholds()
    precision: PrecisionThresholds = PrecisionThresholds()
    fill: FillThresholds = FillThresholds()


THRESHOLDS = Thresholds()
