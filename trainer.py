"""Joint retraining of tied models until each task meets its target, or cannot.

One optimizer holds every distinct parameter once; each task brings its own batches, losses and weight; validation
decides when the round is over. The parts are in gemel/training/: step.py (one step), schedule.py (stages and learning
rate), validation.py (when to validate, when to give up), losses.py, distillation.py.
"""

import itertools
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from gemel.datasets.loaders import TaskData, reseed
from gemel.environment import ranks
from gemel.environment.clock import TimeOver
from gemel.environment.events import emit
from gemel.environment.interrupts import Interrupted
from gemel.environment.seeds import random_state, seeded, set_random_state
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.sharing.holders import own_models, synchronise_copies
from gemel.training.compiled import compiled_of
from gemel.training.context import RoundContext
from gemel.training.distillation import Teacher
from gemel.training.options import TrainingOptions
from gemel.training.outcome import TIME_OVER, Outcome
from gemel.training.precision import autocasts_of
from gemel.training.prefix import frozen, frozen_modules
from gemel.training.schedule import Schedule
from gemel.training.step import JointStep, Member, shared_and_private
from gemel.training.validation import Validation
from gemel.workload import Task


def recover(
    models: nn.ModuleDict,
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    options: TrainingOptions,
    context: RoundContext,
    teachers: Mapping[str, Teacher] | None = None,
) -> Outcome:
    """Trains the given tasks, whose models are tied as they shall be, until all are at target or the round is decided.

    tasks: those whose weights the new ties change; other models of the workload are not touched. teachers: per task, if
    the options compare with one. Models are left in eval mode. Raises Interrupted after the state was saved.
    """
    with seeded(context.seed, *context.purpose), frozen(models, context.prefixes):
        for name in tasks:
            reseed(data[name], context.seed, *context.purpose)
        members = {name: Member.of(task, data[name]) for name, task in tasks.items()}
        container = nn.ModuleDict({name: models[name] for name in dict.fromkeys((*tasks, *context.beside))})
        return Round(container, members, options, context, teachers).run()


class Round:
    """One trial: its tasks, and the step, schedule and validation that they share."""

    def __init__(
        self,
        models: nn.ModuleDict,
        members: Mapping[str, Member],
        options: TrainingOptions,
        context: RoundContext,
        teachers: Mapping[str, Teacher] | None = None,
    ):
        self.members, self.options, self.context = members, options, context
        synchronise_copies(models)
        steps_per_epoch = max(len(member.data.train) for member in members.values())
        shared, private = shared_and_private(models)
        held = set(own_models(models).parameters())  # what other ranks freeze is not known here
        has_both = bool(shared) and ranks.any_of(any(parameter in held for parameter in private))
        private_rate = options.private_rate(member.task for member in members.values())
        self.schedule = Schedule(options, steps_per_epoch, has_both, private_rate)
        self.training = JointStep(models, options, self.schedule, context.device, teachers or {})
        self.validation = Validation(members, self.training.averaged.module, options, self.schedule, context)
        self.reason: str | None = None
        self.training_seconds = 0.0

    def run(self) -> Outcome:
        """Trains and validates in turn until the round is decided."""
        try:
            with self.context.clock.interruptible():
                self._begin()
        except TimeOver:
            self.reason = TIME_OVER
        while self.reason is None:
            began = time.perf_counter()
            self.train()
            self.training_seconds += time.perf_counter() - began
            if self.reason is None:
                self.validate()
        self.training.finish()
        return self._outcome()

    def train(self) -> None:
        """Steps until the next validation is due, the time is over or the user asks for an end."""
        self.training.begin_stage(list(self.members.values()))
        if self.training.autocasts is None:
            steps = self.schedule.max_steps
            self.training.autocasts = autocasts_of(self.members, self.training, self.context, steps)
            self.training.compiled = compiled_of(self.members, self.training, self.context, steps)
        while self.schedule.step < self.schedule.next_validation and self.reason is None:
            if self.context.clock.stop_asked():
                self.save(last=True)
                raise Interrupted
            if self.context.clock.is_over():
                self.save(last=True)
                self.reason = TIME_OVER
                return
            self.reason = self.training.step(self.validation.active)
            emit("step", step=self.schedule.step, max_steps=self.schedule.max_steps)
        self.reason = self.reason or self.training.why_failed()

    def validate(self) -> None:
        """Validates and saves; where that is cut short, the state from before it is saved, and it is done again."""
        schedule, state = self.schedule, self._state()
        try:
            with self.context.clock.interruptible():
                self.reason = self.validation.validate(everything=schedule.step >= schedule.max_steps)
        except (Interrupted, TimeOver) as ended:
            self._hand_on(state, last=True)
            if isinstance(ended, Interrupted):
                raise
            self.reason = TIME_OVER
            return
        schedule.next_validation = min(schedule.step + self.validation.interval(), schedule.max_steps)
        self.save()

    def save(self, last: bool = False) -> None:
        """Hands on everything that the rest of the round depends on, unless the round is decided."""
        if self.reason is None:
            self._hand_on(self._state(), last)

    def _hand_on(self, state: dict, last: bool) -> None:
        if self.context.save is not None:
            self.context.save(state, last)

    def _state(self) -> dict:
        members = {name: member.state() for name, member in self.members.items()}
        round_state = {"members": members, "random": random_state(), "precision": dict(self.context.precision)}
        return {**self.schedule.state(), **self.training.state(), **round_state}

    def _begin(self) -> None:
        """Resumes a saved round; else re-estimates batch normalisation statistics and evaluates every task."""
        if self.context.saved is not None:
            self._load_state(self.context.saved)
            return
        if not self.context.fitted:
            for member in (member for name, member in self.members.items() if ranks.takes_part(name)):
                batches = itertools.islice(member.data.train, self.options.statistics_batches)
                model = member.task.model
                reestimate_statistics(model, list(batches), self.context.device, keep=frozen_modules(model))
        self.reason = self.validation.validate(everything=True)
        self.schedule.next_validation = min(self.validation.interval(), self.schedule.max_steps)

    def _load_state(self, state: dict) -> None:
        self.schedule.load_state(state)
        self.training.load_state(state)
        for name, member in self.members.items():
            member.load_state(state["members"][name])
        self.context.precision.update(state.get("precision", {}))  # earlier versions have none
        set_random_state(state["random"])

    def _outcome(self) -> Outcome:
        accuracies = {name: member.progress.accuracy for name, member in self.members.items()}
        met = tuple(n for n, m in self.members.items() if m.progress.met and not m.progress.given_up)
        now = self.schedule.step
        verified = tuple(name for name in met if self.members[name].progress.validated[-1][0] == now)
        seconds: Any = {"training_seconds": self.training_seconds, "reading_seconds": self.training.reading_seconds}
        return Outcome(self.reason or "", accuracies, met, now, self.training.samples, verified, **seconds)
