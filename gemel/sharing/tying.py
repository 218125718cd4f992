"""Tying layers at the level of parameters, and undoing it exactly.

A group is tied when every occurrence holds the *same* nn.Parameter objects. Modules stay separate, so train/eval mode,
hooks and statistics stay private. Hold the models in one nn.ModuleDict: `.parameters()` then yields a tied parameter
once, and `.to()` moves it once. `load_state_dict(assign=True)` and `deepcopy` of a single model break ties.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemel.forward.modes import Models
from gemel.sharing.adapters import Adapter, adapter_of, give_affine, own_modules, set_adapter, set_rank
from gemel.sharing.affine import Affine, affine_of, set_affine
from gemel.sharing.groups import Configuration, Group, Occurrence
from gemel.sharing.initial_weights import INITIAL_WEIGHTS


def tie(
    models: Models,
    configuration: Configuration,
    initial: str = "mean",
    task_weights: Mapping[str, float] | None = None,
) -> None:
    """Ties every group of the configuration; groups that are tied already keep their parameters as they are.

    initial: the name of a data-free rule (initial_weights.py). task_weights: those of the tasks in it (default: equal).
    A parameter that any of the tasks has frozen (requires_grad) is frozen once it is shared.
    """
    for group in configuration:
        weights = None if task_weights is None else [task_weights[task] for task in group.tasks]
        layers = [_layer(models, occurrence) for occurrence in group.occurrences]
        for key, _ in layers[0].named_parameters(recurse=False):
            parameters = [getattr(layer, key) for layer in layers]
            if all(p is parameters[0] for p in parameters):
                continue
            values = INITIAL_WEIGHTS[initial](parameters, weights)
            trained = all(p.requires_grad for p in parameters)
            shared = nn.Parameter(torch.empty_like(parameters[0]).copy_(values), trained)  # keeps the memory layout
            for occurrence, parameter in zip(group.occurrences, parameters, strict=True):
                replace_parameter(models[occurrence.task], parameter, shared)


def retie(models: Models, before: Configuration, after: Configuration, unmerged: Models, initial: str = "mean") -> None:
    """Changes the ties from one configuration to another; weights that stay tied keep their values.

    Of a group that splits, the largest part keeps the shared parameters; an occurrence that is in no group of `after`
    gets the weights that it has in its unmerged model. An adapter whose rank changes is replaced by a new one.
    A private scale and bias begin without effect.
    """
    group_of = {occurrence: group for group in after for occurrence in group.occurrences}
    for group in set(before) - set(after):
        parts: dict[Group | None, list[Occurrence]] = defaultdict(list)
        for occurrence in group.occurrences:
            parts[group_of.get(occurrence)].append(occurrence)
        staying = max((part for g, part in parts.items() if g is not None), key=len, default=[])
        for occurrence in group.occurrences:
            if occurrence not in staying:
                untie(models, occurrence)
            if occurrence not in group_of:
                copy_parameters(unmerged[occurrence.task].get_submodule(occurrence.layer), _layer(models, occurrence))
    tie(models, after, initial)
    for occurrence in {o for group in set(before) ^ set(after) for o in group.occurrences}:
        layer, group_after = _layer(models, occurrence), group_of.get(occurrence)
        set_rank(layer, 0 if group_after is None else group_after.rank)
        give_affine(layer, group_after is not None and group_after.affine_bytes > 0)


def frozen_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that are not to be trained (requires_grad)."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter.is_floating_point() and not parameter.requires_grad]


def freeze(models: Models, frozen: Mapping[str, Collection[str]]) -> None:
    """Makes all parameters trainable but those that are named for any of the tasks that hold them."""
    named = {task: dict(models[task].named_parameters(remove_duplicate=False)) for task in models}
    ids = {id(named[task][name]) for task, names in frozen.items() for name in names if name in named[task]}
    for parameter in (parameter for own in named.values() for parameter in own.values()):
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) not in ids)


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copies the parameters that a layer owns itself, not those of its children, into another layer's, in place."""
    own = dict(target.named_parameters(recurse=False))
    for key, parameter in source.named_parameters(recurse=False):
        own[key].copy_(parameter)


