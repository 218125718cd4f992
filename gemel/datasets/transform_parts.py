"""A transform taken apart: first steps that always do the same, and the rest, where possible on whole batches.

What the first steps make of an image is kept in memory (gemel/datasets/cache.py), so that it is decoded and resized
once. The rest runs on batches (gemel/datasets/batch_transform.py) if all of it is known; any other transform runs image
by image, as it always did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from gemel.datasets.batch_transform import BatchTransform, batch_transform

CONTAINERS = (v2.Compose, v1.Compose, nn.Sequential)
FIXED = (v2.Resize, v2.CenterCrop, v2.Pad, v2.ToImage, v2.PILToTensor)
FIXED_OF_V1 = (v1.Resize, v1.CenterCrop, v1.Pad, v1.PILToTensor)
PIL, IMAGE, TENSOR = "PIL", "image", "tensor"  # what a step is given: a PIL image, a tv_tensors.Image, a plain tensor


@dataclass(frozen=True)
class Decoded:
    """An image of 8-bit RGB as the first steps leave it; form: what the next step is given.

    pixels: uint8 [H, W, 3] of a PIL image, else [3, H, W].
    """

    pixels: Tensor
    form: str
    target: Any  # label of a classifier; boxes, labels and more of a detector

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        target = self.target.values() if isinstance(self.target, dict) else ()
        return self.pixels.nbytes + sum(value.nbytes for value in target if torch.is_tensor(value))

    def image(self) -> Any:
        """The image in its form; the caller may change it."""
        if self.form == PIL:
            return Image.fromarray(self.pixels.numpy())
        image = self.pixels.clone()
        return tv_tensors.Image(image) if self.form == IMAGE else image

    def own_target(self) -> Any:
        """The target; the caller may change it."""
        if not isinstance(self.target, dict):
            return self.target
        return {key: value.clone() if torch.is_tensor(value) else value for key, value in self.target.items()}


@dataclass(frozen=True)
class TransformParts:
    """first: steps that are not random and leave 8-bit RGB. rest: the steps behind them.

    batch: what the rest does, for whole batches, where `first` leaves tensors; None where a step of it is not known.
    """

    first: tuple[Callable, ...]
    rest: tuple[Callable, ...]
    batch: BatchTransform | None


def decoded(image: Any, target: Any) -> Decoded:
    """What first steps left of an image, ready to be kept."""
    if isinstance(image, Image.Image):
        return Decoded(torch.from_numpy(np.array(image)), PIL, target)
    form = IMAGE if isinstance(image, tv_tensors.Image) else TENSOR
    return Decoded(image.as_subclass(Tensor).contiguous(), form, target)


def apply(steps: Sequence[Callable], *inputs: Any) -> Any:
    """What the steps make of an image, or of (image, target), one behind the other, as v2.Compose calls them."""
    outputs = inputs if len(inputs) > 1 else inputs[0]
    for step in steps:
        outputs = step(*inputs)
        inputs = outputs if len(inputs) > 1 else (outputs,)
    return outputs


def describe(value: object) -> str:
    """The type and shape of a value, for messages."""
    if torch.is_tensor(value):
        return f"a {value.dtype} tensor {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(repr, value)) or 'no keys'}"
    return f"an object of type {type(value).__name__}"


def parts_of(transform: Callable, has_boxes: bool) -> TransformParts:
    """Takes a transform apart; a callable that is not known is all rest. has_boxes: whether it is a detector's."""
    steps = _steps(transform, has_boxes)
    count = 0
    while count < len(steps) and _is_fixed(steps[count]):
        count += 1
    first, rest = steps[:count], steps[count:]
    is_tensor = any(isinstance(step, (v2.ToImage, v2.PILToTensor, v1.PILToTensor)) for step in first)
    batch = batch_transform(rest, has_boxes, is_tensor)
    if batch is not None and not is_tensor:
        first = (*first, v2.ToImage())
    return TransformParts(first, rest, batch)


def _steps(transform: Callable, has_boxes: bool) -> tuple[Callable, ...]:
    """The steps of containers, and of containers in them; v1.Compose and nn.Sequential pass no boxes on."""
    containers = (v2.Compose,) if has_boxes else CONTAINERS
    if type(transform) not in containers:
        return (transform,)
    inner: Any = transform.transforms if hasattr(transform, "transforms") else transform
    return tuple(step for part in inner for step in _steps(part, has_boxes))


def _is_fixed(step: Any) -> bool:
    if type(step) is v2.ToDtype:
        return step.dtype == torch.uint8 and step.scale
    return type(step) in (*FIXED, *FIXED_OF_V1)
