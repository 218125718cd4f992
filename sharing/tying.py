"""Tying layers at the level of parameters, and undoing it exactly.

A group is tied when every occurrence holds the *same* nn.Parameter objects. Modules stay apart, so train/eval mode,
hooks and statistics stay private. Hold the models in one nn.ModuleDict: `.parameters()` then yields a tied parameter
once, and `.to()` moves it once. `load_state_dict(assign=True)` and `deepcopy` of a single model break ties.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharing.groups import Configuration, Group, Occurrence

# Initial weights of a tied group: [parameter of each occurrence] -> values of the shared one.
INITIAL_WEIGHTS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "first": lambda parameters: parameters[0].detach().clone(),
    "mean": lambda parameters: torch.stack([p.detach() for p in parameters]).mean(0),
}


def tie(models: nn.ModuleDict, configuration: Configuration, initial: str = "mean") -> None:
    """Ties every group of the configuration; groups that are tied already keep their parameters as they are."""
    for group in configuration:
        layers = [_layer(models, occurrence) for occurrence in group.occurrences]
        for key, _ in layers[0].named_parameters(recurse=False):
            parameters = [getattr(layer, key) for layer in layers]
            if all(p is parameters[0] for p in parameters):
                continue
            shared = nn.Parameter(INITIAL_WEIGHTS[initial](parameters))
            for occurrence, parameter in zip(group.occurrences, parameters, strict=True):
                replace_parameter(models[occurrence.task], parameter, shared)


def is_tied(models: nn.ModuleDict, group: Group) -> bool:
    """Whether all occurrences of the group hold the same parameter objects."""
    owned = [
        tuple(id(p) for p in _layer(models, occurrence).parameters(recurse=False)) for occurrence in group.occurrences
    ]
    return len(set(owned)) == 1


def untie(models: nn.ModuleDict, occurrence: Occurrence) -> None:
    """Gives one occurrence parameters of its own again, with the values that it has now."""
    model = models[occurrence.task]
    for _, parameter in list(_layer(models, occurrence).named_parameters(recurse=False)):
        own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        replace_parameter(model, parameter, own)


def replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Puts `new` wherever the model holds `old` (a model may use one parameter in several places)."""
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is old:
                setattr(module, key, new)  # not through _parameters: recurrent layers listen to setattr


def _layer(models: nn.ModuleDict, occurrence: Occurrence) -> nn.Module:
    return models[occurrence.task].get_submodule(occurrence.layer)


@dataclass(frozen=True)
class Snapshot:
    """Everything needed to bring models back bit by bit: which tensor stood where, and the values it had."""

    places: tuple[tuple[nn.Module, str, Tensor], ...]
    values: tuple[tuple[Tensor, Tensor], ...]  # (tensor, copy of its values on the CPU)
    flags: tuple[tuple[nn.Parameter, bool], ...]  # requires_grad
    modes: tuple[tuple[nn.Module, bool], ...]  # training


def take_snapshot(models: nn.Module) -> Snapshot:
    """A snapshot of parameters, buffers, ties, requires_grad and train/eval modes; the copies lie in CPU memory."""
    places = [
        (module, key, tensor)
        for module in models.modules()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]
    distinct = {id(tensor): tensor for _, _, tensor in places}.values()
    return Snapshot(
        places=tuple(places),
        values=tuple((tensor, tensor.detach().to("cpu", copy=True)) for tensor in distinct),
        flags=tuple((tensor, tensor.requires_grad) for tensor in distinct if isinstance(tensor, nn.Parameter)),
        modes=tuple((module, module.training) for module in models.modules()),
    )


@torch.no_grad()
def restore_snapshot(snapshot: Snapshot) -> None:
    """Undoes every tie, training step and change of statistics since the snapshot was taken."""
    for module, key, tensor in snapshot.places:
        if getattr(module, key) is not tensor:
            setattr(module, key, tensor)
    for tensor, values in snapshot.values:
        tensor.copy_(values)
    for parameter, requires_grad in snapshot.flags:
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
    for module, training in snapshot.modes:
        module.training = training
