"""How likely a task meets its target, by how much is tied of what it is sensitive to.

The sensitivities of a task's layers, as predicted before the first trial, say in which order layers are released and
how far apart two configurations are. What tying costs in accuracy is measured by the trials: accuracy is expected on a
line between two measured points, and the farther from both, the less certain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gemel.thresholds import THRESHOLDS

Point = tuple[float, float]  # (share of the task's sensitivity that is tied, accuracy / target)


@dataclass
class Curve:
    """The points of one task. unshared: with nothing tied. slope: loss that is expected per share before any trial."""

    unshared: float = 1.0
    slope: float = 0.0
    points: list[Point] = field(default_factory=list)

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
        if failed is None:
            slope, deviation = self._expected_slope()
            deviation *= share - low
        else:
            slope = (ratio - failed[1]) / (failed[0] - low)
            deviation = THRESHOLDS.search.uncertainty * slope * min(share - low, abs(failed[0] - share))
        left = ratio - slope * (share - low) - 1
        return _normal_below(left / math.hypot(THRESHOLDS.search.noise, deviation))

    def _expected_slope(self) -> tuple[float, float]:
        """(mean, standard deviation) of the loss per share: what was expected, corrected by all that was measured.

        A line through what is reached with nothing tied, whose slope has a normal prior (Bayesian linear regression).
        """
        noise, prior = THRESHOLDS.search.noise, max(THRESHOLDS.search.uncertainty * self.slope, THRESHOLDS.search.noise)
        precision = prior**-2 + sum((share / noise) ** 2 for share, _ in self.points)
        weighted = self.slope / prior**2 + sum(x * (self.unshared - ratio) / noise**2 for x, ratio in self.points)
        return max(0.0, weighted / precision), precision**-0.5

    def state(self) -> dict:
        """As JSON values."""
        return {"unshared": self.unshared, "slope": self.slope, "points": [list(point) for point in self.points]}

    @classmethod
    def of(cls, state: dict) -> "Curve":
        """What `state` returned."""
        points: Sequence[Sequence[float]] = state["points"]
        return cls(state["unshared"], state["slope"], [(share, ratio) for share, ratio in points])


def _normal_below(value: float) -> float:
    """The probability that a standard normal variable is below the value."""
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))
