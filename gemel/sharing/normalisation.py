"""Normalisation layers that several tasks share: parameters and statistics are the same tensors.

Normalisation is private to each task, unless a merge is asked to share it (`share_norm`) so that tasks which see the
same frames can run their first layers once. A group of normalisation layers shares its buffers as well, and says so.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from gemel.forward.modes import Models
from gemel.sharing.groups import Configuration, Group, Occurrence
from gemel.sharing.signatures import is_normalisation, layer_signature


def can_share(module: nn.Module) -> bool:
    """Whether it is a normalisation layer with a weight and a bias, which may be buffers, as in frozen ones."""
    own = own_tensors(module)
    return is_normalisation(module) and {"weight", "bias"} <= set(own)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers that a module owns itself, by name."""
    buffers = module.named_buffers(recurse=False)
    saved = {name: buffer for name, buffer in buffers if name not in module._non_persistent_buffers_set}
    return {**dict(module.named_parameters(recurse=False)), **saved}


def group_of(models: Models, occurrences: Collection[Occurrence]) -> Group:
    """The group of these layers, which must have equal signatures; its bytes are those of all tensors of one layer."""
    task, layer = next(iter(occurrences))
    signature = layer_signature(models[task], layer)
    num_bytes = sum(tensor.nbytes for tensor in own_tensors(models[task].get_submodule(layer)).values())
    return Group(signature, num_bytes, tuple(occurrences), normalisation=True)


@torch.no_grad()
def tie_normalisation(models: Models, group: Group, values: Mapping[str, Tensor]) -> None:
    """Makes the layers of the group hold the same tensors, with these values."""
    layers = [models[o.task].get_submodule(o.layer) for o in group.occurrences]
    for name, own in own_tensors(layers[0]).items():
        shared: Tensor = torch.empty_like(own).copy_(values[name])
        if isinstance(own, nn.Parameter):
            trained = all(getattr(layer, name).requires_grad for layer in layers)
            shared = nn.Parameter(shared, trained)
        for layer in layers:
            setattr(layer, name, shared)


@torch.no_grad()
def untie_normalisation(models: Models, groups: Configuration) -> None:
    """Gives every layer of these groups tensors of its own, with the values that it has."""
    for occurrence in (o for group in groups for o in group.occurrences):
        layer = models[occurrence.task].get_submodule(occurrence.layer)
        for name, tensor in own_tensors(layer).items():
            copied: Tensor = tensor.detach().clone()
            setattr(layer, name, nn.Parameter(copied, tensor.requires_grad) if name in layer._parameters else copied)
