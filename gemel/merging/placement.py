"""Which rank works for which task: by the time that a training step of each takes."""

import time
from collections.abc import Collection, Mapping, Sequence

import torch

from gemel.datasets.loaders import TaskData, batch_size_of, num_samples
from gemel.environment import ranks
from gemel.environment.seeds import seeded
from gemel.merging.state import MergeState
from gemel.sharing.holders import park, synchronise
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.workload import Task

REPEATS = 2  # of a step, after one that warms up


def place_tasks(
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    state: MergeState,
    seed: int,
    apart: Sequence[Collection[str]] = (),
) -> None:
    """Gives every task a rank, by costs of which each rank measures its part; all ranks call it.

    apart: sets of tasks that are worked on one after the other, each of which is spread over the ranks.

    The models of all ranks are those of the first one from then on, should a workload file draw random weights.
    """
    ranks.assign({})
    if ranks.size() == 1:
        return
    synchronise(state.models)
    synchronise(state.unmerged)
    own = list(tasks)[ranks.rank() :: ranks.size()]
    costs = ranks.united({name: step_seconds(tasks[name], data[name], state, seed) for name in own})
    costs = {name: costs[name] for name in tasks}
    ranks.assign(ranks.placed(costs, ranks.size(), apart))
    park(state.models)
    park(state.unmerged)


def step_seconds(task: Task, data: TaskData, state: MergeState, seed: int) -> float:
    """Seconds of the forward and backward pass on the first batch of train; 0 if the model cannot be trained on it,
    which check.py reports."""
    train, snapshot = data.train, take_snapshot(task.model)
    teacher = None if task.labels else Teacher(task.model, state.unmerged[task.name], [])
    try:
        with seeded(seed, "cost", task.name):
            count = min(batch_size_of(train), num_samples(train))
            batch = train.collate_fn([train.dataset[i] for i in range(count)])
            task.model.train().zero_grad()  # gradients that the user left may have another memory layout
            return min([_seconds(task, batch, state.device, teacher) for _ in range(1 + REPEATS)][1:])
    except Exception:  # a user's model may raise anything
        return 0.0
    finally:
        restore_snapshot(snapshot)
        if teacher is not None:
            teacher.close()


def _seconds(task: Task, batch: tuple, device: torch.device, teacher: Teacher | None) -> float:
    began = time.perf_counter()
    total = torch.as_tensor(sum(task_losses(task, batch, device, teacher).values()))
    total.backward()
    float(total.detach())  # waits for the device
    return time.perf_counter() - began
