"""Whether a detection transform moves boxes with the image, tried on images with one bright, marked object.

A transform that flips or resizes the image alone, or returns boxes as x, y, width, height or as shares of the image,
yields valid targets with the objects elsewhere: nothing else would notice.
"""

from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_iou

from gemel.datasets.folders import transform_seed

NUM_DRAWS = 16
OBJECT = (0.10, 0.55, 0.40, 0.85)  # left, top, right, bottom, in shares: a flip or another format moves it clearly
DARK, BRIGHT = (40, 50, 60), (220, 210, 200)
MIN_OVERLAP = 0.5  # intersection over union of the region of the object and its box, for a box that belongs to it
MIN_FILLED = 0.6  # or so much of the box is bright: an augmentation may put something bright elsewhere
MIN_CONTRAST = 1e-3
MIN_SHARE = 0.2  # of the draws: an augmentation may hide the object now and then


def misplaced(transform: Callable, size: tuple[int, int], label: int) -> str | None:
    """What is wrong with where the transform leaves a box, in words; None if nothing was found.

    size: (width, height) of the image; label: of the object. A draw in which the transform drops the object, hides it
    or raises says nothing.
    """
    drawn = list(_draws(transform, size, label))
    wrong = [(bright, box) for bright, box in drawn if not _belongs(bright, box)]
    if len(wrong) < max(2, MIN_SHARE * len(drawn)):
        return None
    bright, box = wrong[0]
    return (
        f"a box that is not where its object is, in {len(wrong)} of {len(drawn)} tries with one marked object: it lies "
        f"in {_rounded(_region(bright))} of the transformed image, and its box is {_rounded(box)}"
    )


def _draws(transform: Callable, size: tuple[int, int], label: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(where the image is bright, the object's box) of every draw that says something."""
    width, height = size
    x1, y1, x2, y2 = (round(share * side) for share, side in zip(OBJECT, (*size, *size), strict=True))
    for seed in range(NUM_DRAWS):
        image = Image.new("RGB", size, DARK)
        image.paste(BRIGHT, (x1, y1, x2, y2))
        corners = torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32)
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
        target = {"boxes": boxes, "labels": torch.tensor([label]), "image_id": 0}
        try:
            with transform_seed(seed):
                pixels, after = transform(image, target)
            found = after["boxes"].as_subclass(Tensor).float().reshape(-1, 4)
            bright = _bright(pixels.as_subclass(Tensor).float())
        except Exception:  # a user's transform may raise anything, and is tried on real samples elsewhere
            continue
        if len(found) == 1 and bright is not None:
            yield bright, found[0]


def _bright(image: Tensor) -> Tensor | None:
    """Which pixels [H, W] are brighter than the middle of an image [C, H, W]; None if all of it is much the same."""
    grey = image.mean(0)
    low, high = grey.min(), grey.max()
    if not torch.isfinite(grey).all() or high - low < MIN_CONTRAST * max(1.0, float(high.abs())):
        return None
    return grey > (low + high) / 2


def _belongs(bright: Tensor, box: Tensor) -> bool:
    """Whether the box is around what is bright, or, in an inverted image, dark."""
    if any(float(box_iou(_region(mask)[None], box[None])) >= MIN_OVERLAP for mask in (bright, ~bright)):
        return True
    x1, y1, x2, y2 = box.round().long().clamp(min=0).tolist()
    inside = bright[y1:y2, x1:x2]
    return inside.numel() > 0 and float(inside.float().mean()) >= MIN_FILLED


def _region(mask: Tensor) -> Tensor:
    """The corners of the box around the pixels of a mask [H, W], of which there are some."""
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def _rounded(box: Tensor) -> str:
    return f"({', '.join(f'{value:.3g}' for value in box.tolist())})"
