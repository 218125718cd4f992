"""What a round of training depends on, and how it ended."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from gemel.training.early_stopping import Standing
from gemel.training.prefix import Prefix

MET, GIVEN_UP, EPOCHS_SPENT, UNTRAINED = "met", "given up", "epochs spent", "needs training"
NOT_FINITE, OUT_OF_MEMORY, TIME_OVER = "loss not finite", "out of memory", "time over"


class Interrupted(KeyboardInterrupt):
    """The user asked for an end; the round in flight was saved after its last step."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    reason: str
    accuracies: dict[str, float]  # per trained task, when it was last evaluated
    met: tuple[str, ...]  # tasks at their target when last evaluated, and not given up
    steps: int
    samples: int

    @property
    def success(self) -> bool:
        """Every task was at its target with the weights as they are now."""
        return self.reason == MET


def never() -> bool:
    return False


@dataclass(frozen=True)
class RoundContext:
    """What a round depends on besides its tasks and options."""

    device: torch.device
    seed: int
    purpose: tuple = ()  # with the seed, what the random numbers of the round depend on
    deadline: float = math.inf  # on time.monotonic()
    fitted: Mapping[str, Standing] = field(default_factory=dict)  # where fitted models are, statistics included; empty:
    # the weights were not fitted
    screen_targets: Mapping[str, float] | None = None  # accuracy on TaskData.screen that makes all of val worth a look
    prefixes: Mapping[str, Prefix] = field(default_factory=dict)  # of the tasks whose first layers stay as they are
    save: Callable[[dict, bool], None] | None = None  # (state of the round, whether the run ends here)
    saved: dict | None = None  # a state to go on from
    stop_asked: Callable[[], bool] = never  # whether the user asked for an end
