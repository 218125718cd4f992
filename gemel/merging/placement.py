"""Which rank works for which task, and which tasks are split over several: by the time that a training step takes."""

import functools
import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gemel.datasets.loaders import TaskData, batch_size_of, num_samples
from gemel.environment import ranks
from gemel.environment.device import seconds_of
from gemel.environment.seeds import seeded
from gemel.environment.shares import Work, spread
from gemel.evaluation.split_outputs import digest
from gemel.fitting.batch_norm import batch_norms
from gemel.forward.batches import run
from gemel.forward.whole_batch_norm import whole_batch_norm
from gemel.sharing.holders import park, synchronise
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.trials.state import MergeState
from gemel.workload import Task

REPEATS = 2  # of a step, after one that warms up
LEAST_SECONDS = 0.02  # of a step that is split: what is gained of a shorter one is less than the noise of measuring it
COLLECTIVES = 20  # that are measured
SIDE = 64  # of the matrices that are multiplied between them
SECONDS_OF_WORK = 0.002  # between them
LARGE = 1 << 18  # numbers of the larger ones, in float32


def place_tasks(
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    state: MergeState,
    seed: int,
    apart: Sequence[Collection[str]] = (),
) -> None:
    """Gives every task a rank, or several, by costs of which each rank measures its part; all ranks call it.

    apart: sets of tasks that are worked on one after the other, each of which is spread over the ranks.

    The models of all ranks are those of the first one from then on, should a workload file draw random weights.
    """
    ranks.assign({})
    if ranks.size() == 1:
        return
    synchronise(state.models)
    synchronise(state.unmerged)
    own = list(tasks)[ranks.rank() :: ranks.size()]
    seconds = ranks.united({name: step_seconds(tasks[name], data[name], state, seed) for name in own})
    talking = Talking.measured(state.device)
    work = {name: work_of(task, data[name], talking, *seconds[name]) for name, task in tasks.items()}
    parts = spread(work, ranks.size(), apart)
    owners = {name: next(iter(on)) for name, on in parts.items()}
    costs = ranks.united({name: evaluation_seconds(tasks[name], data[name], state.device) for name in own})
    ranks.assign(owners, parts, {name: one.seconds for name, one in work.items()}, costs)
    park(state.models)
    park(state.unmerged)


class Talking(NamedTuple):
    """What collectives of all ranks take, in seconds."""

    small: float  # one of a few numbers
    per_byte: float  # more, for each byte of a large one

    @classmethod
    def measured(cls, device: torch.device) -> "Talking":
        """The mean of several, each after some work, since between ranks that work a collective takes several times as
        long as between ranks that wait for it; the same on all ranks, which all call it."""
        small, large = (sum(_collective(n, device) for _ in range(COLLECTIVES)) / COLLECTIVES for n in (1, LARGE))
        everywhere = ranks.gathered([small, max(0.0, large - small) / (4 * LARGE)])
        return cls(*(max(values) for values in zip(*everywhere, strict=True)))

    def seconds_of_split(self, model: nn.Module) -> float:
        """Of a step of a task that several ranks compute: at each batch normalisation two collectives, in forward and
        backward pass; all gradients; and moments of the teacher's outputs."""
        num_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
        return (2 * len(batch_norms(model)) + 1) * self.small + num_bytes * self.per_byte


def _collective(num_values: int, device: torch.device) -> float:
    """Seconds of a sum of so many numbers over all ranks, which worked as long as each other before."""
    values, factor = torch.zeros(num_values, device=device), torch.zeros(SIDE, SIDE, device=device)
    ranks.wait_for_all()
    ends = time.perf_counter() + SECONDS_OF_WORK
    while time.perf_counter() < ends:
        float((factor @ factor)[0, 0])  # waits for the device
    ranks.sum_in_place(values)
    float(values[0])
    return time.perf_counter() - ends


def images_of_batch(data: TaskData) -> int:
    """Images of a batch of train."""
    return min(batch_size_of(data.train), num_samples(data.train))


def work_of(task: Task, data: TaskData, talking: Talking, whole: float, half: float) -> Work:
    """What a step costs that takes so many seconds with a whole batch, and with half of one as a part of it."""
    more = max(0.0, half - whole / 2) + talking.seconds_of_split(task.model)
    return Work(whole, images_of_batch(data), more if whole >= LEAST_SECONDS else math.inf)


def evaluation_seconds(task: Task, data: TaskData, device: torch.device) -> tuple[float, float]:
    """Seconds of reading a batch of val, of images that were read before, and of computing its outputs; 0 if that
    fails."""
    val = data.val
    num_images = min(batch_size_of(val), num_samples(val))

    def read() -> Any:
        images, _ = val.collate_fn([val.dataset[i] for i in range(num_images)])
        digest(images)
        return images

    try:
        images = read()
        reading, computing = (
            min(seconds_of(work, device) for _ in range(REPEATS)) for work in (read, lambda: run(task.model, images))
        )
        return reading, computing
    except Exception:  # a user's model or transform may raise anything
        return 0.0, 0.0


def step_seconds(task: Task, data: TaskData, state: MergeState, seed: int) -> tuple[float, float]:
    """Seconds of a step, that of an optimizer included, on the first batch of train, and on half of it as a part of a
    batch of several ranks; 0 if the model cannot be trained on it, which check.py reports."""
    train, snapshot = data.train, take_snapshot(task.model)
    teacher = None if task.labels else Teacher(task.model, state.unmerged[task.name], [])
    try:
        with seeded(seed, "cost", task.name):
            images, targets = train.collate_fn([train.dataset[i] for i in range(images_of_batch(data))])
            task.model.train().zero_grad()  # gradients that the user left may have another memory layout
            trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0) if trained else None
            step = functools.partial(_seconds, task, device=state.device, teacher=teacher, optimizer=optimizer)
            whole = min([step((images, targets)) for _ in range(1 + REPEATS)][1:])
            part = images[: -(-len(images) // 2)], targets[: -(-len(images) // 2)]
            with whole_batch_norm(task.model, task.name):
                return whole, min([step(part) for _ in range(1 + REPEATS)][1:])
    except Exception:  # a user's model may raise anything
        return 0.0, 0.0
    finally:
        restore_snapshot(snapshot)
        if teacher is not None:
            teacher.close()


def _seconds(
    task: Task, batch: tuple, device: torch.device, teacher: Teacher | None, optimizer: torch.optim.Optimizer | None
) -> float:
    def step() -> None:
        torch.as_tensor(sum(task_losses(task, batch, device, teacher).values())).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return seconds_of(step, device)
