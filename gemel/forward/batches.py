"""A batch of images without labels, and running a model on it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gemel.forward.modes import device_of, evaluating

Batch = Tensor | Sequence[Tensor]  # images only: [N, C, H, W] of a classifier, a list of [C, H, W] of a detector


def to_device(images: Batch, device: torch.device) -> Tensor | list[Tensor]:
    """The images on a device; those of a detector as a list."""
    return images.to(device) if torch.is_tensor(images) else [image.to(device) for image in images]


@torch.no_grad()
def run(model: nn.Module, images: Batch) -> object:
    """The model's output in eval mode, on its own device; every submodule keeps its mode."""
    with evaluating(model):
        return model(to_device(images, device_of(model)))
