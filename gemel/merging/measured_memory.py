"""What activations, fits and samples of a task take in memory, measured on a few of its images."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gemel.datasets.loaders import MAX_PLAIN_IMAGES, TaskData, batch_size_of, num_samples
from gemel.environment.seeds import seeded
from gemel.fitting.memory import LiveBytes, footprint_of
from gemel.fitting.rows import is_linear_map, linear_map_at, shape_of
from gemel.forward.modes import Models
from gemel.merging.images import ImageSampler
from gemel.merging.options import MergeOptions
from gemel.merging.state import MergeState
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.thresholds import THRESHOLDS
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.workload import Task

MEASURED_IMAGES = 2  # of a batch: activations of the others take as much
NUM_MOMENTS = 2  # that AdamW keeps of each parameter
ROW_BYTES = 4  # float32

log = logging.getLogger(__name__)


def bytes_of_training(models: Models, distinct_share: float, activations: int) -> dict[str, int]:
    """What -> bytes that a round which trains these models takes beside them.

    distinct_share: of the models' bytes, that are left once a trial has tied what it ties. activations: of one task at
    a time.
    """
    trained = {p: p.nbytes for model in models.values() for p in model.parameters() if p.requires_grad}
    num_bytes = int(distinct_share * sum(trained.values()))
    return {
        "average of weights": int(distinct_share * distinct_bytes(models)),
        "optimizer state": NUM_MOMENTS * num_bytes,
        "gradients": num_bytes,
        "activations of a batch": activations,
    }


def bytes_of_activations(task: Task, data: TaskData, state: MergeState, options: MergeOptions) -> int:
    """Bytes that live after the forward pass of one training batch; 0, with a warning, where it cannot be run."""
    snapshot, teacher = take_snapshot(task.model), None
    if options.training.teaches or not task.labels:
        teacher = Teacher(task.model, state.unmerged[task.name], [])
    size = min(batch_size_of(data.train), num_samples(data.train))
    count = min(MEASURED_IMAGES, size)
    try:
        with seeded(options.seed, "memory", task.name):
            batch = data.train.collate_fn([data.train.dataset[i] for i in range(count)])
            task.model.train()
            known = [tensor for model in (task.model, state.unmerged[task.name]) for tensor in _tensors(model)]
            with LiveBytes(known) as alive:
                task_losses(task, batch, state.device, teacher)
        return alive.peak * size // count
    except Exception as error:  # a user's model may raise anything
        log.warning("%s: memory of its activations is not known: %s: %s", task.name, type(error).__name__, error)
        return 0
    finally:
        restore_snapshot(snapshot)
        if teacher is not None:
            teacher.close()


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def bytes_of_fits(
    tasks: Mapping[str, Task], data: Mapping[str, TaskData], state: MergeState, images: ImageSampler
) -> dict[str, int]:
    """Task -> bytes that its part of a fit takes beside the models, unless `fit_memory` bounds it.

    Images of all tasks, the unmerged models' outputs at drawn positions, passes that wait with all their images in
    flight, and the normal equations of the largest layer in every task.
    """
    found = {}
    for name in tasks:
        batch, model = images.few_of(name, "memory"), state.unmerged[name]
        wanted = THRESHOLDS.fit.more_images * THRESHOLDS.fit.pixels // batch[0][0].numel()
        count = min(MAX_PLAIN_IMAGES, num_samples(data[name].plain), max(wanted, batch_size_of(data[name].plain)))
        layers = [linear_map_at(model, key) for key, module in model.named_modules() if is_linear_map(module)]
        shapes = [shape_of(layer) for layer in layers]
        outputs = sum(groups * width for groups, _, width in shapes) * THRESHOLDS.fit.positions
        equations = max((groups * inputs * (inputs + width) for groups, inputs, width in shapes), default=0)
        in_flight = footprint_of(model, [], batch).peak * count
        found[name] = int(in_flight + batch[0].nbytes * count + ROW_BYTES * (outputs + equations))
    return found


def bytes_of_samples(data: TaskData, limit: int) -> int:
    """Bytes of samples that stay in memory, of val and of train without augmentation, each half of the limit."""
    found = 0
    for loader in (data.val, data.plain):
        dataset: Any = loader.dataset
        sample = sum(leaf.nbytes for leaf in tree_leaves(dataset[0]) if torch.is_tensor(leaf))
        found += min(limit // 2, sample * len(dataset))
    return found
