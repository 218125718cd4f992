"""What activations, fits and samples of a task take in memory, measured on a few of its images."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gemel.datasets.loaders import MAX_PLAIN_IMAGES, TaskData, batch_size_of, num_samples
from gemel.environment.seeds import seeded
from gemel.fitting.memory import (
    FEWEST_IMAGES,
    IN_FLIGHT_SHARE,
    ROWS_SHARE,
    SAMPLES_SHARE,
    FitMemory,
    LiveBytes,
    footprint_of,
)
from gemel.fitting.rows import is_linear_map, linear_map_at, shape_of
from gemel.forward.modes import Models
from gemel.options import MergeOptions
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.thresholds import THRESHOLDS
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.trials.images import ImageSampler
from gemel.trials.state import MergeState
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


class FitWork(NamedTuple):
    """Bytes of one task's part of a fit, if nothing bounded them."""

    waiting: int  # passes that wait, with all their images in flight
    moving: int  # one pass that runs
    backward: int  # a forward and a backward pass of the fewest images
    samples: int  # images, and the unmerged model's outputs at drawn positions
    equations: int  # the normal equations of the largest layer


def work_of_fits(
    tasks: Mapping[str, Task], data: Mapping[str, TaskData], state: MergeState, images: ImageSampler
) -> dict[str, FitWork]:
    """What each task takes in a fit; less where there are few or small images."""
    found = {}
    for name in tasks:
        batch, model = images.few_of(name, "memory"), state.unmerged[name]
        size = batch_size_of(data[name].plain)
        wanted = THRESHOLDS.fit.more_images * THRESHOLDS.fit.pixels // batch[0][0].numel()
        count = min(MAX_PLAIN_IMAGES, num_samples(data[name].plain), max(wanted, size))
        layers = {key: linear_map_at(model, key) for key, module in model.named_modules() if is_linear_map(module)}
        shapes = [shape_of(layer) for layer in layers.values()]
        outputs = sum(groups * width for groups, _, width in shapes) * THRESHOLDS.fit.positions
        equations = max((groups * inputs * (inputs + width) for groups, inputs, width in shapes), default=0)
        footprint = footprint_of(model, layers, batch)
        waiting = max((layer.waiting for layer in footprint.layers.values()), default=0.0)
        found[name] = FitWork(
            waiting=int(waiting * count),
            moving=int(footprint.peak * min(size, count)),
            backward=int(FEWEST_IMAGES * (footprint.total + footprint.peak)),
            samples=batch[0].nbytes * count + ROW_BYTES * outputs,
            equations=ROW_BYTES * equations,
        )
    return found


def bytes_of_fit(work: Sequence[FitWork], memory: FitMemory) -> int:
    """Bytes of a fit of these tasks within its memory (gemel/fitting/memory.py); samples beyond that go to a file.

    With what the allocator leaves unused between tensors that come and go, which has a share of that memory as well.
    """
    waiting = sum(one.waiting for one in work) + max((one.moving for one in work), default=0)
    in_flight = max(min(waiting, memory.in_flight), *(one.backward for one in work), 0)
    samples, equations = sum(one.samples for one in work), sum(one.equations for one in work)
    limited = in_flight + min(samples, memory.samples) + min(equations, memory.rows)
    return int(limited / (IN_FLIGHT_SHARE + SAMPLES_SHARE + ROWS_SHARE))


def bytes_of_samples(data: TaskData, limit: int) -> int:
    """Bytes of samples that stay in memory, of val and of train without augmentation, each half of the limit."""
    found = 0
    for loader in (data.val, data.plain):
        dataset: Any = loader.dataset
        sample = sum(leaf.nbytes for leaf in tree_leaves(dataset[0]) if torch.is_tensor(leaf))
        found += min(limit // 2, sample * len(dataset))
    return found
