"""Weights in 8 bits: whole numbers from -127 to 127, times one float32 scale for each row of the weight.

A row is what the first dimension of the weight counts: an output channel of a linear layer or a convolution (of a
transposed convolution, an input channel). A model whose weights were rounded holds the products in float32; `quantise`
finds numbers and scales in them again, exactly. For that, a scale has 17 bits and the largest number of a row is 127.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gemel.forward.eight_bits import dequantised
from gemel.sharing.adapters import own_modules

LEVELS = 127
LEAST_ROW = 8  # numbers in a row: the scale of a shorter one would take most of what is saved
LEAST_VALUE = 2.0**-100  # a row of smaller values becomes zero
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Quantised(NamedTuple):
    """A weight in 8 bits."""

    values: Tensor  # int8, of the weight's shape
    scale: Tensor  # float32 [len(values)]

    def dequantised(self) -> Tensor:
        """The weight in float32: the same bits on every machine."""
        return dequantised(self.values, self.scale)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


def quantised_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are stored in 8 bits, each once: float32, of linear layers, convolutions and attention.

    Not those of adapters, nor weights with rows of fewer than LEAST_ROW numbers.
    """
    return list({id(parameter): parameter for _, parameter in named_quantised_weights(model)}.values())


def named_quantised_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name of the module that holds it, weight) of the same; a weight that two modules hold comes twice."""
    for name, module in own_modules(model):
        of_kind = ("weight",) if isinstance(module, nn.Linear | _ConvNd) else ()
        for key in _OF_ATTENTION if isinstance(module, nn.MultiheadAttention) else of_kind:
            weight = module._parameters.get(key)
            if weight is not None and weight.dtype == torch.float32 and weight[0].numel() >= LEAST_ROW:
                yield name, weight


def quantised_bytes(weight: Tensor) -> int:
    """Bytes of the weight in 8 bits, with its scales."""
    return weight.numel() + torch.float32.itemsize * len(weight)


def quantise(weight: Tensor) -> Quantised:
    """The weight in 8 bits, every number the nearest one; exact where the weight has such values already."""
    rows = weight.detach().flatten(1)
    scale = scales_for(rows.abs().amax(1))
    found = _divided(rows, scale)
    is_exact = (found * scale.unsqueeze(1) == rows).all(1)
    if not bool(is_exact.all()):
        scale = torch.where(is_exact, scale, with_17_bits(scale))
        found = _divided(rows, scale)
    return Quantised(found.to(torch.int8).reshape(weight.shape), scale)


def is_rounded(weight: Tensor) -> bool:
    """Whether the weight has values that `quantise` keeps."""
    return torch.equal(quantise(weight).dequantised(), weight.detach())


def scales_for(largest: Tensor) -> Tensor:
    """The scales with which rows of these largest absolute values reach LEVELS; 1 for rows of zeros."""
    return torch.where(largest >= LEAST_VALUE, largest / LEVELS, torch.ones_like(largest))


def with_17_bits(scale: Tensor) -> Tensor:
    """Positive float32 numbers, rounded up to 17 bits: times a number of 7 bits they are float32 numbers exactly."""
    return ((scale.view(torch.int32) + 0x7F) & ~0x7F).view(torch.float32)


def _divided(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale.unsqueeze(1)).round_().clamp_(-LEVELS, LEVELS)
