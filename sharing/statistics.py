"""Running statistics of batch normalisation after tying."""

import torch
from torch import nn


@torch.no_grad()
def reestimate_statistics(model: nn.Module, batches: list, device: torch.device) -> None:
    """Recomputes running statistics of batch normalisation as plain averages over the given batches of images.

    A freshly tied layer feeds its followers other activations than those their statistics describe. Only the
    normalisation layers run in train mode, so dropout is off and detectors take no targets; modes and momentum are
    restored. Source: Jordan et al., "REPAIR", ICLR 2023.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not layers or not batches:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
        layer.train()
    for images, _ in batches:
        moved = images.to(device) if torch.is_tensor(images) else [image.to(device) for image in images]
        model(moved)
    for layer, momentum in momenta:
        layer.momentum = momentum
    for module, training in modes:
        module.training = training
