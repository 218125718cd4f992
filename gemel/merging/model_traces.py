"""Traces of the live models on one image: what tasks that may see the same frames would compute alike.

A trace compares tensors by what stands for them. Content stands for most; for layers that could become equal, such as
normalisation that could be shared, something else does, so that the trace shows what would be alike if they were.
"""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from gemel.datasets.folders import load_image
from gemel.forward.trace import Labels, Trace, trace
from gemel.sharing.computation import common_points
from gemel.sharing.groups import Occurrence
from gemel.trials.evaluator import Evaluator
from gemel.trials.state import MergeState
from gemel.workload import CLASSIFICATION, Task

log = logging.getLogger(__name__)

StandIn = Callable[[Occurrence], Hashable | None]  # what stands for a layer's tensors; None: their content


class ModelTraces:
    """Traces the models of the state on an image of the first task, as each task's val transform gives it."""

    def __init__(self, state: MergeState, evaluator: Evaluator):
        self.state, self.evaluator = state, evaluator
        self.tasks: Mapping[str, Task] = evaluator.tasks

    def of(self, names: Sequence[str], stands_for: StandIn) -> dict[str, Trace]:
        """The traces of these tasks' models; without those that cannot be traced, with a warning for each."""
        found = {}
        for name in names:
            model = self.state.models[name]
            image = _input(self.tasks[name], self._image).to(self.state.device)
            images: Any = torch.stack([image] * 2) if self.tasks[name].kind == CLASSIFICATION else [image] * 2
            try:
                found[name] = trace(model, images, _labels(name, stands_for))
            except Exception as error:  # a user's model may raise anything
                log.warning("%s: shares no normalisation: its layers cannot be followed: %s", name, error)
        return found

    @cached_property
    def _image(self) -> Image.Image:
        dataset: Any = self.evaluator.data[next(iter(self.tasks))].val.dataset
        return load_image(dataset.samples[0][0])


def common_layers(
    traces: Mapping[str, Trace], tasks: Sequence[str], wanted: Callable[[Occurrence], bool]
) -> list[tuple[Occurrence, ...]]:
    """The wanted layers of the longest prefix that all these tasks have in common, from the first one on.

    One tuple per layer: its occurrence in each task, as far as it is wanted there. Empty if a task has no trace.
    """
    if not set(tasks) <= set(traces):
        return []
    first, others = traces[tasks[0]], [traces[task] for task in tasks[1:]]
    common = [p for p in first.points if all(any(p is q for q in common_points(first, o)) for o in others)]
    if not common:
        return []
    found, inside = [], tuple(f"{name}." for name in common[-1].skipped)

    def first_wanted(task: str, names: Sequence[str]) -> list[Occurrence]:
        return [o for name in names if wanted(o := Occurrence(task, name))][:1]

    for number, names in first.outputs.items():
        own = first_wanted(tasks[0], [name for name in names if f"{name}.".startswith(inside)])
        if own:
            alike = (first_wanted(t, o.outputs.get(number, ())) for t, o in zip(tasks[1:], others, strict=True))
            found.append((*own, *(o for one in alike for o in one)))
    return found


def _labels(task: str, stands_for: StandIn) -> Labels:
    def label(name: str, tensor: Tensor) -> Hashable:
        layer, _, key = name.rpartition(".")
        shape = (tensor.dtype, tuple(tensor.shape))
        if (stand_in := stands_for(Occurrence(task, layer))) is not None:
            return stand_in, key, *shape
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return *shape, sha256(values.numpy().tobytes()).hexdigest()

    return label


def _input(task: Task, image: Image.Image) -> Tensor:
    """What the task's val transform makes of an image."""
    if task.kind == CLASSIFICATION:
        return task.val_transform(image)
    size = (image.height, image.width)
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)  # type: ignore[call-overload]
    return task.val_transform(image, {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64), "image_id": 0})[0]
