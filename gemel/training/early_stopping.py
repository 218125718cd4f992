"""How far a task is from its target over the steps of a round, and whether it is given up."""

import math
from dataclasses import asdict, dataclass, field

from gemel.workload import Task


def loss_weight(accuracy: float, target: float) -> float:
    """Weight of a task's loss by how far it is from its target, from 1 (at target) to 10.

    Source: Gemel, NSDI 2023: (target / accuracy) ** 0.75, at most 10.
    """
    return 10.0 if accuracy <= 0 else min(10.0, max(1.0, (target / accuracy) ** 0.75))


@dataclass
class Progress:
    """Accuracy of one task over the steps of a round."""

    target: float
    accuracy: float = 0.0
    confirmed: bool = False  # whether `accuracy` was measured on the whole val split
    given_up: bool = False
    patient_since: int = 0  # step at which the present span of patience began
    accuracy_then: float = 0.0
    gain_before: float = 0.0  # accuracy gained in the previous span of patience
    validated: list[tuple[int, float]] = field(default_factory=list)  # (step, accuracy)

    @classmethod
    def of(cls, task: Task) -> "Progress":
        return cls(target=task.target_acc)

    @property
    def ratio(self) -> float:
        return self.accuracy / self.target

    @property
    def met(self) -> bool:
        return self.confirmed and self.accuracy >= self.target

    def note(self, step: int, accuracy: float, confirmed: bool = True) -> None:
        self.accuracy, self.confirmed = accuracy, confirmed
        if not self.validated:
            self.restart_patience(step)
        self.validated.append((step, accuracy))

    def restart_patience(self, step: int) -> None:
        self.patient_since, self.accuracy_then, self.gain_before = step, self.accuracy, 0.0

    def stalled(self, step: int, patience: float, max_steps: int) -> bool:
        """Whether the extrapolated learning curve misses the target in the steps that are left; False within a span.

        patience: steps of a span, after each of which the curve is judged. After one span it is extrapolated as a line;
        from two spans on their gains are taken for a geometric series, as for a curve that levels off.
        """
        waited = step - self.patient_since
        if waited < patience:
            return False
        gain = self.accuracy - self.accuracy_then
        spans = (max_steps - step) / waited
        reachable = self.accuracy + gain * spans
        if 0 < gain < self.gain_before:
            rate = gain / self.gain_before
            reachable = self.accuracy + gain * rate * (1 - rate**spans) / (1 - rate)
        out_of_reach = reachable < self.target
        if not out_of_reach:
            self.restart_patience(step)
            self.gain_before = gain
        return out_of_reach

    def steps_to_target(self) -> float:
        """Steps still needed if the last two evaluations lie on a line; infinite without progress."""
        if len(self.validated) < 2:
            return math.inf
        (step0, accuracy0), (step1, accuracy1) = self.validated[-2:]
        slope = (accuracy1 - accuracy0) / max(1, step1 - step0)
        return (self.target - accuracy1) / slope if slope > 0 else math.inf

    def state(self) -> dict:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict) -> "Progress":
        return cls(**{**state, "validated": [tuple(entry) for entry in state["validated"]]})