@torch.no_grad()
def reset(models: Models, configuration: Configuration, unmerged: Models, initial: str = "mean") -> None:
    """Sets the weights of tied groups to what the rule makes of their unmerged models' weights.

    Private scales and biases are then without effect.
    """
    for group in configuration:
        for occurrence in group.occurrences:
            if (affine := affine_of(_layer(models, occurrence))) is not None:
                affine.reset()
        layers = [_layer(unmerged, occurrence) for occurrence in group.occurrences]
        for key, shared in _layer(models, group.occurrences[0]).named_parameters(recurse=False):
            shared.copy_(INITIAL_WEIGHTS[initial]([getattr(layer, key) for layer in layers], None))


def is_tied(models: Models, group: Group) -> bool:
    """Whether all occurrences of the group hold the same parameter objects."""
    owned = [
        tuple(id(p) for p in _layer(models, occurrence).parameters(recurse=False)) for occurrence in group.occurrences
    ]
    return len(set(owned)) == 1


def untie(models: Models, occurrence: Occurrence) -> None:
    """Gives one occurrence private parameters with the present values of the shared ones."""
    model = models[occurrence.task]
    for _, parameter in list(_layer(models, occurrence).named_parameters(recurse=False)):
        own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        replace_parameter(model, parameter, own)


def replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Replaces `old` by `new` in all modules of the model (a model may use one parameter in several modules)."""
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is old:
                setattr(module, key, new)  # not through _parameters: recurrent layers listen to setattr


def _layer(models: Models, occurrence: Occurrence) -> nn.Module:
    return models[occurrence.task].get_submodule(occurrence.layer)


@dataclass(frozen=True)
class Snapshot:
    """All that is needed to restore models bit by bit: which module held which tensor, and the tensors' values."""

    owners: tuple[tuple[nn.Module, str, Tensor], ...]
    adapters: tuple[tuple[nn.Module, Adapter | None], ...]
    affines: tuple[tuple[nn.Module, Affine | None], ...]
    values: tuple[tuple[Tensor, Tensor], ...]  # (tensor, copy of its values on the CPU)
    flags: tuple[tuple[nn.Parameter, bool], ...]  # requires_grad
    modes: tuple[tuple[nn.Module, bool], ...]  # training


def take_snapshot(models: nn.Module) -> Snapshot:
    """A snapshot of parameters, buffers, ties, requires_grad and train/eval modes; the copies are in CPU memory."""
    owners = [
        (module, key, tensor)
        for module in models.modules()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    ]
    distinct = {id(tensor): tensor for _, _, tensor in owners}.values()
    return Snapshot(
        owners=tuple(owners),
        adapters=tuple((module, adapter_of(module)) for _, module in own_modules(models)),
        affines=tuple((module, affine_of(module)) for _, module in own_modules(models)),
        values=tuple((tensor, tensor.detach().to("cpu", copy=True)) for tensor in distinct),
        flags=tuple((tensor, tensor.requires_grad) for tensor in distinct if isinstance(tensor, nn.Parameter)),
        modes=tuple((module, module.training) for module in models.modules()),
    )


@torch.no_grad()
def restore_snapshot(snapshot: Snapshot) -> None:
    """Undoes every tie, training step and change of statistics since the snapshot was taken."""
    for module, adapter in snapshot.adapters:
        if adapter_of(module) is not adapter:
            set_adapter(module, adapter)
    for module, affine in snapshot.affines:
        if affine_of(module) is not affine:
            set_affine(module, affine)
    for module, key, tensor in snapshot.owners:
        if getattr(module, key) is not tensor:
            setattr(module, key, tensor)
    for tensor, values in snapshot.values:
        tensor.copy_(values)
    for parameter, requires_grad in snapshot.flags:
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
    for module, training in snapshot.modes:
        module.training = training
