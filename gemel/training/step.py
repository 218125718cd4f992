"""One step of joint training: a batch of every task, gradients of all losses, one step over distinct parameters.

A tied parameter is in the optimizer once, so it is stepped once, with the sum of its tasks' gradients.
"""

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gemel.datasets.loaders import TaskData
from gemel.environment import ranks
from gemel.environment.failures import is_out_of_memory
from gemel.environment.seeds import derive_seed
from gemel.environment.threads import num_threads_set, times_threads
from gemel.fitting.batch_norm import freeze_statistics, frozen_statistics
from gemel.forward.autocast import IN_FLOAT32, Autocast
from gemel.forward.compiled import Compiled
from gemel.forward.modes import release_graphs
from gemel.forward.whole_batch_norm import whole_batch_norm
from gemel.sharing.holders import own_models, synchronise
from gemel.training.batches import Batches, own_part, split
from gemel.training.distillation import Teacher
from gemel.training.early_stopping import Progress, loss_weight
from gemel.training.losses import task_losses
from gemel.training.options import TrainingOptions
from gemel.training.outcome import NOT_FINITE, OUT_OF_MEMORY
from gemel.training.reduction import Reduction
from gemel.training.schedule import Schedule
from gemel.training.united import positions, state_of_rank
from gemel.workload import Task

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
        if ranks.takes_part(self.task.name):
            self.batches.load_state(state["batches"])
        self.progress, self.num_parts = Progress.from_state(state["progress"]), state["num_parts"]


