"""What a workload file says of its tasks: modules to load into, and the transforms that frames go through."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_pil_image

from gemel.edge.frames import Transform
from gemel.workload import DETECTION, Task, WorkloadError, load_model_dict, read_workload


class Own(NamedTuple):
    """By task."""

    models: Mapping[str, nn.Module]
    transforms: Mapping[str, Transform]


NOTHING_OWN = Own({}, {})


def own_of(workload: str) -> Own:
    """Models and val transforms of a workload file; runs that file. Raises WorkloadError if it is wrong.

    Tasks with one and the same val transform get one transform, which is applied once a frame.
    """
    tasks, problems = read_workload(load_model_dict(workload))
    if problems:
        raise WorkloadError(problems)
    made: dict[tuple[str, int], Transform] = {}
    for task in tasks.values():
        made.setdefault(_identity(task), _transform(task.kind, task.val_transform))
    return Own(
        {name: task.model for name, task in tasks.items()}, {n: made[_identity(task)] for n, task in tasks.items()}
    )


def _identity(task: Task) -> tuple[str, int]:
    return task.kind, id(task.val_transform)


def _transform(kind: str, val: Callable) -> Transform:
    """From a uint8 tensor [3, H, W] as transforms of a dictionary take it: a PIL image, for detectors with a target."""

    def of_classifier(image: Any) -> Tensor:
        return val(to_pil_image(image))

    def of_detector(image: Any) -> Tensor:
        size = tuple(image.shape[-2:])
        boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)  # type: ignore[call-overload]
        return val(to_pil_image(image), {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64), "image_id": 0})[0]

    return of_detector if kind == DETECTION else of_classifier
