"""One step of joint training: a batch of every task, gradients of all losses, one step over distinct parameters.

A tied parameter is in the optimizer once, so it is stepped once, with the sum of its tasks' gradients.
"""

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gemel.datasets.loaders import TaskData
from gemel.environment.failures import is_out_of_memory
from gemel.fitting.batch_norm import freeze_statistics, frozen_statistics
from gemel.forward.modes import release_graphs
from gemel.training.batches import Batches, split
from gemel.training.distillation import Teacher
from gemel.training.early_stopping import Progress, loss_weight
from gemel.training.losses import task_losses
from gemel.training.options import TrainingOptions
from gemel.training.outcome import NOT_FINITE, OUT_OF_MEMORY
from gemel.training.schedule import Schedule
from gemel.workload import Task

Tensors = tuple[Tensor, ...] | list[Tensor]

log = logging.getLogger(__name__)


@dataclass
class Member:
    """One task of a round: what it trains on, and how far it is from its target."""

    task: Task
    data: TaskData
    batches: Batches
    progress: Progress
    num_parts: int = 1  # that a batch is split into, more than one when it did not fit the memory

    @classmethod
    def of(cls, task: Task, data: TaskData) -> "Member":
        return cls(task, data, Batches(data), Progress.of(task))

    def state(self) -> dict:
        return {"batches": self.batches.state(), "progress": self.progress.state(), "num_parts": self.num_parts}

    def load_state(self, state: dict) -> None:
        self.batches.load_state(state["batches"])
        self.progress, self.num_parts = Progress.from_state(state["progress"]), state["num_parts"]


def shared_and_private(models: nn.ModuleDict) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The distinct parameters that are trained: those that several models hold, and those that one model holds."""
    holders: dict[nn.Parameter, int] = {}
    for model in models.values():
        for parameter in model.parameters():
            if parameter.requires_grad:
                holders[parameter] = holders.get(parameter, 0) + 1
    shared = [parameter for parameter, count in holders.items() if count > 1]
    return shared, [parameter for parameter, count in holders.items() if count == 1]


class JointStep:
    """The optimizer and the moving average of weights of the trained models.

    models: those of the members, in one container, so that a tied parameter is there once. teachers: by task, where
    losses compare with the unmerged model.
    """

    def __init__(
        self,
        models: nn.ModuleDict,
        options: TrainingOptions,
        schedule: Schedule,
        device: torch.device,
        teachers: Mapping[str, Teacher],
    ):
        self.models, self.options, self.schedule = models, options, schedule
        self.device, self.teachers = device, teachers
        self.shared, private = shared_and_private(models)
        trained = [*self.shared, *private] or [nn.Parameter(torch.zeros(1, device=device))]  # all may be frozen
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, fused=fused or None)
        release_graphs(models)
        self.averaged = AveragedModel(models, multi_avg_fn=self._move_average, use_buffers=True)
        self.samples = 0

    def begin_stage(self, members: Sequence[Member]) -> None:
        """Train mode, with what this stage leaves alone frozen: shared parameters and statistics in the first."""
        private_only = self.schedule.private_only
        for parameter in self.shared:
            parameter.requires_grad_(not private_only)
        for member in members:
            member.task.model.train()
            if private_only:
                freeze_statistics(member.task.model)

    def step(self, members: Sequence[Member]) -> str | None:
        """One batch of every member and one step of the optimizer; why the round ends, or None."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate()
        batches = [(member, member.batches.next()) for member in members]
        while (total := self._backward(batches)) is None:
            if any(member.num_parts > len(batch[0]) for member, batch in batches):
                return OUT_OF_MEMORY
        if not torch.isfinite(total):
            return NOT_FINITE
        self.optimizer.step()
        self.averaged.update_parameters(self.models)
        self.samples += sum(len(batch[0]) for _, batch in batches)
        self.schedule.step += 1
        return None

    def finish(self) -> None:
        """Leaves the models with the averaged weights, in eval mode."""
        for parameter in self.shared:
            parameter.requires_grad_(True)
        if self.schedule.step:
            self.models.load_state_dict(self.averaged.module.state_dict())
        self.models.eval()

    def _backward(self, batches: Sequence[tuple[Member, tuple]]) -> Tensor | None:
        """Gradients of all losses and their sum; None if a task ran out of memory and is to be split further."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for member, batch in batches:
            try:
                for part in split(batch, member.num_parts):
                    loss = self._loss(member, part) * (len(part[0]) / len(batch[0]))
                    if loss.requires_grad:  # not where all that this stage trains is in other models
                        loss.backward()
                    total += loss.detach()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                most = len(batch[0])  # more parts than images: it cannot be split further
                member.num_parts = min(2 * member.num_parts, most) if member.num_parts < most else most + 1
                if (teacher := self.teachers.get(member.task.name)) is not None:
                    teacher.clear()
                size = math.ceil(len(batch[0]) / member.num_parts)
                log.warning("%s: out of memory; continues with %d images at a time", member.task.name, size)
                self.optimizer.zero_grad(set_to_none=True)
                return None
        return total

    def _loss(self, member: Member, batch: tuple) -> Tensor:
        model, teacher = member.task.model, self.teachers.get(member.task.name)
        with frozen_statistics(model) if len(batch[0]) == 1 else contextlib.nullcontext():  # one has no variance
            losses = task_losses(member.task, batch, self.device, teacher)
        weight = loss_weight(member.progress.accuracy, member.progress.target)
        total = sum(self.options.weight_of(name, member.task) * loss for name, loss in losses.items())
        return weight * torch.as_tensor(total)

    def _move_average(self, averages: Tensors, values: Tensors, num_averaged: Tensor | int) -> None:
        """Moves the averages towards the values; quickly at first, so that the start of the trial is soon forgotten.

        The average is what is validated and kept: at any step it is as good as weights after a lowered learning rate.
        Source: Izmailov et al., "Averaging Weights Leads to Wider Optima", UAI 2018.
        """
        step = self.schedule.step
        decay = min(self.options.average_decay, (1 + step) / (10 + step))
        if averages[0].is_floating_point():  # all are of one dtype
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    def state(self) -> dict:
        return {
            "samples": self.samples,
            "models": self.models.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict) -> None:
        self.samples = state["samples"]
        self.models.load_state_dict(state["models"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
