"""Joint retraining of tied models until each task meets its target, or cannot.

One optimizer holds every distinct parameter once, so a tied parameter is stepped once, with the sum of its tasks'
gradients. Each task brings its own batches, losses and weight; validation decides when the round is over.
"""

import itertools
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from gemel.datasets.loaders import TaskData, reseed
from gemel.environment.failures import is_out_of_memory
from gemel.environment.seeds import random_state, seeded, set_random_state
from gemel.evaluation.eval_method import evaluate
from gemel.fitting.batch_norm import freeze_statistics, reestimate_statistics
from gemel.training.batches import Batches, split
from gemel.training.distillation import Teacher
from gemel.training.early_stopping import Progress, loss_weight
from gemel.training.losses import task_losses
from gemel.training.options import TrainingOptions
from gemel.training.outcome import (
    EPOCHS_SPENT,
    GIVEN_UP,
    MET,
    NOT_FINITE,
    OUT_OF_MEMORY,
    TIME_OVER,
    UNTRAINED,
    Interrupted,
    Outcome,
    RoundContext,
)
from gemel.training.prefix import frozen, frozen_modules
from gemel.workload import Task

NEARLY_THERE = 0.98  # share of the target from which validation is as frequent as it may be

log = logging.getLogger(__name__)


def shared_and_private(models: nn.ModuleDict) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The distinct parameters that are trained: those that several models hold, and those that one model holds."""
    holders: dict[nn.Parameter, int] = {}
    for model in models.values():
        for parameter in model.parameters():
            if parameter.requires_grad:
                holders[parameter] = holders.get(parameter, 0) + 1
    shared = [parameter for parameter, count in holders.items() if count > 1]
    return shared, [parameter for parameter, count in holders.items() if count == 1]


def recover(
    models: nn.ModuleDict,
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    options: TrainingOptions,
    around: RoundContext,
    teachers: Mapping[str, Teacher] | None = None,
) -> Outcome:
    """Trains the given tasks, whose models are tied as they shall be, until all are at target or it is decided.

    tasks: those whose weights the new ties change; other models of the workload are not touched. teachers: per task, if
    the options compare with one. Models are left in eval mode. Raises Interrupted after the state was saved.
    """
    with seeded(around.seed, *around.purpose), frozen(models, around.prefixes):
        for name in tasks:
            reseed(data[name], around.seed, *around.purpose)
        return _Round(models, tasks, data, options, around, teachers or {}).run()


@dataclass
class _Member:
    """One task of the round: what it trains on, where it stands."""

    task: Task
    data: TaskData
    batches: Batches
    progress: Progress
    num_parts: int = 1  # that a batch is split into, more than one when it did not fit the memory


class _Round:
    """One trial: the optimizer, the step count and where each task stands."""

    def __init__(self, models, tasks, data, options: TrainingOptions, around: RoundContext, teachers):
        self.options, self.around, self.teachers = options, around, teachers
        self.members = {n: _Member(task, data[n], Batches(data[n]), Progress.of(task)) for n, task in tasks.items()}
        self.container = nn.ModuleDict({name: models[name] for name in tasks})  # yields a tied parameter once
        self.shared, private = shared_and_private(self.container)
        fused = around.device.type == "cuda"
        self.optimizer = torch.optim.AdamW([*self.shared, *private], lr=options.learning_rate, fused=fused or None)
        self.averaged = AveragedModel(self.container, multi_avg_fn=self.average, use_buffers=True)
        self.learning_rate = options.learning_rate
        self.steps_per_epoch = max(len(member.data.train) for member in self.members.values())
        self.max_steps = math.ceil(options.max_epochs * self.steps_per_epoch)
        self.private_steps = math.ceil(options.private_epochs * self.steps_per_epoch) if self.shared and private else 0
        self.step = self.samples = 0
        self.due = 0  # step of the next validation
        self.reason: str | None = None

    @property
    def active(self) -> list[_Member]:
        return [member for member in self.members.values() if not member.progress.given_up]

    def run(self) -> Outcome:
        with tqdm(total=self.max_steps, desc="retraining", unit="step", leave=False, disable=None) as bar:
            if self.around.saved is None:
                self.begin()
            else:
                self.load_state(self.around.saved)
                bar.update(self.step)
            while self.reason is None:
                self.train(bar)
                if self.reason is None:
                    self.validate(everything=self.step >= self.max_steps)
                    self.due = min(self.step + self.interval(), self.max_steps)
                    self.save()
                bar.set_postfix_str(self.summary())
        for parameter in self.shared:
            parameter.requires_grad_(True)
        if self.step:
            self.container.load_state_dict(self.averaged.module.state_dict())
        self.container.eval()
        return self.outcome()

    def begin(self) -> None:
        """What needs no gradient: batch normalisation statistics; then where every task stands."""
        if not self.around.fitted:
            for member in self.members.values():
                batches = itertools.islice(member.data.train, self.options.statistics_batches)
                model = member.task.model
                reestimate_statistics(model, list(batches), self.around.device, keep=frozen_modules(model))
        self.validate(everything=True)
        self.due = min(self.interval(), self.max_steps)

    def outcome(self) -> Outcome:
        accuracies = {name: member.progress.accuracy for name, member in self.members.items()}
        met = tuple(n for n, m in self.members.items() if m.progress.met and not m.progress.given_up)
        return Outcome(self.reason, accuracies, met, self.step, self.samples)

    def summary(self) -> str:
        return " ".join(f"{m.progress.accuracy:.3f}/{m.progress.target:.3f}" for m in self.members.values())

    # ---- training ---------------------------------------------------------------------------------------

    def train(self, bar: tqdm) -> None:
        """Steps until the next validation is due, the time is over or the user asks for an end."""
        self.set_stage()
        while self.step < self.due and self.reason is None:
            if self.around.stop_asked():
                self.save(last=True)
                raise Interrupted
            if time.monotonic() > self.around.deadline:
                self.save(last=True)
                self.reason = TIME_OVER
                return
            self.reason = self.train_step()
            bar.update()

    def set_stage(self) -> None:
        """What is trained from this step on: at first what is private, which no other task feels; then everything."""
        private_only = self.step < self.private_steps
        for parameter in self.shared:
            parameter.requires_grad_(not private_only)
        for member in self.members.values():
            member.task.model.train()
            if private_only:
                freeze_statistics(member.task.model)

    def rate(self) -> float:
        """The learning rate of this step; each stage warms up."""
        private_only = self.step < self.private_steps
        since = self.step if private_only else self.step - self.private_steps
        peak = self.options.private_learning_rate if private_only else self.learning_rate
        return peak * min(1.0, (since + 1) / max(1, self.options.warmup_steps))

    def train_step(self) -> str | None:
        """One batch of every active task and one step of the optimizer; why the round ends, or None."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        batches = [(member, member.batches.next()) for member in self.active]
        while (total := self.backward(batches)) is None:
            if any(member.num_parts > len(batch[0]) for member, batch in batches):
                return OUT_OF_MEMORY
        if not torch.isfinite(total):
            return NOT_FINITE
        self.optimizer.step()
        self.averaged.update_parameters(self.container)
        self.samples += sum(len(batch[0]) for _, batch in batches)
        self.step += 1
        return None

    def backward(self, batches: list[tuple[_Member, tuple]]) -> Tensor | None:
        """Gradients of all losses and their sum; None if a task ran out of memory and is to be split further."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.around.device)
        for member, batch in batches:
            try:
                for part in split(batch, member.num_parts):
                    loss = self.loss(member, part) * (len(part[0]) / len(batch[0]))
                    loss.backward()
                    total += loss.detach()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                member.num_parts *= 2
                size = math.ceil(len(batch[0]) / member.num_parts)
                log.warning("%s: out of memory; goes on with %d images at a time", member.task.name, size)
                self.optimizer.zero_grad(set_to_none=True)
                return None
        return total

    def loss(self, member: _Member, batch: tuple) -> Tensor:
        if len(batch[0]) == 1:
            freeze_statistics(member.task.model)  # a batch of one has no variance; a split batch is all the same size
        losses = task_losses(member.task, batch, self.around.device, self.teachers.get(member.task.name))
        weight = loss_weight(member.progress.accuracy, member.progress.target)
        return weight * sum(self.options.weight_of(name, member.task) * loss for name, loss in losses.items())

    def average(self, averages: list[Tensor], values: list[Tensor], num_averaged: Tensor) -> None:
        """Moves the averages towards the values; at first quickly, so that where the trial began is soon forgotten.

        What is validated, and kept, is this average: it is as good as what a lowered learning rate would come to, at
        any time. Source: Izmailov et al., "Averaging Weights Leads to Wider Optima", UAI 2018.
        """
        decay = min(self.options.average_decay, (1 + self.step) / (10 + self.step))
        if averages[0].is_floating_point():  # all are of one dtype
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    # ---- validation -------------------------------------------------------------------------------------

    def interval(self) -> int:
        """Steps until the next validation: sooner the nearer the worst task seems to be to its target.

        Bounded below so that evaluating that one task (a forward pass costs about a third of a training step on the
        same images) takes no more than its share of the time. Counts only, no clock: the same seed, the same result.
        """
        if not self.active:
            return 0
        if self.step < self.private_steps:
            return min(self.usual_interval(), self.private_steps - self.step)
        return self.usual_interval()

    def usual_interval(self) -> int:
        worst = min(self.active, key=lambda member: member.progress.ratio)
        images_per_step = sum(self.options.batch_size(member.task) for member in self.active)
        looked_at = worst.data.screen if self.screens(worst) else worst.data.val
        cost_in_steps = len(looked_at.dataset) / 3 / images_per_step
        shortest = min(max(5, math.ceil(cost_in_steps / self.options.validation_share)), self.steps_per_epoch)
        if worst.progress.ratio > NEARLY_THERE:
            return shortest
        return int(min(max(shortest, worst.progress.steps_to_target() / 2), 4 * shortest))

    def screens(self, member: _Member) -> bool:
        """Whether a subset of the task's val split is evaluated before all of it."""
        known = self.around.screen_targets is not None and member.task.name in self.around.screen_targets
        return known and self.options.screening_images > 0 and member.data.screen is not member.data.val

    def validate(self, everything: bool = False) -> None:
        """Evaluates the tasks most likely to fail first and stops at the first that does, unless all are asked for."""
        for member in sorted(self.active, key=lambda member: member.progress.ratio):
            self.measure(member)
            if not member.progress.met and not self.give_up_if_stalled(member) and not everything:
                return
        self.decide()

    def measure(self, member: _Member) -> None:
        """Accuracy on val; where the screening subset is below its target, an estimate from that alone."""
        name, progress = member.task.name, member.progress
        model = self.averaged.module[name] if self.step else member.task.model
        known = self.around.fitted.get(name) if self.step == 0 else None
        accuracy = known.accuracy if known else None
        if accuracy is None and self.screens(member):
            if known:
                ratio = known.ratio
            else:
                ratio = evaluate(member.task, member.data.screen, model) / self.around.screen_targets[name]
            if ratio < 1:
                progress.note(self.step, min(ratio, 1.0) * progress.target, confirmed=False)
                log.debug("step %d: %s about %.4f of %.4f", self.step, name, progress.accuracy, progress.target)
                return
        if accuracy is None:
            accuracy = evaluate(member.task, member.data.val, model)
        progress.note(self.step, accuracy)
        log.debug("step %d: %s %.4f of %.4f", self.step, name, progress.accuracy, progress.target)

    def give_up_if_stalled(self, member: _Member) -> bool:
        """A first stall lowers the learning rate for all; a task that then stalls again is given up for good."""
        patience = self.options.patience_epochs * self.steps_per_epoch
        if not member.progress.stalled(self.step, patience, self.max_steps):
            return False
        if self.learning_rate == self.options.learning_rate:
            self.learning_rate /= 5
            for other in self.active:
                other.progress.restart_patience(self.step)
            return False
        member.progress.given_up = True
        return True

    def decide(self) -> None:
        """The round is over when all tasks meet their targets, or when fewer than two are left that could share."""
        gave_up = len(self.active) < len(self.members)
        if all(member.progress.met for member in self.active):
            self.reason = GIVEN_UP if gave_up else MET
        elif gave_up and len(self.active) < 2:
            self.reason = GIVEN_UP
        elif self.step >= self.max_steps:
            self.reason = EPOCHS_SPENT if self.max_steps else UNTRAINED

    # ---- going on after an interruption -----------------------------------------------------------------

    def save(self, last: bool = False) -> None:
        """Hands on all that the rest of the round depends on, unless the round is decided."""
        if self.around.save is None or self.reason is not None:
            return
        self.around.save(
            {
                "step": self.step,
                "samples": self.samples,
                "due": self.due,
                "learning_rate": self.learning_rate,
                "models": self.container.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "members": {
                    name: {"batches": m.batches.state(), "progress": m.progress.state(), "num_parts": m.num_parts}
                    for name, m in self.members.items()
                },
                "random": random_state(),
            },
            last,
        )

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.samples, self.due = state["step"], state["samples"], state["due"]
        self.learning_rate = state["learning_rate"]
        self.container.load_state_dict(state["models"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, member in self.members.items():
            saved = state["members"][name]
            member.batches.load_state(saved["batches"])
            member.progress, member.num_parts = Progress.from_state(saved["progress"]), saved["num_parts"]
        set_random_state(state["random"])
