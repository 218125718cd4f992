"""Running statistics of batch normalisation after tying."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gemel.forward.batches import to_device
from gemel.forward.hooks import hooked
from gemel.forward.modes import evaluating

HARDLY_ALIVE = 1e-3  # of a channel's variance over all images: below that, the one over a few images says nothing


@torch.no_grad()
def reestimate_statistics(
    model: nn.Module, batches: list, device: torch.device, keep: Collection[nn.Module] = ()
) -> None:
    """Recomputes running statistics of batch normalisation as plain averages over the given batches of images.

    The outputs of a newly tied layer no longer have the statistics stored in the normalisation after it. Only the
    normalisation layers run in train mode, so dropout is off and detectors take no targets; modes and momentum are
    restored. batches: (images, targets). keep: modules whose statistics stay as they are. Source: Jordan et al.,
    "REPAIR", ICLR 2023.
    """
    if not batches or not _batch_norms(model, keep):
        return
    with averaged_statistics(model, keep):
        for images, _ in batches:
            model(to_device(images, device))


@contextlib.contextmanager
def averaged_statistics(model: nn.Module, keep: Collection[nn.Module] = ()) -> Iterator[None]:
    """Within, batch normalisation averages its statistics anew over the forward passes; all else is in eval mode.

    keep: modules whose statistics stay as they are.
    """
    momenta = [(layer, layer.momentum) for layer in _batch_norms(model, keep)]
    with evaluating(model):
        for layer, _ in momenta:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.train()
        try:
            yield
        finally:
            for layer, momentum in momenta:
                layer.momentum = momentum


class ChannelMoments(NamedTuple):
    """Mean and variance of every channel, over `num_values` values each."""

    num_values: int
    mean: torch.Tensor
    var: torch.Tensor


def channel_moments(values: torch.Tensor) -> ChannelMoments:
    """Of values [N, channels, ...].

    Channels-last, batch normalisation itself takes them, in two fifths to nine tenths of the time of two means in turn;
    else two means, as torch.var_mean takes 4 to 16 times as long (benchmarks/LOG.md, 2026-11-27 Fewer seconds).
    """
    values = values.detach().float()
    number = values.numel() // max(1, values.shape[1])
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last) and number > 1:
        mean, var = values.new_zeros(values.shape[1]), values.new_ones(values.shape[1])
        F.batch_norm(values, mean, var, training=True, momentum=1.0)
        return ChannelMoments(number, mean, var * ((number - 1) / number))  # it divides by number - 1
    dims = [0, *range(2, values.dim())]
    mean = values.mean(dims)
    var = (values - mean.view(1, -1, *[1] * (values.dim() - 2))).square_().mean(dims)
    return ChannelMoments(number, mean, var)


def pooled_moments(parts: Sequence[ChannelMoments]) -> ChannelMoments:
    """Of all values together."""
    total = sum(part.num_values for part in parts)
    mean = sum((part.mean * (part.num_values / total) for part in parts), start=torch.zeros_like(parts[0].mean))
    spread = ((part.var + (part.mean - mean).square()) * (part.num_values / total) for part in parts)
    return ChannelMoments(total, mean, sum(spread, start=torch.zeros_like(mean)))


@torch.no_grad()
def set_statistics(norm: _BatchNorm, own: ChannelMoments, teacher: _BatchNorm, of_teacher: ChannelMoments) -> None:
    """Sets the statistics of a normalisation to what they would be over all images that the teacher's were taken from.

    own, of_teacher: moments of the inputs of both, on the same few images. Of the few images only the change from the
    teacher to this model is taken, so what they have in common with each other, and not with all images, cancels out.
    Source: control variates, as in any textbook on Monte Carlo methods.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    assert teacher.running_mean is not None and teacher.running_var is not None
    least = HARDLY_ALIVE * teacher.running_var.float() + norm.eps
    ratio = (own.var + least) / (of_teacher.var + least)
    shift = (teacher.running_mean.float() - of_teacher.mean) * ratio.sqrt()
    norm.running_mean.copy_(own.mean + shift)
    norm.running_var.copy_(teacher.running_var.float() * ratio)


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of batch normalisation that have statistics, by name."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, _BatchNorm) and m.track_running_stats}


def _batch_norms(model: nn.Module, keep: Collection[nn.Module] = ()) -> list[_BatchNorm]:
    return [module for module in batch_norms(model).values() if module not in keep]


