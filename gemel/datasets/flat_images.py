"""Whether the train transform scales, normalises and orders colours as the val transform does, tried on flat images.

A model that is judged on normalised images and trained on others loses what it knew, and nothing else would say why.
Flat images keep their colour under crops, flips and turns, but for borders; of several draws the one counts that comes
closest, as an augmentation changes colours more or less.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from gemel.datasets.folders import transform_seed

COLOURS = {"pure red": (255, 0, 0), "pure green": (0, 255, 0), "pure blue": (0, 0, 255), "black": (0, 0, 0)}
NUM_DRAWS = 9
MOST_PIXELS = 512  # of a side
OF_IMAGE = 0.02  # the share of an image that keeps its colour where borders are added
FAR = 0.35  # of the span of values that the val transform gives


class _Colour(NamedTuple):
    name: str
    seen: Tensor  # [C], by the val transform
    trained: Tensor  # [C], what comes closest to it by the train transform
    distance: float


def other_colours(train: Callable, val: Callable, size: tuple[int, int], has_targets: bool) -> str | None:
    """The colour whose values differ most, and what both transforms make of it; None if they differ little.

    size: (width, height) of an image of the task. Nothing is said of transforms that fail on flat images, or that give
    all of them the same values.
    """
    shrink = max(1.0, max(size) / MOST_PIXELS)
    size = (max(1, round(size[0] / shrink)), max(1, round(size[1] / shrink)))
    try:
        found = [_compared(train, val, name, size, has_targets) for name in COLOURS]
    except Exception:  # a user's transform may raise anything, and is tried on real samples elsewhere
        return None
    every = torch.stack([colour.seen for colour in found])
    span = float(every.max() - every.min())
    worst = max(found, key=lambda colour: colour.distance)
    if not worst.distance > FAR * span > 0:
        return None
    return (
        f"{worst.name} becomes {_rounded(worst.trained)} by the train transform and {_rounded(worst.seen)} by the val "
        "transform: models are trained on images that are scaled, normalised or ordered otherwise than those they are "
        "judged on"
    )


def _compared(train: Callable, val: Callable, name: str, size: tuple[int, int], has_targets: bool) -> _Colour:
    seen = next(_images(val, name, size, has_targets)).median(1).values
    draws = (_nearest(image, seen) for image in _images(train, name, size, has_targets))
    distance, trained = min(draws, key=lambda draw: draw[0])
    return _Colour(name, seen, trained, distance)


def _nearest(image: Tensor, values: Tensor) -> tuple[float, Tensor]:
    """How far the pixels of an image [C, N] that come closest to a colour [C] are from it, and one of them [C]."""
    distances = (image - values.unsqueeze(1)).abs().amax(0)
    distance, index = distances.kthvalue(max(1, int(OF_IMAGE * len(distances))))
    return float(distance), image[:, int(index)]


def _images(transform: Callable, name: str, size: tuple[int, int], has_targets: bool) -> Iterator[Tensor]:
    """What the transform makes of a flat image, draw by draw [C, N]."""
    for seed in range(NUM_DRAWS):
        image = Image.new("RGB", size, COLOURS[name])
        with transform_seed(seed):
            pixels = transform(image, _no_objects(size))[0] if has_targets else transform(image)
        yield pixels.as_subclass(Tensor).float().flatten(1)


def _no_objects(size: tuple[int, int]) -> dict:
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size[::-1])  # type: ignore[call-overload]
    return {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64), "image_id": 0}


def _rounded(values: Tensor) -> str:
    return f"({', '.join(f'{value:.3g}' for value in values.tolist())})"
