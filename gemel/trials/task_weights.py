"""How much each task counts in a fit of shared weights, from what earlier fits reached."""

import math
from collections.abc import Iterable, Mapping

from gemel.thresholds import THRESHOLDS


class TaskWeights:
    """Moves weight from tasks above their targets to tasks below.

    Near a fit, a task's ratio (accuracy / target) is taken for a line in the logarithm of its weight. The next weights
    are those at which the lines of all tasks reach the same ratio.
    """

    def __init__(self, names: Iterable[str]):
        self.weights = dict.fromkeys(names, 1.0)
        self.slopes = dict.fromkeys(self.weights, THRESHOLDS.balance.usual_slope)
        self.last: dict[str, tuple[float, float]] = {}  # logarithm of the weight, ratio

    def update(self, ratios: Mapping[str, float]) -> float:
        """Moves the weights, given what was reached with them; returns the ratio that all tasks should then reach."""
        limits = THRESHOLDS.balance
        for name, weight in self.weights.items():
            here = math.log(weight), ratios[name]
            if name in self.last and abs(here[0] - self.last[name][0]) > limits.min_move:
                slope = (here[1] - self.last[name][1]) / (here[0] - self.last[name][0])
                self.slopes[name] = min(limits.max_slope, max(limits.min_slope, slope))
            self.last[name] = here
        level = sum(ratios[n] / s for n, s in self.slopes.items()) / sum(1 / s for s in self.slopes.values())
        for name, slope in self.slopes.items():
            move = min(limits.max_move, max(-limits.max_move, (level - ratios[name]) / slope))
            self.weights[name] *= math.exp(move)
        mean = sum(self.weights.values()) / len(self.weights)
        self.weights = {name: weight / mean for name, weight in self.weights.items()}
        return level
