"""The layers of a model that can be shared, and what must be equal for two of them to hold the same parameters.

Module structure and tensor shapes alone; no weight is read, so models on the meta device work as well.
"""

import functools
import re
import types
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from gemel.environment.describe import describe, is_plain
from gemel.sharing.adapters import own_modules

NORMALISATION_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
NORMALISATION_NAME = re.compile(r"(norm|bn)(_?\d+d?)?$", re.IGNORECASE)  # a user's own MyLayerNorm2d
# Attributes of every module; a mark that transformers leaves on modules whose weights it has set; and what a model
# that has a parameter of its own (a class token) says of its head, whose shape tells it too.
NO_SETTINGS = {*vars(nn.Module()), "_is_hf_initialized", "num_classes"}
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
PARAMETRIZATIONS = ".parametrizations."  # in the name of a module of torch.nn.utils.parametrize, behind its layer


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
    padding, groups ...), name, dtype and shape of each parameter that it owns directly, and its plain attributes,
    unless extra_repr() prints all that count, as that of torch's own layers does.
    """
    kind = type(module)
    origin = "" if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}."
    parameters = ", ".join(
        f"{name} {str(p.dtype).removeprefix('torch.')}{list(p.shape)}"
        for name, p in module.named_parameters(recurse=False)
    )
    settings = {} if _prints_all_settings(module) else settings_of(module)
    printed = "".join(f"; {key}={describe(value)}" for key, value in sorted(settings.items()))
    return f"{origin}{kind.__qualname__}({module.extra_repr()}): {parameters}{printed}"


def settings_of(module: nn.Module) -> dict[str, object]:
    """The attributes of a module that can change what it computes: plain values, and functions.

    Of a layer of torch itself only those that its own constructor sets: other attributes are marks of other programs.
    """
    own = {key: value for key, value in vars(module).items() if key not in NO_SETTINGS}
    if _is_of_torch(module):
        codes = (getattr(vars(kind).get("__init__"), "__code__", None) for kind in type(module).__mro__)
        known = {name for code in codes if code is not None for name in code.co_names}
        own = {key: value for key, value in own.items() if key in known or _replaces_a_method(module, key)}
    functions = {key: getattr(value, "__func__", value) for key, value in own.items() if isinstance(value, FUNCTIONS)}
    return {key: value for key, value in own.items() if is_plain(value)} | functions


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _replaces_a_method(module: nn.Module, key: str) -> bool:
    return isinstance(vars(module)[key], FUNCTIONS) and hasattr(type(module), key)


def _prints_all_settings(module: nn.Module) -> bool:
    """Whether extra_repr() is that of one of torch's own layers, and no method was replaced in this one module."""
    of_torch = _is_of_torch(module) and type(module).extra_repr is not nn.Module.extra_repr
    return of_torch and not any(_replaces_a_method(module, key) for key in vars(module))


def find_layers(model: nn.Module) -> list[Layer]:
    """The shareable layers of a model, in the order in which it registers them (input to output, as a rule).

    Left out: normalisation, parameters that are not floating point, scripted modules, which do not show their settings,
    and a layer that repeats a parameter of an earlier layer of the same model (it is tied together with that layer).
    """
    layers: list[Layer] = []
    seen: set[int] = set()
    for name, module in own_modules(model):
        parameters = list(module.parameters(recurse=False))
        repeated = any(id(p) in seen for p in parameters)
        seen.update(map(id, parameters))
        if not parameters or repeated or is_normalisation(module) or isinstance(module, torch.jit.ScriptModule):
            continue
        if all(p.is_floating_point() for p in parameters):
            layers.append(Layer(name, layer_signature(model, name), sum(p.nbytes for p in parameters)))
    return layers


def layer_signature(model: nn.Module, name: str) -> str:
    """The signature of a layer of a model; parameters from which a weight is computed have that of the layer as well.

    Source: torch.nn.utils.parametrize, with which weight_norm and spectral_norm keep a weight in other parameters.
    """
    module = model.get_submodule(name)
    own = signature_of(module)
    if PARAMETRIZATIONS not in f".{name}" or not isinstance(module, ParametrizationList):
        return own
    layer = model.get_submodule(f".{name}".rpartition(PARAMETRIZATIONS)[0].removeprefix("."))
    steps = ", ".join(f"{type(step).__qualname__} {describe(settings_of(step))}" for step in module.children())
    return f"{own}; in {signature_of(layer)}; by {steps}"


def has_signature(model: nn.Module, name: str, recorded: str, stored_in: str = "float32") -> bool:
    """Whether a layer has a recorded signature; those of earlier versions end before the plain attributes.

    stored_in: the type that float32 weights were stored in; signatures are of the models before that.
    """
    signature = layer_signature(model, name).replace(f" {stored_in}[", " float32[")
    return signature == recorded or signature.startswith(f"{recorded}; ")