def freeze_statistics(model: nn.Module) -> None:
    """Puts batch normalisation into eval mode: its statistics stay the same, its weight and bias are still trained."""
    for layer in _batch_norms(model):
        layer.eval()


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within, batch normalisation is in eval mode; afterwards every layer has the mode it had."""
    modes = [(layer, layer.training) for layer in _batch_norms(model)]
    freeze_statistics(model)
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


@torch.no_grad()
def match_statistics(
    model: nn.Module, teacher: nn.Module, batches: list, device: torch.device, frozen_only: bool = False
) -> None:
    """Sets every normalisation by stored statistics so that its outputs have the teacher's mean and variance.

    Per channel: the statistics become those of the inputs, weight and bias the deviation and mean of the teacher's
    outputs. The inputs of a layer are those behind the layers already matched. Also for frozen batch normalisation, as
    in detectors, where it is not enough to re-estimate the statistics: there the moments of the outputs are not the
    layer's weight and bias. A layer without weight and bias only gets statistics. batches: (images, targets).
    frozen_only: other normalisation stays as it is.
    Source: Jordan et al., "REPAIR", ICLR 2023, section 3.
    """
    wanted = [(name, m) for name, m in model.named_modules() if is_frozen(m) or not frozen_only]
    layers = {name: module for name, module in wanted if stores_statistics(module)}
    if not layers or not batches:
        return
    targets: dict[str, _Moments] = {name: _Moments() for name in layers}  # of the teacher's outputs
    found: dict[str, _Moments] = {name: _Moments() for name in layers}  # of the model's inputs

    def measure(name: str, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        targets[name].add(output)

    def impose(name: str, layer: _Normalisation, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        return _with_moments(layer, inputs[0], found[name], targets[name])

    with hooked(teacher, layers, measure):
        _run_all(teacher, batches, device)
    with hooked(model, layers, impose):
        _run_all(model, batches, device)
    for name, layer in layers.items():
        if found[name].calls and targets[name].calls:
            _set_normalisation(layer, found[name], targets[name])


def is_frozen(module: nn.Module) -> bool:
    """Whether the layer normalises by stored statistics without training them: torchvision's FrozenBatchNorm2d."""
    return stores_statistics(module) and not isinstance(module, _BatchNorm)


class _Normalisation(Protocol):
    """What batch normalisation with stored statistics has, whatever its class; weight and bias may be missing."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class _Moments:
    """Mean and variance per channel, averaged over calls."""

    def __init__(self) -> None:
        self.calls, self.mean, self.var = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a call to the averages, and returns the moments of this call alone; values [N, channels, ...]."""
        dims = [0, *range(2, values.dim())]
        var, mean = torch.var_mean(values, dims, correction=0)
        self.calls += 1
        self.mean = self.mean + (mean - self.mean.to(mean)) / self.calls
        self.var = self.var + (var - self.var.to(var)) / self.calls
        return mean, var


def stores_statistics(module: nn.Module) -> TypeGuard[_Normalisation]:
    """Whether the module is batch normalisation, frozen (torchvision's, or with the same attributes) or not."""
    return all(getattr(module, key, None) is not None for key in ("running_mean", "running_var", "eps"))


def _with_moments(
    layer: _Normalisation, inputs: torch.Tensor, found: _Moments, target: _Moments
) -> torch.Tensor | None:
    """The output that the layer will have when it is set: its inputs with the target moments. Adds them to `found`."""
    mean, var = found.add(inputs)
    if getattr(layer, "weight", None) is None or not target.calls:
        return None
    shape = [1, -1] + [1] * (inputs.dim() - 2)
    sign = torch.where(layer.weight < 0, -1.0, 1.0)
    gain = sign * (target.var / (var + layer.eps)).sqrt()
    return (inputs - mean.view(shape)) * gain.view(shape) + target.mean.view(shape)


def _set_normalisation(layer: _Normalisation, found: _Moments, target: _Moments) -> None:
    layer.running_mean.copy_(found.mean)
    layer.running_var.copy_(found.var)
    if getattr(layer, "weight", None) is not None:
        layer.weight.copy_(torch.where(layer.weight < 0, -1.0, 1.0) * target.var.sqrt())
        layer.bias.copy_(target.mean)


def _run_all(model: nn.Module, batches: list, device: torch.device) -> None:
    """Runs the model on every batch in eval mode; modes are restored."""
    with evaluating(model):
        for images, _ in batches:
            model(to_device(images, device))
