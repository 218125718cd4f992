"""What a round of training depends on besides its tasks, data and options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from gemel.environment.clock import Clock
from gemel.training.outcome import Standing
from gemel.training.prefix import Prefix


@dataclass(frozen=True)
class RoundContext:
    """The surroundings of one round."""

    device: torch.device
    seed: int
    purpose: tuple = ()  # with the seed, what the random numbers of the round depend on
    clock: Clock = field(default_factory=Clock)
    # Task -> in which precision its training steps compute (precision.py); what a round decides is added.
    precision: dict[str, dict] = field(default_factory=dict)
    # Where fitted models are, batch normalisation statistics included; empty: the weights were not fitted.
    fitted: Mapping[str, Standing] = field(default_factory=dict)
    # Accuracy on TaskData.screen from which on all of val is evaluated; a task without an entry has no screening.
    screen_targets: Mapping[str, float] = field(default_factory=dict)
    beside: tuple[str, ...] = ()  # tasks that are not trained, but hold parameters which this round may train
    prefixes: Mapping[str, Prefix] = field(default_factory=dict)  # of the tasks whose first layers stay as they are
    save: Callable[[dict, bool], None] | None = None  # (state of the round, whether the run ends here)
    saved: dict | None = None  # the state of an interrupted round, to resume it
