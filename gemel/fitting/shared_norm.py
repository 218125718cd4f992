"""One normalisation for several tasks, in closed form and without labels.

In evaluation, batch normalisation is one scale and one shift per channel. The shared ones are those with which the
outputs come closest, by least squares over images of all tasks, to what each task's own normalisation puts out in its
own model. Inputs are those behind the layers that were shared before, so that errors do not add up. Each task counts by
the variance of its outputs.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemel.fitting.batch_norm import (
    ChannelMoments,
    channel_moments,
    pooled_moments,
    set_statistics,
    stores_statistics,
)
from gemel.forward.batches import Batch, run
from gemel.forward.hooks import EndForward, hooked, run_until_end
from gemel.forward.modes import evaluating
from gemel.sharing.normalisation import own_tensors

RIDGE = 1e-3  # of the variance of the inputs: a channel that hardly varies keeps the mean of the tasks' own scales


class Source(NamedTuple):
    """A task's layer: in the model as it is now, and in the one whose outputs are to be met; images of the task."""

    model: nn.Module
    teacher: nn.Module
    layer: str
    images: Sequence[Batch]


class Moments(NamedTuple):
    """Of the inputs x [N, C, ...] of one layer and the outputs y that are to be met, per channel, in float64."""

    mean_x: Tensor
    mean_y: Tensor
    var_x: Tensor
    var_y: Tensor
    covariance: Tensor
    scale: Tensor  # of the layer as it is


@torch.no_grad()
def shared_values(sources: Sequence[Source]) -> dict[str, Tensor]:
    """The values of all tensors of the shared layer, by name.

    Layers without statistics, such as group normalisation, get the mean of what they have.
    """
    layers: list[Any] = [source.model.get_submodule(source.layer) for source in sources]
    tensors = [own_tensors(layer) for layer in layers]
    first = tensors[0]
    mean = {
        key: torch.stack([own[key] for own in tensors]).mean(0) if first[key].is_floating_point() else first[key]
        for key in first
    }
    if not stores_statistics(layers[0]):
        return mean
    found = [_moments(source) for source in sources]
    weights = [1 / max(float(one.var_y.mean()), 1e-12) for one in found]
    mean_x, mean_y = (_weighted((getattr(one, key) for one in found), weights) for key in ("mean_x", "mean_y"))
    variance = _weighted((one.var_x + (one.mean_x - mean_x).square() for one in found), weights)
    covariance = _weighted((one.covariance + (one.mean_x - mean_x) * (one.mean_y - mean_y) for one in found), weights)
    ridge = RIDGE * variance.mean() + 1e-12
    scale = (covariance + ridge * _weighted((one.scale for one in found), weights)) / (variance + ridge)
    weight = scale * (variance + layers[0].eps).sqrt()
    return {**mean, "running_mean": mean_x, "running_var": variance, "weight": weight, "bias": mean_y}


def _weighted(values: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * value for value, w in zip(values, weights, strict=True)]).sum(0) / sum(weights)


def _moments(source: Source) -> Moments:
    sums = [torch.zeros((), dtype=torch.float64)] * 5
    count = 0
    for images in source.images:
        x = _at(source.model, source.layer, images, of_input=True).double().transpose(0, 1).flatten(1)
        y = _at(source.teacher, source.layer, images, of_input=False).double().transpose(0, 1).flatten(1)
        parts = (x.sum(1), y.sum(1), x.square().sum(1), y.square().sum(1), (x * y).sum(1))
        sums = [total.to(part) + part for total, part in zip(sums, parts, strict=True)]
        count += x.shape[1]
    mean_x, mean_y, xx, yy, xy = (total / max(1, count) for total in sums)
    layer: Any = source.model.get_submodule(source.layer)
    scale = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
    var_x, var_y = (xx - mean_x.square()).clamp(min=0), (yy - mean_y.square()).clamp(min=0)
    return Moments(mean_x, mean_y, var_x, var_y, xy - mean_x * mean_y, scale)


def _at(model: nn.Module, layer: str, images: Batch, of_input: bool) -> Tensor:
    """The input or the output of a layer in eval mode; the pass ends there."""
    found: list[Tensor] = []

    def stop(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        found.append((inputs[0] if of_input else output).detach())
        raise EndForward

    with evaluating(model), hooked(model, [layer], stop):
        run_until_end(lambda: run(model, images))
    return found[0]


@torch.no_grad()
def follow_statistics(model: nn.Module, teacher: nn.Module, images: Sequence[Batch], keep: Collection[str]) -> None:
    """Changes the statistics of batch normalisation as much as its inputs differ from those of the teacher's layers.

    Layer behind layer: each is measured behind those that were changed already. keep: layers that stay as they are.
    """
    names = [name for name, m in model.named_modules() if name not in keep and stores_statistics(m)]
    of_teacher: dict[str, list[ChannelMoments]] = {name: [] for name in names}
    own: dict[str, list[ChannelMoments]] = {name: [] for name in names}

    def measure(name: str, layer: nn.Module, inputs: tuple) -> None:
        of_teacher[name].append(channel_moments(inputs[0]))

    def change(name: str, layer: Any, inputs: tuple) -> None:
        own[name].append(channel_moments(inputs[0]))
        known = of_teacher[name][: len(own[name])]
        set_statistics(layer, pooled_moments(own[name]), teacher.get_submodule(name), pooled_moments(known))  # type: ignore[arg-type]

    with hooked(teacher, names, measure, before=True):
        for batch in images:
            run(teacher, batch)
    with hooked(model, names, change, before=True):
        for batch in images:
            run(model, batch)
