"""The layers of a model that can be shared, and what must be equal for two of them to hold the same parameters.

Module structure and tensor shapes alone; no weight is read, so models on the meta device work as well.
"""

import re
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from gemel.sharing.adapters import own_modules

NORMALISATION_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
NORMALISATION_NAME = re.compile(r"(norm|bn)(_?\d+d?)?$", re.IGNORECASE)  # a user's own MyLayerNorm2d


class Layer(NamedTuple):
    """A module that owns parameters and may share them."""

    name: str
    signature: str
    bytes: int


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises: its few bytes stay private to each task, because its statistics matter."""
    return isinstance(module, NORMALISATION_TYPES) or bool(NORMALISATION_NAME.search(type(module).__name__))


def signature_of(module: nn.Module) -> str:
    """What must be equal for the parameters of two layers to be interchangeable.

    The module's class, its settings as its extra_repr() prints them (for a convolution: channels, kernel, stride,
    padding, groups ...), and name, dtype and shape of each parameter that it owns directly.
    """
    kind = type(module)
    origin = "" if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}."
    parameters = ", ".join(
        f"{name} {str(p.dtype).removeprefix('torch.')}{list(p.shape)}"
        for name, p in module.named_parameters(recurse=False)
    )
    return f"{origin}{kind.__qualname__}({module.extra_repr()}): {parameters}"


def find_layers(model: nn.Module) -> list[Layer]:
    """The shareable layers of a model, in the order in which it registers them (input to output, as a rule).

    Left out: normalisation, parameters that are not floating point, and a layer that repeats a parameter of an earlier
    layer of the same model (it is tied together with that layer).
    """
    layers: list[Layer] = []
    seen: set[int] = set()
    for name, module in own_modules(model):
        parameters = list(module.parameters(recurse=False))
        repeated = any(id(p) in seen for p in parameters)
        seen.update(map(id, parameters))
        if not parameters or repeated or is_normalisation(module):
            continue
        if all(p.is_floating_point() for p in parameters):
            layers.append(Layer(name, signature_of(module), sum(p.nbytes for p in parameters)))
    return layers
