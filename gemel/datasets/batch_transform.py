"""Augmentation of whole batches of 8-bit images, on the device that they are on; every image has its own draws.

What torchvision does image by image, with the same distributions, in a fraction of the time: most of that goes into
calling each step for each image. Colours are changed in float, without rounding to 8 bits between steps. All draws
come from one generator on the CPU, seeded for the batch, so they are the same wherever the images are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

GRAY = (0.2989, 0.587, 0.114)  # as torchvision and ITU-R 601-2
TRIES = 10  # of a random crop, as torchvision
CHUNK_BYTES = 1 << 20  # of images whose colours are changed at a time on a CPU: they stay in its cache
INTERPOLATIONS = {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC, "bilinear", "bicubic"}


@dataclass
class Images:
    """Images of a batch, each uint8 or float [3, H, W], and the targets of a detector. draws: random numbers."""

    pixels: Tensor | list[Tensor]  # one tensor where all images have one size
    targets: list[dict] | None
    draws: torch.Generator

    def __len__(self) -> int:
        return len(self.pixels)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies what works on [..., 3, H, W] to all images."""
        given = self.stacked()
        self.pixels = function(given) if torch.is_tensor(given) else [function(image) for image in given]

    def rand(self, *size: int) -> Tensor:
        """Uniform in [0, 1): [N, *size], on the CPU."""
        return torch.rand(len(self), *size, generator=self.draws)

    def stacked(self) -> Tensor | list[Tensor]:
        """The images, as one tensor if they have one size; their memory belongs to this batch."""
        if isinstance(self.pixels, list):
            one_size = len({image.shape for image in self.pixels}) == 1
            contiguous = [image.contiguous() for image in self.pixels]
            self.pixels = torch.stack(contiguous) if one_size else contiguous
        return self.pixels


Step = Callable[[Images], None]


@dataclass(frozen=True)
class BatchTransform:
    """Steps over a batch, and whether any of them draws random numbers."""

    steps: tuple[Step, ...]
    is_random: bool

    def __call__(self, pixels: Sequence[Tensor], targets: list[dict] | None, seed: int) -> Tensor | list[Tensor]:
        """Float images [3, H, W]; targets, of a detector, are changed. pixels: uint8 [3, H, W] each, on one device."""
        draws = torch.Generator().manual_seed(seed)
        images = Images(list(pixels), targets, draws)
        for step in self.steps:
            step(images)
        return images.stacked()


def batch_transform(steps: Sequence[Any], has_boxes: bool, is_tensor: bool) -> BatchTransform | None:
    """What the steps do, for whole batches; None if one of them is not known here or they do not end in floats.

    is_tensor: whether the first of them is given a tensor (else a PIL image, which is always resized smoothly).
    """
    found: list[Step] = []
    is_float = is_random = False
    for step in steps:
        kind = type(step)
        own: Step | None = None
        if has_boxes and not kind.__module__.startswith(v2.__name__):
            return None  # others pass no boxes on
        if kind in TO_TENSOR:
            is_tensor = True
            continue
        if kind in TO_FLOAT and _makes_floats(step):
            is_float, own = True, ToFloat(step)
        elif kind is v2.ToPureTensor and not has_boxes:
            continue
        elif kind in (v2.Normalize, v1.Normalize):
            own = Normalise(list(step.mean), list(step.std))
        elif kind in RANDOM:
            is_random, own = True, RANDOM[kind](step, has_boxes, is_tensor)
        elif kind is v2.Resize and has_boxes:
            own = ResizeWithBoxes(step)
        if own is None:
            return None
        is_tensor = is_tensor or kind in TO_FLOAT
        found.append(own)
    return BatchTransform(tuple(found), is_random) if is_float else None


def _makes_floats(step: Any) -> bool:
    """Whether a conversion divides by 255 and gives float32."""
    if isinstance(step, v2.ToDtype):
        return step.dtype == torch.float32 and step.scale
    return getattr(step, "dtype", torch.float32) == torch.float32


# ---- steps that draw nothing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalise:
    """Subtracts the mean and divides by the standard deviation of each channel, in place."""

    mean: list[float]
    std: list[float]

    def __call__(self, images: Images) -> None:
        images.change(lambda pixels: functional.normalize_image(pixels, self.mean, self.std, inplace=True))


@dataclass(frozen=True)
class ToFloat:
    """8-bit values to float32 in [0, 1], in the arithmetic of the given transform."""

    transform: Any

    def __call__(self, images: Images) -> None:
        images.change(self._convert)

    def _convert(self, pixels: Tensor) -> Tensor:
        if pixels.is_floating_point():
            return pixels
        if type(self.transform) in (v1.ToTensor, v2.ToTensor):
            return pixels.float().div(255)
        return self.transform(pixels)


@dataclass(frozen=True)
class ResizeWithBoxes:
    """Resizes images and their boxes."""

    transform: v2.Resize

    def __call__(self, images: Images) -> None:
        assert images.targets is not None
        resized = []
        for number, image in enumerate(images.pixels):
            image, images.targets[number] = self.transform(tv_tensors.Image(image), images.targets[number])
            resized.append(image.as_subclass(Tensor))
        images.pixels = resized


