"""Private scale and bias of a tied layer: two vectors a task, which take the place of a normalisation behind the layer.

With them the layer computes scale * shared(x) + bias, channel by channel. A layer without a bias has a scale alone, so
that what it computes can be written into its own parameters (`folded`). The layer's own parameters stay the shared
ones; scale and bias are in a child of the layer, which a forward hook calls before that of a low-rank adapter.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

ATTRIBUTE = "affine"  # the child's name; its tensors are <layer>.affine.scale and <layer>.affine.bias
PARTS = ("scale", "bias")


class Affine(nn.Module):
    """Scale and bias of the output channels of one layer, on its device and of its dtype; at first without effect."""

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear | _ConvNd):
        super().__init__()
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        kwargs: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.num_places = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        self.scale = nn.Parameter(torch.ones(width, **kwargs))
        self.register_parameter("bias", None if layer.bias is None else nn.Parameter(torch.zeros(width, **kwargs)))

    def forward(self, outputs: Tensor) -> Tensor:
        """outputs [..., channels, *places] of the layer, places being those of a convolution."""
        shape = (-1, *[1] * self.num_places)
        outputs = outputs * self.scale.view(shape)
        return outputs if self.bias is None else outputs + self.bias.view(shape)

    def apply_to(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The forward hook of the layer; a bound method, so that a copy of the layer calls the copy of the affine."""
        return self(output)

    @torch.no_grad()
    def reset(self) -> None:
        """Sets values without effect: scale 1, bias 0."""
        self.scale.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()


def affine_of(layer: nn.Module) -> Affine | None:
    """The layer's private scale and bias, or None."""
    affine = layer._modules.get(ATTRIBUTE)
    return affine if isinstance(affine, Affine) else None


def set_affine(layer: nn.Module, affine: Affine | None) -> None:
    """Replaces the layer's private scale and bias; None removes them."""
    if (old := affine_of(layer)) is not None:
        for number, hook in list(layer._forward_hooks.items()):
            if hook == old.apply_to:
                del layer._forward_hooks[number]
        delattr(layer, ATTRIBUTE)
    if affine is not None:
        setattr(layer, ATTRIBUTE, affine)
        layer.register_forward_hook(affine.apply_to, prepend=True)  # before a low-rank adapter adds its outputs


def affine_bytes(layer: nn.Linear | _ConvNd) -> int:
    """Bytes of the private scale and bias that the layer would have."""
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return width * (1 if layer.bias is None else 2) * layer.weight.element_size()


def is_sound(own: Mapping[str, tuple[int, ...]], affine: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes are those of a layer and of its scale and bias, so that `folded` works on such tensors."""
    if "weight" not in own or set(affine) != {"scale", *(["bias"] if "bias" in own else [])}:
        return False
    return all(shape == own["weight"][:1] for shape in (*affine.values(), *([own["bias"]] if "bias" in own else [])))


def folded(own: Mapping[str, Tensor], affine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight (and bias) of a layer that computes the same as a layer with its scale and bias.

    own: "weight" and, if there is one, "bias"; affine: state dict of an Affine. Element by element, so that every
    machine gets the same bits.
    """
    scale = affine["scale"]
    found = {"weight": own["weight"] * scale.view(-1, *[1] * (own["weight"].dim() - 1))}
    if "bias" in own:
        scaled = own["bias"] * scale
        found["bias"] = scaled + affine["bias"]
    return found
