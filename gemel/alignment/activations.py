"""Inputs and outputs of the layers of two models on the same images, and their correlation channel by channel.

Tasks have different datasets, so both models run on the images of both tasks, each image as the model's own loader
would give it: resized for classifiers, in a list for detectors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemel.forward.batches import Batch, run
from gemel.forward.hooks import hooked

INPUT, OUTPUT = "input", "output"
MAX_POSITIONS = 7  # feature maps are averaged down to at most 7 x 7 positions before they are compared
EPSILON = 1e-8


@dataclass
class Moments:
    """Running sums over the common positions of two layers' feature maps, for each pair of their channels."""

    count: int = 0
    sums: list[Tensor] = field(default_factory=list)  # x, y, x^2, y^2, x y^T

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y: [channels, positions]."""
        x, y = x.float(), y.float()
        new = [x.sum(1), y.sum(1), x.square().sum(1), y.square().sum(1), x @ y.T]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.count += x.shape[1]

    def covariance(self) -> Tensor:
        x, y, _, _, xy = self.sums
        return xy / self.count - torch.outer(x, y) / self.count**2

    def correlation(self) -> Tensor:
        """[channels of x, channels of y], in [-1, 1]; 0 for constant channels."""
        x, y, xx, yy, _ = self.sums
        variances = [(b / self.count - (a / self.count).square()).clamp_min(0) for a, b in ((x, xx), (y, yy))]
        scale = torch.outer(*(v.sqrt() for v in variances))
        return torch.where(scale > EPSILON, self.covariance() / scale.clamp_min(EPSILON), 0)


def adapt_images(batch: Batch, own: Batch) -> Batch:
    """The images of a batch in the form in which a task gets its own, of which `own` is a batch.

    Resized to the size of `own` where that is a tensor. Where the pixels of only one of the two lie in [0, 1], one was
    normalised by its transform and the other was not: the images then get the pixel mean and deviation of `own`.
    """
    images = list(batch)
    if has_unit_range(batch) != has_unit_range(own):
        images = [_renormalised(image, batch, own) for image in images]
    if not torch.is_tensor(own):
        return images
    size = own.shape[-2:]
    if all(image.shape[-2:] == size for image in images):
        return torch.stack(images)
    return torch.cat([F.interpolate(i[None], size=size, mode="bilinear", antialias=True) for i in images])


def has_unit_range(batch: Batch) -> bool:
    """Whether all pixels lie in [0, 1]."""
    return all(float(image.min()) >= 0 and float(image.max()) <= 1 for image in batch)


def _renormalised(image: Tensor, batch: Batch, own: Batch) -> Tensor:
    (mean, std), (own_mean, own_std) = _statistics(batch), _statistics(own)
    return (image - mean) / std * own_std + own_mean


def _statistics(batch: Batch) -> tuple[Tensor, Tensor]:
    pixels = torch.cat([image.flatten(1) for image in batch], 1)
    return pixels.mean(1)[:, None, None], pixels.std(1).clamp_min(EPSILON)[:, None, None]


def record_activations(model: nn.Module, layers: Collection[str], batch: Batch) -> dict[tuple[str, str], list[Tensor]]:
    """(layer, INPUT or OUTPUT) -> its value in each call of the layer, [channels, N, height, width], in eval mode."""
    found: dict[tuple[str, str], list[Tensor]] = {}

    def record(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        for side, value in ((INPUT, inputs[0] if inputs else None), (OUTPUT, output)):
            if isinstance(value, Tensor) and value.ndim >= 2:
                found.setdefault((name, side), []).append(_by_channel(module, value))

    with hooked(model, layers, record):
        run(model, batch)
    return found


def _by_channel(module: nn.Module, value: Tensor) -> Tensor:
    """The value as [channels, N, height, width]; channels are the last axis of a linear layer, else axis 1."""
    value = value.detach()
    if isinstance(module, nn.Linear):
        return value.movedim(-1, 0).flatten(2)[..., None] if value.ndim > 2 else value.T[..., None, None]
    value = value.movedim(1, 0)
    return value if value.ndim == 4 else value.flatten(2)[..., None] if value.ndim > 2 else value[..., None, None]


def at_common_positions(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both as [channels, positions] at the same positions, or None if they were not computed on the same images."""
    if one.shape[1] != other.shape[1]:
        return None
    height, width = (min(a, b, MAX_POSITIONS) for a, b in zip(one.shape[2:], other.shape[2:], strict=True))
    return _averaged(one, (height, width)).flatten(1), _averaged(other, (height, width)).flatten(1)


def _averaged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)


def compare(
    models: tuple[nn.Module, nn.Module],
    pairs: Collection[tuple[str, str]],
    batches: tuple[Sequence[Batch], Sequence[Batch]],
    sides: Collection[str] = (INPUT, OUTPUT),
) -> Mapping[tuple[str, str, str], Moments]:
    """(layer of the first model, layer of the second, side) -> moments over the images of both tasks.

    pairs: layers to compare. batches: images of the first and of the second model's task.
    """
    moments: dict[tuple[str, str, str], Moments] = {}
    layers = [sorted({pair[i] for pair in pairs}) for i in (0, 1)]
    for batch in (*batches[0], *batches[1]):
        first, second = (record_activations(models[i], layers[i], adapt_images(batch, batches[i][0])) for i in (0, 1))
        for one, other in pairs:
            for side in sides:
                calls = zip(first.get((one, side), ()), second.get((other, side), ()), strict=False)
                for found in filter(None, (at_common_positions(a, b) for a, b in calls)):
                    moments.setdefault((one, other, side), Moments()).add(*found)
    return moments