# ---- steps that draw -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flip:
    """Flips each image with a probability; dimension: -1 left and right, -2 top and bottom."""

    probability: float
    dimension: int

    def __call__(self, images: Images) -> None:
        chosen = (images.rand() < self.probability).nonzero().flatten().tolist()
        if not chosen:
            return
        pixels = images.stacked()
        if isinstance(pixels, list):
            for number in chosen:
                pixels[number] = pixels[number].flip(self.dimension)
        else:
            pixels[chosen] = pixels[chosen].flip(self.dimension)
        flip = functional.horizontal_flip if self.dimension == -1 else functional.vertical_flip
        for number in chosen if images.targets is not None else ():
            images.targets[number]["boxes"] = flip(images.targets[number]["boxes"])  # type: ignore[index]


@dataclass(frozen=True)
class Crop:
    """A random part of each image, resized to (height, width).

    Source of the draws: torchvision's RandomResizedCrop; Szegedy et al., "Going deeper with convolutions", CVPR 2015.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: Any
    antialias: bool

    def __call__(self, images: Images) -> None:
        shares, places = images.rand(TRIES, 2).tolist(), images.rand(2).tolist()
        cropped = []
        for image, share, place in zip(images.pixels, shares, places, strict=True):
            box = self.box(image.shape[-2], image.shape[-1], share, place)
            cropped.append(functional.resized_crop_image(image, *box, [*self.size], self.interpolation, self.antialias))
        images.pixels = cropped

    def box(
        self, height: int, width: int, shares: Sequence[Sequence[float]], place: Sequence[float]
    ) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop from uniform numbers in [0, 1)."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for of_area, of_ratio in shares:
            area = height * width * (self.scale[0] + of_area * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + of_ratio * (high - low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w
        w, h = width, height  # as much as the range of the aspect ratio allows, in the middle
        if width / height < self.ratio[0]:
            h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(height * self.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class Jitter:
    """Changes brightness, contrast and saturation of each image, in a random order, as torchvision's ColorJitter.

    ranges: of the three factors. Every change is a blend, limited to [0, 1]: with black, with the mean grey of the
    image, with its grey picture.
    """

    ranges: tuple[tuple[float, float], ...]

    def __call__(self, images: Images) -> None:
        low, high = torch.tensor(self.ranges).T
        factors = low + images.rand(3) * (high - low)
        order = images.rand(3).argsort(1)  # [N, place] -> which change
        pixels = images.stacked()
        if isinstance(pixels, list):
            rows = zip(pixels, factors.split(1), order.split(1), strict=True)
            images.pixels = [_blended(image[None], *row)[0] for image, *row in rows]
            return
        size = max(1, CHUNK_BYTES // (4 * pixels[0].numel())) if pixels.device.type == "cpu" else len(images)
        parts = zip(pixels.split(size), factors.split(size), order.split(size), strict=True)
        images.pixels = torch.cat([_blended(*part) for part in parts])


def _blended(pixels: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """The three changes of Jitter; pixels [N, 3, H, W], factors and order [N, 3]."""
    if not pixels.is_floating_point():
        pixels = pixels.float().mul_(1 / 255)
    arranged = factors.gather(1, order)
    for place in range(3):
        change, ratio = order[:, place], arranged[:, place].to(pixels.device).view(-1, 1, 1, 1)
        of_mean, of_grey = ((change == kind).float().to(pixels.device).view(-1, 1, 1, 1) for kind in (1, 2))
        red, green, blue = pixels.unbind(1)
        grey = red.mul(GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2]).unsqueeze(1)
        other = grey.mean((1, 2, 3), keepdim=True) * of_mean + grey * of_grey
        pixels = torch.lerp(other, pixels, ratio).clamp_(0, 1)
    return pixels


def _flip(dimension: int) -> Callable:
    return lambda step, has_boxes, is_tensor: Flip(step.p, dimension)


def _crop(step: Any, has_boxes: bool, is_tensor: bool) -> Crop | None:
    if has_boxes or step.interpolation not in INTERPOLATIONS:
        return None
    smooth = step.antialias if is_tensor else True
    return Crop(tuple(step.size), tuple(step.scale), tuple(step.ratio), step.interpolation, bool(smooth))


def _jitter(step: Any, has_boxes: bool, is_tensor: bool) -> Jitter | None:
    if step.hue is not None:
        return None
    ranges = (step.brightness, step.contrast, step.saturation)
    return Jitter(tuple((1.0, 1.0) if given is None else tuple(given) for given in ranges))


TO_TENSOR = (v2.ToImage, v2.PILToTensor, v1.PILToTensor)
TO_FLOAT = (v2.ToDtype, v2.ConvertImageDtype, v2.ToTensor, v1.ConvertImageDtype, v1.ToTensor)
RANDOM: dict[type, Callable[[Any, bool, bool], Step | None]] = {
    v2.RandomHorizontalFlip: _flip(-1),
    v1.RandomHorizontalFlip: _flip(-1),
    v2.RandomVerticalFlip: _flip(-2),
    v1.RandomVerticalFlip: _flip(-2),
    v2.RandomResizedCrop: _crop,
    v1.RandomResizedCrop: _crop,
    v2.ColorJitter: _jitter,
    v1.ColorJitter: _jitter,
}
