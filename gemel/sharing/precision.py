"""The weights of a workload in the type of its store: which they are, rounding them to it, and their bytes.

Weights are the float32 parameters outside normalisation layers. Normalisation and all buffers stay as they are: they
are a few bytes, and a running variance may be out of the range of float16. In int8 biases and other small weights stay
as well (quantisation.py).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from gemel.forward.arithmetic import run_with_weights_of
from gemel.forward.modes import Models, deep_copy
from gemel.sharing.groups import Configuration, Group
from gemel.sharing.memory import distinct_tensors
from gemel.sharing.quantisation import quantise, quantised_bytes, quantised_weights
from gemel.sharing.signatures import is_normalisation


def weights_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters outside normalisation layers, each once, whatever their type."""
    kept = {id(p) for m in model.modules() if is_normalisation(m) for p in m.parameters(recurse=False)}
    return (parameter for parameter in model.parameters() if id(parameter) not in kept)


def rounded_weights(model: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """Those of `weights_of` that take that type in a store: the ones in float32; of int8 as `quantised_weights`."""
    if dtype == torch.int8:
        return quantised_weights(model)
    return [parameter for parameter in weights_of(model) if parameter.dtype == torch.float32]


def round_weights(models: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Rounds the weights, in place, to values of that type; they stay float32."""
    if dtype == torch.float32:
        return
    for parameter in (parameter for model in models for parameter in rounded_weights(model, dtype)):
        parameter.data.copy_(quantise(parameter).dequantised() if dtype == torch.int8 else parameter.data.to(dtype))


def overflows(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a finite weight is beyond the range of that type; of int8, which has no NaN, any that is not finite."""
    if dtype == torch.int8:
        return not all(bool(p.isfinite().all()) for p in rounded_weights(model, dtype))
    most = torch.finfo(dtype).max
    return any(bool(((p.abs() > most) & p.isfinite()).any()) for p in rounded_weights(model, dtype))


def as_stored(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model as it is loaded from a store of that type: a copy, or the model itself where that is float32."""
    if dtype == torch.float32:
        return model
    copied = deep_copy(model)
    if dtype == torch.int8:  # loaded as float32
        round_weights([copied], dtype)
        return copied
    for parameter in rounded_weights(copied, dtype):
        parameter.data = parameter.data.to(dtype)
    run_with_weights_of(copied, dtype)
    return copied


def stored_bytes(models: Models, dtype: torch.dtype) -> int:
    """Bytes of the distinct parameters and buffers of a workload in a store of that type."""
    rounded = {id(parameter) for model in models.values() for parameter in rounded_weights(model, dtype)}
    return sum(_bytes_in(t, dtype) if id(t) in rounded else t.nbytes for t in distinct_tensors(models))


def _bytes_in(weight: Tensor, dtype: torch.dtype) -> int:
    return quantised_bytes(weight) if dtype == torch.int8 else weight.numel() * dtype.itemsize


def groups_as_stored(groups: Configuration, models: Models, dtype: torch.dtype) -> Configuration:
    """Groups of float32 layers without adapters, scales and biases, with their bytes in a store of that type."""
    if dtype == torch.float32:
        return groups
    rounded = {id(parameter) for model in models.values() for parameter in rounded_weights(model, dtype)}
    return tuple(Group(g.signature, _group_bytes(g, models, rounded, dtype), g.occurrences) for g in groups)


def _group_bytes(group: Group, models: Models, rounded: set[int], dtype: torch.dtype) -> int:
    first = group.occurrences[0]
    own = models[first.task].get_submodule(first.layer).parameters(recurse=False)
    return sum(_bytes_in(p, dtype) if id(p) in rounded else p.nbytes for p in own)
