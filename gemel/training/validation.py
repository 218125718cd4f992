"""Validation within a round: when, of which tasks first, and what it decides."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence

from torch import nn

from gemel.datasets.loaders import num_samples
from gemel.environment import ranks
from gemel.environment.events import emit
from gemel.evaluation.eval_method import evaluate
from gemel.evaluation.split_outputs import measured_with_others
from gemel.training.context import RoundContext
from gemel.training.options import TrainingOptions
from gemel.training.outcome import EPOCHS_SPENT, GIVEN_UP, MET, UNTRAINED
from gemel.training.schedule import Schedule
from gemel.training.step import Member

NEARLY_THERE = 0.98  # share of the target from which validation is as frequent as it may be

log = logging.getLogger(__name__)


class Validation:
    """Evaluates the tasks of a round and gives up those whose learning curve misses the target.

    averaged: by task, the models that are validated once a step was made: those with averaged weights.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        averaged: nn.Module,
        options: TrainingOptions,
        schedule: Schedule,
        context: RoundContext,
    ):
        self.members, self.averaged = members, averaged
        self.options, self.schedule, self.context = options, schedule, context

    @property
    def active(self) -> list[Member]:
        """The tasks that are not given up."""
        return [member for member in self.members.values() if not member.progress.given_up]

    def validate(self, everything: bool = False) -> str | None:
        """Evaluates the tasks furthest below target first, and stops at the first below it unless all are asked for.

        Returns why the round ends, or None.
        """
        order = sorted(self.active, key=lambda member: member.progress.ratio)
        measured: dict[str, tuple[float, bool]] = {}
        for number, member in enumerate(order):
            if member.task.name not in measured:
                measured |= self._measured(order[number:], everything)
            self.note(member, *measured[member.task.name])
            if not member.progress.met and not self.give_up_if_stalled(member) and not everything:
                return None
        return self._decide()

    def _measured(self, left: Sequence[Member], everything: bool) -> dict[str, tuple[float, bool]]:
        """Of the first of the tasks, or of all: (accuracy on val, True); where the screening subset is below its
        target, (an estimate from that, False). All ranks share in it."""
        members = left if everything else left[:1]
        found: dict[str, tuple[float, bool]] = {}
        ratios: dict[str, float] = {}  # on the screening subset
        for name, member in ((member.task.name, member) for member in members):
            known = self.context.fitted.get(name) if self.schedule.step == 0 else None
            if known is not None and known.accuracy is not None:
                found[name] = known.accuracy, True
            elif known is not None and self.screens(member):
                ratios[name] = known.ratio
        unknown = [member for member in members if member.task.name not in found]
        screened = [member for member in unknown if self.screens(member) and member.task.name not in ratios]
        targets = self.context.screen_targets
        ratios |= {n: accuracy / targets[n] for n, accuracy in self._evaluated(screened, "screen").items()}
        left = [member for member in unknown if ratios.get(member.task.name, 1.0) >= 1]
        found |= {name: (accuracy, True) for name, accuracy in self._evaluated(left, "val").items()}
        failed = {name: ratio for name, ratio in ratios.items() if ratio < 1}
        return found | {name: (ratio * self.members[name].progress.target, False) for name, ratio in failed.items()}

    def _evaluated(self, members: Sequence[Member], split: str) -> dict[str, float]:
        """The accuracies of some tasks, of which all ranks compute outputs."""
        if not members:
            return {}
        shown = {m.task.name: (self._model(m), getattr(m.data, split)) for m in members}

        def measure(name: str) -> float:
            return evaluate(self.members[name].task, shown[name][1], shown[name][0])

        found = ranks.together(lambda: measured_with_others(shown, measure, shown))
        return {name: found[name] for name in shown}

    def _model(self, member: Member) -> nn.Module:
        """What is validated; where this rank does not train the task, a copy, which is to get the weights."""
        if ranks.takes_part(member.task.name):
            return self.averaged.get_submodule(member.task.name) if self.schedule.step else member.task.model
        return copy.deepcopy(member.task.model).eval()

    def note(self, member: Member, accuracy: float, is_confirmed: bool) -> None:
        """Adds a measurement to the task's progress."""
        progress, step = member.progress, self.schedule.step
        progress.note(step, accuracy, is_confirmed)
        reached = {"accuracy": progress.accuracy, "target": progress.target, "whole_val": progress.confirmed}
        emit("validation", task=member.task.name, step=step, **reached)
        log.debug("step %d: %s %.4f of %.4f", step, member.task.name, progress.accuracy, progress.target)

    def screens(self, member: Member) -> bool:
        """Whether a subset of the task's val split is evaluated before all of it."""
        known = member.task.name in self.context.screen_targets
        return known and self.options.screening_images > 0 and member.data.screen is not member.data.val

    def give_up_if_stalled(self, member: Member) -> bool:
        """A first stall lowers the learning rate for all; a task that then stalls again is given up for good."""
        if not member.progress.stalled(self.schedule.step, self.schedule.patience, self.schedule.max_steps):
            return False
        if self.schedule.lower_rate():
            for other in self.active:
                other.progress.restart_patience(self.schedule.step)
            return False
        member.progress.given_up = True
        return True

    def interval(self) -> int:
        """Steps until the next validation: fewer, the nearer the worst task seems to be to its target.

        Bounded below so that evaluating that one task (a forward pass costs about a third of a training step on the
        same images) takes no more than its share of the time. Counts only, no clock: the same seed, the same result.
        """
        if not self.active:
            return 0
        left = self.schedule.private_steps - self.schedule.step
        return min(self._usual_interval(), left) if left > 0 else self._usual_interval()

    def _usual_interval(self) -> int:
        worst = min(self.active, key=lambda member: member.progress.ratio)
        images_per_step = sum(self.options.batch_size(member.task) for member in self.active)
        evaluated = worst.data.screen if self.screens(worst) else worst.data.val
        cost_in_steps = num_samples(evaluated) / 3 / images_per_step
        shortest = max(5, math.ceil(cost_in_steps / self.options.validation_share))
        shortest = min(shortest, self.schedule.steps_per_epoch)
        if worst.progress.ratio > NEARLY_THERE:
            return shortest
        longest = 2 if self.options.imitates else 4  # it may be at its target soon
        return int(min(max(shortest, worst.progress.steps_to_target() / 2), longest * shortest))

    def _decide(self) -> str | None:
        """A round ends when all tasks meet their targets, or when fewer than two are left that could share."""
        gave_up = len(self.active) < len(self.members)
        if all(member.progress.met for member in self.active):
            return GIVEN_UP if gave_up else MET
        if gave_up and len(self.active) < 2:
            return GIVEN_UP
        if self.schedule.step >= self.schedule.max_steps:
            return EPOCHS_SPENT if self.schedule.max_steps else UNTRAINED
        return None