class Taken(NamedTuple):
    """The next batch of a task, of which this rank computes all or a part."""

    member: Member
    part: tuple  # (images, targets)
    num_images: int  # of the whole batch

    @classmethod
    def of(cls, member: Member) -> "Taken":
        batch = member.batches.next()
        return cls(member, own_part(batch, member.task.name), len(batch[0]))


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
    losses compare with the unmerged model. With several ranks each trains what the models of the tasks hold that it
    computes, and the gradients of what several ranks train are summed over the ranks (reduction.py). A rank that
    computes parts of a task's batches weights its losses by its share of the images.
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
        self.autocasts: Mapping[str, Autocast] | None = None  # by task (precision.py); None: in float32, as yet
        self.shared, private = shared_and_private(models)
        self.own = own_models(models)
        held = set(self.own.parameters())
        self.trained = [parameter for parameter in [*self.shared, *private] if parameter in held]
        self.reduction = Reduction(models, self.shared, device, self.trained)
        self.positions = positions(models, self.trained) if ranks.size() > 1 else []
        fused = device.type == "cuda"
        stepped = self.trained or [nn.Parameter(torch.zeros(1, device=device))]  # all may be frozen, or other ranks'
        self.optimizer = torch.optim.AdamW(stepped, lr=options.learning_rate, fused=fused or None)
        release_graphs(models)
        self.averaged = AveragedModel(self.own, use_buffers=True)
        self.averages = _by_type(list(self.averaged.module.parameters()), list(self.own.parameters()))
        self.samples = 0
        self.reading_seconds = 0.0  # that this process waited for batches
        self.seed = torch.initial_seed()
        self.loss = torch.zeros((), device=device)  # of the last step, the sum over the tasks of all ranks
        self.compiled: Mapping[str, Compiled] = {}  # by task of this rank (compiled.py)
        self.times_threads: dict[str, int] = {}  # by task of this rank
        self.has_failed = torch.zeros((), dtype=torch.bool, device=device)  # a loss was not finite; not looked at yet
        self.looks_later = fused  # so that the device need not wait for this process in every step

    def begin_stage(self, members: Sequence[Member]) -> None:
        """Train mode, with what this stage leaves alone frozen: shared parameters and statistics in the first."""
        private_only = self.schedule.private_only
        if self.device.type == "cpu":
            self.times_threads = times_threads([member.task.name for member in members])
        for parameter in self.shared:
            parameter.requires_grad_(not private_only)
        for member in (member for member in members if ranks.takes_part(member.task.name)):
            member.task.model.train()
            if private_only:
                freeze_statistics(member.task.model)

    def step(self, members: Sequence[Member]) -> str | None:
        """One batch of every member and one step of the optimizer; why the round ends, or None."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate()
        mine = [member for member in members if ranks.takes_part(member.task.name)]
        mine.sort(key=lambda member: not ranks.parts_of(member.task.name))  # so that no rank waits for long
        began = time.perf_counter()
        batches = [Taken.of(member) for member in mine]
        self.reading_seconds += time.perf_counter() - began
        num_samples, reason = sum(len(taken.part[0]) for taken in batches), None
        are_split = any(ranks.parts_of(member.task.name) for member in members)
        while self._again(total := self._backward(batches), batches, are_split):
            pass
        if total is None:
            total, reason = torch.zeros((), device=self.device), OUT_OF_MEMORY
        if ranks.size() > 1:
            total, num_samples, is_out_of_memory = self.reduction.reduce(total, num_samples, reason is not None)
            reason = OUT_OF_MEMORY if is_out_of_memory else None
        self.loss = total
        reason = reason or self._look_at_loss()
        if reason is not None:
            return reason
        self.optimizer.step()
        self._move_average()
        self.samples += num_samples
        self.schedule.step += 1
        return None

    def _threads_of(self, member: Member) -> contextlib.AbstractContextManager:
        """Within, torch computes with the threads that this rank has for the task."""
        return num_threads_set(torch.get_num_threads() * self.times_threads.get(member.task.name, 1))

    def _again(self, total: Tensor | None, batches: Sequence[Taken], are_split: bool) -> bool:
        """Whether a batch that did not fit the memory is tried in smaller parts, on this rank or on one that computes
        parts of the same batches: then all start again."""
        again = total is None and not any(taken.member.num_parts > len(taken.part[0]) for taken in batches)
        return ranks.any_of(again) if are_split else again

    def _look_at_loss(self) -> str | None:
        """Why the round ends, or None; where that is looked at later, the fused optimizer leaves out the step."""
        is_wrong = ~torch.isfinite(self.loss)
        if self.looks_later:
            self.optimizer.found_inf = is_wrong.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler sets it
            self.has_failed |= is_wrong
            return None
        return NOT_FINITE if is_wrong else None

    def why_failed(self) -> str | None:
        """Why the round ends, from what was not looked at in the steps before; waits for the device."""
        return NOT_FINITE if self.looks_later and bool(self.has_failed) else None

    def finish(self) -> None:
        """Leaves the models with the averaged weights, in eval mode."""
        for parameter in self.shared:
            parameter.requires_grad_(True)
        if self.schedule.step:
            self.own.load_state_dict(self.averaged.module.state_dict())
        synchronise(self.models)
        self.models.eval()

    def _backward(self, batches: Sequence[Taken]) -> Tensor | None:
        """Gradients of all losses and their sum; None if a task ran out of memory and is to be split further.

        Raises RuntimeError where that is a task of which other ranks compute parts.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for member, batch, num_images in batches:
            try:
                for part in split(batch, member.num_parts, member.task.name):
                    with self._autocast_of(member).whole_step(), self._threads_of(member):
                        loss = self._loss(member, part) * (len(part[0]) / num_images)
                        if loss.requires_grad:  # not where all that this stage trains is in other models
                            loss.backward()
                    total += loss.detach()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if ranks.parts_of(member.task.name):  # the others wait in the middle of their parts
                    raise RuntimeError(f"{member.task.name}: out of memory; allowed: a smaller batch_size") from error
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
        name, model = member.task.name, member.task.model
        is_part = bool(ranks.parts_of(name))
        if ranks.size() > 1:  # what dropout draws does not depend on how many ranks there are
            part = [ranks.ranks_of(name).index(ranks.rank())] if is_part else []
            torch.manual_seed(derive_seed(self.seed, name, self.schedule.step, *part))
        teacher, autocast = self.teachers.get(name), self._autocast_of(member)
        with contextlib.ExitStack() as stack:
            if is_part:
                stack.enter_context(whole_batch_norm(model, name))
            elif len(batch[0]) == 1:  # one image has no variance
                stack.enter_context(frozen_statistics(model))
            elif name in self.compiled:
                stack.enter_context(self.compiled[name].within())
            losses = task_losses(member.task, batch, self.device, teacher, autocast, is_part)
        weight = loss_weight(member.progress.accuracy, member.progress.target)
        total = sum(self.options.weight_of(name, member.task) * loss for name, loss in losses.items())
        return weight * torch.as_tensor(total)

    def _autocast_of(self, member: Member) -> Autocast:
        return (self.autocasts or {}).get(member.task.name, IN_FLOAT32)

    def _move_average(self) -> None:
        """Moves the averages towards the values, which are validated and kept.

        At any step the average is as good as weights after a lowered learning rate. While only private parameters are
        trained, it moves slowly, from the weights that the round began with: those were fitted, and are better than
        what the first steps give. Else it moves quickly at first, so that the start of the trial is soon forgotten.

        As AveragedModel.update_parameters, but parameters lie in lists that are made once. Buffers do not: a layer of a
        user may put a new tensor in the place of one in each forward pass.
        Source: Izmailov et al., "Averaging Weights Leads to Wider Optima", UAI 2018.
        """
        step, decay = self.schedule.step, self.options.average_decay
        keeps_start = decay > 0 and self.schedule.private_only
        if not keeps_start:
            decay = min(decay, (1 + step) / (10 + step))
        elif not self.options.imitates:  # single steps on labels of a small batch are worse
            decay = self.options.private_average_decay
        buffers = _by_type(list(self.averaged.module.buffers()), list(self.own.buffers()))
        for averages, values in self.averages:
            _move(averages, values, decay if step or keeps_start else 0)
        for averages, values in buffers:
            _move(averages, values, decay if step and averages[0].is_floating_point() else 0)
        self.averaged.n_averaged += 1

    def state(self) -> dict:
        """Of this rank's tasks: united.py makes one of those of all ranks."""
        several = {"positions": self.positions} if ranks.size() > 1 else {}
        return {
            **several,
            "samples": self.samples,
            "models": self.own.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict) -> None:
        """state: of all ranks' tasks."""
        own = state_of_rank(state, self.models, self.trained)
        self.samples = state["samples"]
        self.models.load_state_dict(state["models"])
        self.averaged.load_state_dict(own["averaged"])
        self.optimizer.load_state_dict(own["optimizer"])


@torch.no_grad()
def _move(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Averages, in place, of which `decay` is left; 0: copies."""
    if decay:
        torch._foreach_lerp_(averages, values, 1 - decay)
    else:
        torch._foreach_copy_(averages, values)


def _by_type(averages: Sequence[Tensor], values: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Both, tensor by tensor, in pairs of lists of one type and device each."""
    found: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for average, value in zip(averages, values, strict=True):
        of_type = found.setdefault((average.dtype, average.device), ([], []))
        of_type[0].append(average.detach())
        of_type[1].append(value.detach())
    return list(found.values())
