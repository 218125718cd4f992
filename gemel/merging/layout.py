"""The memory layout of the models: convolutions can be quicker channels-last, which some models cannot take.

A model that looks at strides (`view` behind a convolution) fails in another layout than the one it was written for, and
so does an eval method that does so with what layers of a model put out. So the layout is first tried on a few images: a
forward pass, the eval method, and where it is checked that models can be trained (check.py) a step of training. Tied
layers are in models of several tasks: all have one. On a CPU channels-last is taken if all models can have it; on
another device, where it depends on the device and on the precision, training steps of all models are measured as well.
"""

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset

from gemel.datasets.loaders import TaskData, plain_images
from gemel.environment import ranks
from gemel.environment.clock import Clock
from gemel.environment.events import emit
from gemel.environment.seeds import seeded
from gemel.evaluation.eval_method import evaluate
from gemel.forward import FLOAT32
from gemel.forward.autocast import IN_FLOAT32, Autocast
from gemel.forward.batches import Batch, run
from gemel.forward.modes import deep_copy, device_of, set_layout
from gemel.options import MergeOptions
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.training.distillation import Teacher
from gemel.training.precision import Step, architecture_of, first_batch, parts_of
from gemel.trials.state import MergeState
from gemel.workload import Task

NUM_IMAGES = 2
TOLERANCE = 1e-3  # of the largest output: rounding differs between layouts
TOLERANCE_ELSEWHERE = 1e-2  # the same on other devices than a CPU: convolutions in TF32 keep 10 bits
REPEATS = 2  # of a step, after one that warms up
QUICKER = 1.05  # times as quick are training steps, all tasks together, where that is measured

log = logging.getLogger(__name__)


def choose_layout(
    state: MergeState,
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    options: MergeOptions,
    clock: Clock,
) -> None:
    """Lays out all models of the state channels-last, if that is quicker and all of them can be; the first rank tries.

    Raises Interrupted at once, as an eval method may take long; the models are then handed back.
    """
    seed, precision = options.seed, options.training.precision
    try:
        with clock.interrupts.immediate():
            wanted = ranks.of_first(lambda: can_be_channels_last(tasks, data, seed))
            if wanted and state.device.type != "cpu":
                wanted = ranks.of_first(lambda: is_quicker(tasks, data, state, seed, precision))
            state.use_layout(wanted)
    except BaseException:
        state.hand_back()
        raise


def can_be_channels_last(tasks: Mapping[str, Task], data: Mapping[str, TaskData], seed: int) -> bool:
    """Whether every model that works as it is also works channels-last: the same outputs, its eval method.

    What fails in both layouts is not the layout's fault: it counts as working. The models keep the layout that they
    have.
    """
    for name, task in tasks.items():
        emit("doing", what=f"trying the memory layout of weights: {name}")
        images = plain_images(data[name], 0, seed, "layout")[0][:NUM_IMAGES]
        before = _outputs(task.model, images)
        if before is None:
            continue  # the checks before the first round report it
        set_layout(task.model, torch.channels_last)
        try:
            after = _outputs(task.model, images)
            works = after is not None and _are_close(before, after, device_of(task.model))
            is_evaluated = _evaluation_error(task, data[name], seed) is None
        finally:
            set_layout(task.model, torch.contiguous_format)
        if not works or not is_evaluated and _evaluation_error(task, data[name], seed) is None:
            log.info("%s: does not run channels-last; all models keep the usual layout", name)
            return False
    return True


def _outputs(model: nn.Module, images: Batch) -> list[Tensor] | None:
    """The tensors that the model puts out; None if it raises anything."""
    try:
        return [leaf for leaf in tree_leaves(run(model, images)) if isinstance(leaf, Tensor)]
    except Exception:  # a user's model may raise anything
        return None


def is_quicker(
    tasks: Mapping[str, Task], data: Mapping[str, TaskData], state: MergeState, seed: int, precision: str
) -> bool:
    """Whether training steps of all models that can be trained, in bfloat16 where that is allowed, are quicker so."""
    totals = {torch.contiguous_format: 0.0, torch.channels_last: 0.0}
    measured: dict[str, dict] = {}  # architecture -> seconds by layout
    for name, task in tasks.items():
        emit("doing", what=f"measuring training steps in two memory layouts: {name}")
        batch = first_batch(data[name].train)
        key = architecture_of(task.model, batch)
        if key not in measured:
            measured[key] = _seconds_by_layout(task, batch, state, seed, precision)
        for layout, seconds in measured[key].items():
            totals[layout] += seconds
    return totals[torch.contiguous_format] >= QUICKER * totals[torch.channels_last] > 0


def _seconds_by_layout(task: Task, batch: tuple, state: MergeState, seed: int, precision: str) -> dict:
    """Seconds of a step by layout; none of a model that cannot be trained, which check.py reports."""
    snapshot, seconds = take_snapshot(task.model), {}
    teacher = None if task.labels else Teacher(task.model, state.unmerged[task.name], [])
    autocast = IN_FLOAT32 if precision == FLOAT32 else Autocast(torch.bfloat16, parts_of(task))
    try:
        task.model.train()
        step = Step(task, batch, state.device, teacher, seed)
        for layout in (torch.contiguous_format, torch.channels_last):
            set_layout(task.model, layout)
            seconds[layout] = min([step.seconds(autocast) for _ in range(1 + REPEATS)][1:])
    except Exception:  # a user's model may raise anything
        seconds = {}
    finally:
        set_layout(task.model, torch.contiguous_format)
        restore_snapshot(snapshot)
        if teacher is not None:
            teacher.close()
    return seconds


def _are_close(before: list[Tensor], after: list[Tensor], device: torch.device) -> bool:
    """Whether outputs agree; a detector's may differ in number, where a score is near a threshold."""
    tolerance = TOLERANCE if device.type == "cpu" else TOLERANCE_ELSEWHERE
    pairs = [(a.float(), b.float()) for a, b in zip(before, after, strict=False) if a.shape == b.shape and a.numel()]
    return all(float((a - b).abs().max()) <= tolerance * max(1.0, float(a.abs().max())) for a, b in pairs)


def _evaluation_error(task: Task, data: TaskData, seed: int) -> Exception | None:
    """What the eval method raises on a few samples of val; None if it works. It gets a copy, which it may change."""
    dataset: Any = data.val.dataset
    labelled = (index for index in range(len(dataset)) if dataset.has_labels(index))
    few = Subset(dataset, list(itertools.islice(labelled, NUM_IMAGES)))
    try:
        with seeded(seed, "layout", task.name):
            evaluate(task, DataLoader(few, NUM_IMAGES, collate_fn=data.val.collate_fn), deep_copy(task.model))
    except Exception as error:  # a user's eval method may raise anything
        return error
    return None
