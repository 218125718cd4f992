"""Train and val transforms for the task dictionary; any transforms with the same arguments and results can be used."""

from collections.abc import Callable, Sequence

import torch
from torchvision.transforms import InterpolationMode, v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def classification_transforms(
    size: int | Sequence[int],
    *,
    scale: tuple[float, float] = (0.6, 1.0),
    jitter: float = 0.2,
    flip: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> dict[str, Callable]:
    """PIL image -> normalised float32 tensor [3, H, W]; "train" also crops, jitters colours and flips.

    size: pixels, one number for a square or (H, W); "val" resizes the whole image to it. scale: range of the share of
    the area that a training crop keeps. jitter: of brightness, contrast and saturation. flip: probability, 0 if left
    and right matter (traffic signs). mean, std: per channel.
    """
    size = _pair(size)
    finish = [*_to_float(), v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]
    augment = [
        v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BILINEAR),
        v2.ColorJitter(jitter, jitter, jitter),
        v2.RandomHorizontalFlip(flip),
    ]
    return {"train": v2.Compose([*augment, *finish]), "val": v2.Compose([v2.Resize(size), *finish])}


def detection_transforms(
    size: int | Sequence[int] | None = None, *, jitter: float = 0.0, flip: float = 0.5, crop: bool = False
) -> dict[str, Callable]:
    """(PIL image, target) -> (float32 tensor [3, H, W] in [0, 1], target); boxes are transformed with the image.

    size, jitter, flip: as above; size None keeps the size of every image, as torchvision's detectors resize themselves.
    crop: "train" also takes random crops (as for SSD) and drops objects outside of them.
    """
    resize = [] if size is None else [v2.Resize(_pair(size))]
    crops = [v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()] if crop else []
    augment = [v2.RandomHorizontalFlip(flip)] + ([v2.ColorJitter(jitter, jitter, jitter)] if jitter else [])
    return {
        "train": v2.Compose([*crops, *augment, *resize, *_to_float()]),
        "val": v2.Compose([*resize, *_to_float()]),
    }


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _to_float() -> list[Callable]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
