"""How likely a task meets its target, by how much is tied of what it is sensitive to.

The sensitivities of a task's layers, as predicted before the first trial, say in which order layers are released and
how far apart two configurations are. What tying costs in accuracy is measured by the trials: accuracy is expected on a
line between two measured points, and the farther from both, the less certain. Where losses grow more slowly than
sensitivity, the line is over a power of it.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gemel.sharing.groups import Configuration, Occurrence
from gemel.thresholds import THRESHOLDS

Point = tuple[float, float]  # (share of the task's sensitivity that is tied, accuracy / target)


class ExpectedLoss(NamedTuple):
    """The loss of accuracy / target that is expected of a sensitivity: factor * sensitivity ** exponent."""

    factor: float
    exponent: float = 1.0


@dataclass
class Curve:
    """The points of one task.

    unshared: with nothing tied. slope: loss that is expected with everything tied, before any trial. exponent: of the
    share, in whose power losses are expected on a line.
    """

    unshared: float = 1.0
    slope: float = 0.0
    points: list[Point] = field(default_factory=list)
    exponent: float = 1.0

    def begin(self, unshared: float, shares: Mapping[float, float]) -> None:
        """Begins anew with sensitivities, with the points whose shares of bytes (keys) are known in sensitivity."""
        self.unshared = unshared
        self.points = [(shares[share], ratio) for share, ratio in self.points if share in shares]

    def expect(self, loss: ExpectedLoss, sensitivity: float) -> None:
        """Begins with the loss that is expected of the task's sensitivity to everything."""
        self.slope, self.exponent = loss.factor * sensitivity**loss.exponent, loss.exponent

    @classmethod
    def expecting(cls, loss: ExpectedLoss, unshared: float) -> "Curve":
        """That of a task whose sensitivity is not known yet: the loss that is expected of a sensitivity of 1."""
        return cls(unshared, loss.factor, exponent=loss.exponent)

    def add(self, share: float, ratio: float) -> None:
        """Adds what a trial measured."""
        self.points.append((share, ratio))

    @property
    def met(self) -> Point:
        """The point with the largest share at which the target was met."""
        return max([(0.0, self.unshared), *(point for point in self.points if point[1] >= 1)])

    @property
    def failed(self) -> Point | None:
        """The point with the smallest share above that, at which it was not; None: no trial failed there."""
        return min((point for point in self.points if point[1] < 1 and point[0] > self.met[0]), default=None)

    def probability(self, share: float) -> float:
        """That the target is met with this share tied."""
        (low, ratio), failed = self.met, self.failed
        if share <= low:
            return 1.0
        begin, here = self._on_line(low), self._on_line(share)
        if failed is None:
            slope, deviation = self._expected_slope()
            deviation *= here - begin
        else:
            end = self._on_line(failed[0])
            slope = (ratio - failed[1]) / (end - begin)
            deviation = THRESHOLDS.search.uncertainty * slope * min(here - begin, abs(end - here))
        left = ratio - slope * (here - begin) - 1
        return _normal_below(left / math.hypot(THRESHOLDS.search.noise, deviation))

    def _on_line(self, share: float) -> float:
        """Where a share is on the line."""
        return share**self.exponent

    def _expected_slope(self) -> tuple[float, float]:
        """(mean, standard deviation) of the loss per unit of the line: as expected, corrected by all that was measured.

        A line through what is reached with nothing tied, whose slope has a normal prior (Bayesian linear regression).
        """
        noise, prior = THRESHOLDS.search.noise, max(THRESHOLDS.search.uncertainty * self.slope, THRESHOLDS.search.noise)
        points = [(self._on_line(share), self.unshared - ratio) for share, ratio in self.points]
        precision = prior**-2 + sum((x / noise) ** 2 for x, _ in points)
        weighted = self.slope / prior**2 + sum(x * loss / noise**2 for x, loss in points)
        return max(0.0, weighted / precision), precision**-0.5

    def state(self) -> dict:
        """As JSON values."""
        points = [list(point) for point in self.points]
        return {"unshared": self.unshared, "slope": self.slope, "points": points, "exponent": self.exponent}

    @classmethod
    def of(cls, state: dict) -> "Curve":
        """What `state` returned."""
        points: Sequence[Sequence[float]] = state["points"]
        exponent = state.get("exponent", 1.0)  # earlier versions have none
        return cls(state["unshared"], state["slope"], [(share, ratio) for share, ratio in points], exponent)


def expected_saving(trial: Configuration, probabilities: Mapping[str, float], kept: Collection[Occurrence]) -> float:
    """Net bytes of a trial in which each task meets its target with this probability.

    kept: what is tied whatever comes of the trial. Tasks that fail go back to that, the others share among themselves:
    of n tasks that share a group k meet their targets; the mean of max(0, k - 1) is the sum of the probabilities, less
    1, and the probability that none does.
    """
    saving = 0.0
    for group in trial:
        each = [1.0 if o in kept else probabilities[o.task] for o in group.occurrences]
        per_task = group.saved_bytes / (len(each) - 1)
        saving += per_task * (sum(each) - 1 + math.prod(1 - p for p in each))
    return saving


def _normal_below(value: float) -> float:
    """The probability that a standard normal variable is below the value."""
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))
