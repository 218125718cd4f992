"""How a round of training ended."""

from dataclasses import dataclass, field
from typing import NamedTuple

MET, GIVEN_UP, EPOCHS_SPENT, UNTRAINED = "met", "given up", "epochs spent", "needs training"
BELOW_AS_STORED = "below target in the type of the store"
NOT_FINITE, OUT_OF_MEMORY, TIME_OVER = "loss not finite", "out of memory", "time over"


class Standing(NamedTuple):
    """Where a task is before a round trains it."""

    ratio: float  # of accuracy to target; on the screening subset, unless the whole val split was evaluated
    accuracy: float | None = None  # on the whole val split, if that was evaluated


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    reason: str
    accuracies: dict[str, float]  # per trained task, when it was last evaluated
    met: tuple[str, ...]  # tasks at their target when last evaluated, and not given up
    steps: int
    samples: int
    verified: tuple[str, ...] = ()  # tasks of `met` that were evaluated on all of val with the weights as they are now
    private_training: list[dict] = field(default_factory=list)  # what trainings of single tasks after fits gained
    training_seconds: float = field(default=0.0, compare=False)  # of all steps of this process
    reading_seconds: float = field(default=0.0, compare=False)  # of these, waited for batches

    @property
    def fitted_ratios(self) -> dict[str, float]:
        """Accuracy / target of the tasks that were trained alone after the fit, as the fit had left them."""
        return {gained["task"]: gained["before"] for gained in reversed(self.private_training)}

    @property
    def success(self) -> bool:
        """Every task was at its target with the weights as they are now."""
        return self.reason == MET
