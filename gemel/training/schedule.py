"""The stages of a round, the learning rate of every step, and how many steps there may be."""

import math

from gemel.training.options import TrainingOptions


class Schedule:
    """Counts the steps of a round. Stages: first only parameters that one model holds alone, then everything.

    steps_per_epoch: one epoch is a pass over the largest train split among the trained tasks. has_private_stage:
    whether there are both shared and private parameters, so that the first stage makes sense. private_rate: the
    learning rate of the first stage (None: that of classifiers).
    """

    def __init__(
        self,
        options: TrainingOptions,
        steps_per_epoch: int,
        has_private_stage: bool,
        private_rate: float | None = None,
    ):
        self.options, self.steps_per_epoch = options, steps_per_epoch
        self.max_steps = math.ceil(options.max_epochs * steps_per_epoch)
        self.private_steps = math.ceil(options.private_epochs * steps_per_epoch) if has_private_stage else 0
        self.private_rate = options.private_learning_rate if private_rate is None else private_rate
        self.learning_rate = options.learning_rate  # of the second stage, when warmed up
        self.step = 0
        self.next_validation = 0  # step

    @property
    def private_only(self) -> bool:
        """Whether the next step trains only what one model holds alone."""
        return self.step < self.private_steps

    @property
    def patience(self) -> float:
        """Steps after which a learning curve is judged."""
        return self.options.patience_epochs * self.steps_per_epoch

    def rate(self) -> float:
        """The learning rate of the next step; each stage warms up, and in the last third of an imitation it falls to 0.

        Source: Hu et al., "MiniCPM", 2024, section 4 (warm-up, stable, decay).
        """
        since = self.step if self.private_only else self.step - self.private_steps
        peak = self.private_rate if self.private_only else self.learning_rate
        if self.private_only and self.options.imitates:
            peak *= min(1.0, 3 * (1 - since / self.private_steps))
        return peak * min(1.0, (since + 1) / max(1, self.options.warmup_steps))

    def lower_rate(self) -> bool:
        """Lowers the learning rate of the second stage to a fifth, once; whether it did."""
        if self.learning_rate != self.options.learning_rate:
            return False
        self.learning_rate /= 5
        return True

    def state(self) -> dict:
        return {"step": self.step, "due": self.next_validation, "learning_rate": self.learning_rate}

    def load_state(self, state: dict) -> None:
        self.step, self.next_validation = state["step"], state["due"]
        self.learning_rate = state["learning_rate"]
