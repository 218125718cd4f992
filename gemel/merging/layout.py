"""The memory layout of the models: on a CPU convolutions are quicker channels-last, which some models cannot take.

A model that looks at strides (`view` behind a convolution) fails in another layout than the one it was written for, and
so does an eval method that does so with what layers of a model put out. So the layout is first tried on a few images,
in all that a merge runs: a forward pass, the eval method, a step of training. Tied layers are in models of several
tasks: all have one.
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
from gemel.forward.batches import Batch, run
from gemel.forward.modes import deep_copy, device_of, set_layout, to_channels_last
from gemel.merging.check import training_error
from gemel.merging.state import MergeState
from gemel.workload import Task

NUM_IMAGES = 2
TOLERANCE = 1e-3  # of the largest output: rounding differs between layouts

log = logging.getLogger(__name__)


def choose_layout(
    state: MergeState, tasks: Mapping[str, Task], data: Mapping[str, TaskData], seed: int, clock: Clock
) -> None:
    """Lays out all models of the state channels-last, if that is quicker and all of them can be; the first rank tries.

    Raises Interrupted at once, as an eval method may take long; the models are then handed back.
    """
    try:
        with clock.interrupts.immediate():
            if ranks.of_first(lambda: can_be_channels_last(tasks, data, state.unmerged, seed)):
                state.use_channels_last()
    except BaseException:
        state.hand_back()
        raise


def can_be_channels_last(
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    unmerged: Mapping[str, nn.Module] | nn.ModuleDict,
    seed: int,
) -> bool:
    """Whether every model that works as it is also works channels-last: the same outputs, its eval method, training.

    What fails in both layouts is not the layout's fault: it counts as working. The models keep the layout that they
    have.
    """
    for name, task in tasks.items():
        device = device_of(task.model)
        if device.type != "cpu":
            return False  # it is not quicker there
        emit("doing", what=f"trying the memory layout of weights: {name}")
        images = plain_images(data[name], 0, seed, "layout")[0][:NUM_IMAGES]
        before = _outputs(task.model, images)
        if before is None:
            continue  # the checks before the first round report it
        to_channels_last(task.model, device)
        try:
            after = _outputs(task.model, images)
            works = after is not None and _are_close(before, after)
            failed = [raised for raised in ERRORS if raised(task, data[name], unmerged[name], seed) is not None]
        finally:
            set_layout(task.model, torch.contiguous_format)
        if not works or any(raised(task, data[name], unmerged[name], seed) is None for raised in failed):
            log.info("%s: does not run channels-last; all models keep the usual layout", name)
            return False
    return True


def _outputs(model: nn.Module, images: Batch) -> list[Tensor] | None:
    """The tensors that the model puts out; None if it raises anything."""
    try:
        return [leaf for leaf in tree_leaves(run(model, images)) if isinstance(leaf, Tensor)]
    except Exception:  # a user's model may raise anything
        return None


def _are_close(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether outputs agree; a detector's may differ in number, where a score is near a threshold."""
    pairs = [(a.float(), b.float()) for a, b in zip(before, after, strict=False) if a.shape == b.shape and a.numel()]
    return all(float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(a.abs().max())) for a, b in pairs)


def _training_error(task: Task, data: TaskData, unmerged: nn.Module, seed: int) -> Exception | None:
    """What a step of training raises; None if it works."""
    return training_error(task, data, unmerged, seed, NUM_IMAGES)


def _evaluation_error(task: Task, data: TaskData, unmerged: nn.Module, seed: int) -> Exception | None:
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


ERRORS = (_evaluation_error, _training_error)  # of all that a merge runs, beside the forward pass
