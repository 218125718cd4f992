"""The memory layout of the models: on a CPU convolutions are quicker channels-last, which some models cannot take.

A model whose forward pass looks at strides (`view` behind a convolution) fails in another layout than the one it was
written for. So the layout is tried on a few images first. Tied layers are in models of several tasks: all have one.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gemel.datasets.loaders import TaskData, plain_images
from gemel.forward.batches import Batch, run
from gemel.forward.modes import device_of, set_layout, to_channels_last
from gemel.merging.check import training_error
from gemel.workload import Task

NUM_IMAGES = 2
TOLERANCE = 1e-3  # of the largest output: rounding differs between layouts

log = logging.getLogger(__name__)


def can_be_channels_last(
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    unmerged: Mapping[str, nn.Module] | nn.ModuleDict,
    seed: int,
) -> bool:
    """Whether every model that works as it is also works channels-last: the same outputs, and a step of training.

    The models keep the layout that they have.
    """
    for name, task in tasks.items():
        device = device_of(task.model)
        if device.type != "cpu":
            return False  # it is not quicker there
        images = plain_images(data[name], 0, seed, "layout")[0][:NUM_IMAGES]
        before = _outputs(task.model, images)
        if before is None:
            continue  # the checks before the first round report it
        to_channels_last(task.model, device)
        try:
            after = _outputs(task.model, images)
            error = training_error(task, data[name], unmerged[name], seed, NUM_IMAGES)
            same = after is not None and _are_close(before, after)
        finally:
            set_layout(task.model, torch.contiguous_format)
        if not same or (
            error is not None and training_error(task, data[name], unmerged[name], seed, NUM_IMAGES) is None
        ):
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
