"""Running statistics of batch normalisation after tying."""

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import nn

from gemel.forward.modes import evaluating


@torch.no_grad()
def reestimate_statistics(
    model: nn.Module, batches: list, device: torch.device, but: Collection[nn.Module] = ()
) -> None:
    """Recomputes running statistics of batch normalisation as plain averages over the given batches of images.

    A freshly tied layer feeds its followers other activations than those their statistics describe. Only the
    normalisation layers run in train mode, so dropout is off and detectors take no targets; modes and momentum are
    restored. batches: (images, targets). but: modules that keep what they have. Source: Jordan et al., "REPAIR",
    ICLR 2023.
    """
    if not batches or not _batch_norms(model, but):
        return
    with averaged_statistics(model, but):
        for batch in batches:
            model(_images_of(batch, device))


@contextlib.contextmanager
def averaged_statistics(model: nn.Module, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """In eval mode but for batch normalisation, which averages anew over the forward passes within.

    but: modules that keep the statistics they have.
    """
    momenta = [(layer, layer.momentum) for layer in _batch_norms(model, but)]
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


def _batch_norms(model: nn.Module, but: Collection[nn.Module] = ()) -> list[nn.Module]:
    kept = set(but)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    return [module for module in norms if module not in kept]


def _images_of(batch, device: torch.device):
    images, _ = batch
    return images.to(device) if torch.is_tensor(images) else [image.to(device) for image in images]


def freeze_statistics(model: nn.Module) -> None:
    """Puts batch normalisation into eval mode: it goes on training its weight and bias, with the statistics it has."""
    for layer in _batch_norms(model):
        layer.eval()


@torch.no_grad()
def match_statistics(
    model: nn.Module, teacher: nn.Module, batches: list, device: torch.device, frozen_only: bool = False
) -> None:
    """Sets every normalisation by stored statistics so that it puts out the teacher's mean and variance per channel.

    The statistics become those of the inputs, weight and bias the teacher's deviation and mean of the outputs; each
    layer is judged behind those already matched. Works on frozen batch normalisation, as detectors have it, where
    re-estimating statistics alone would be wrong: what it puts out is not what its weight and bias say. Layers without
    weight and bias only get statistics. batches: (images, targets). frozen_only: other normalisation stays as it is.
    Source: Jordan et al., "REPAIR", ICLR 2023, section 3.
    """
    names = [name for name, module in model.named_modules() if _stores_statistics(module)]
    if frozen_only:
        names = [name for name in names if is_frozen(model.get_submodule(name))]
    if not names or not batches:
        return
    wanted: dict[str, _Moments] = {name: _Moments() for name in names}
    found: dict[str, _Moments] = {name: _Moments() for name in names}
    hooks = [teacher.get_submodule(n).register_forward_hook(_watch(wanted[n])) for n in names]
    try:
        _run_all(teacher, batches, device)
        hooks += [model.get_submodule(n).register_forward_hook(_impose(found[n], wanted[n])) for n in names]
        _run_all(model, batches, device)
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if found[name].calls and wanted[name].calls:
            _set_normalisation(model.get_submodule(name), found[name], wanted[name])


def is_frozen(module: nn.Module) -> bool:
    """Whether the layer normalises by stored statistics without training them: torchvision's FrozenBatchNorm2d."""
    return _stores_statistics(module) and not isinstance(module, nn.modules.batchnorm._BatchNorm)


class _Moments:
    """Mean and variance per channel, averaged over calls."""

    def __init__(self):
        self.calls, self.mean, self.var = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts a call in, and returns the moments of this call alone; values [N, channels, ...]."""
        dims = [0, *range(2, values.dim())]
        var, mean = torch.var_mean(values, dims, correction=0)
        self.calls += 1
        self.mean = self.mean + (mean - self.mean.to(mean)) / self.calls
        self.var = self.var + (var - self.var.to(var)) / self.calls
        return mean, var


def _stores_statistics(module: nn.Module) -> bool:
    """Batch normalisation, frozen (torchvision's, or one like it) or not."""
    return all(getattr(module, key, None) is not None for key in ("running_mean", "running_var", "eps"))


def _watch(moments: _Moments):
    return lambda module, inputs, output: moments.add(output) and None


def _impose(found: _Moments, wanted: _Moments):
    """A hook that puts out the wanted moments, as the layer will when it has been set."""

    def hook(module, inputs, output):
        mean, var = found.add(inputs[0])
        if getattr(module, "weight", None) is None or not wanted.calls:
            return None
        shape = [1, -1] + [1] * (output.dim() - 2)
        sign = torch.where(module.weight < 0, -1.0, 1.0)
        gain = sign * (wanted.var / (var + module.eps)).sqrt()
        return (inputs[0] - mean.view(shape)) * gain.view(shape) + wanted.mean.view(shape)

    return hook


def _set_normalisation(layer: nn.Module, found: _Moments, wanted: _Moments) -> None:
    layer.running_mean.copy_(found.mean)
    layer.running_var.copy_(found.var)
    if getattr(layer, "weight", None) is not None:
        layer.weight.copy_(torch.where(layer.weight < 0, -1.0, 1.0) * wanted.var.sqrt())
        layer.bias.copy_(wanted.mean)


def _run_all(model: nn.Module, batches: list, device: torch.device) -> None:
    """Every batch through the model in eval mode; modes are restored."""
    with evaluating(model):
        for batch in batches:
            model(_images_of(batch, device))
