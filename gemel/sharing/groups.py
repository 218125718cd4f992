"""Which layers can share one set of parameters: signatures, groups and configurations.

Planned on module structure and tensor shapes alone; nothing here reads or changes a weight, so models on the meta
device can be planned for as well. Everything returned is frozen data.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from gemel.sharing.adapters import own_modules

NORMALISATION_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
NUM_COMPARED = 8  # layers at which a merged model is compared with its unmerged one
NORMALISATION_NAME = re.compile(r"(norm|bn)(_?\d+d?)?$", re.IGNORECASE)  # a user's own MyLayerNorm2d


class Occurrence(NamedTuple):
    """One layer of one task."""

    task: str
    layer: str  # name of the module in the task's model, "" for the model itself


class Layer(NamedTuple):
    """A module that owns parameters and may share them."""

    name: str
    signature: str
    bytes: int


@dataclass(frozen=True)
class Group:
    """Occurrences, at most one per task, that can share one set of parameters of `bytes` bytes.

    At a price: every occurrence then has a private residual of `rank` beside them (sharing/low_rank.py).
    """

    signature: str
    bytes: int
    occurrences: tuple[Occurrence, ...]
    rank: int = 0
    adapter_bytes: int = 0  # of one occurrence

    @property
    def saved_bytes(self) -> int:
        """Net of the residuals."""
        return self.bytes * (len(self.occurrences) - 1) - self.adapter_bytes * len(self.occurrences)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(occurrence.task for occurrence in self.occurrences)

    def restricted_to(self, tasks: Collection[str]) -> "Group":
        """The group without the occurrences of other tasks; with fewer than two left it shares nothing."""
        return replace(self, occurrences=tuple(o for o in self.occurrences if o.task in tasks))

    def with_adapters(self, rank: int, adapter_bytes: int) -> "Group":
        """The group with residuals of that rank, and of so many bytes for an occurrence."""
        return replace(self, rank=rank, adapter_bytes=adapter_bytes)


Configuration = tuple[Group, ...]  # the groups that are tied


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises: its few bytes stay private to each task, because its statistics matter."""
    return isinstance(module, NORMALISATION_TYPES) or bool(NORMALISATION_NAME.search(type(module).__name__))


def signature_of(module: nn.Module) -> str:
    """What must be equal for the parameters of two layers to be interchangeable.

    The module's class, its settings as it prints them itself (for a convolution: channels, kernel, stride, padding,
    groups ...), and name, dtype and shape of each parameter that it owns directly.
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
    layer of the same model (it follows that layer wherever it goes).
    """
    layers, seen = [], set()
    for name, module in own_modules(model):
        parameters = list(module.parameters(recurse=False))
        repeated = any(id(p) in seen for p in parameters)
        seen.update(map(id, parameters))
        if not parameters or repeated or is_normalisation(module):
            continue
        if all(p.is_floating_point() for p in parameters):
            layers.append(Layer(name, signature_of(module), sum(p.nbytes for p in parameters)))
    return layers


def find_groups(models: Mapping[str, nn.Module]) -> Configuration:
    """Every group of a workload, largest saving first: the k-th layer of a signature pairs with the k-th elsewhere."""
    members: dict[tuple[str, int], list[Occurrence]] = defaultdict(list)
    layer_bytes: dict[str, int] = {}
    for task, model in models.items():
        count: dict[str, int] = defaultdict(int)
        for layer in find_layers(model):
            members[layer.signature, count[layer.signature]].append(Occurrence(task, layer.name))
            layer_bytes[layer.signature] = layer.bytes
            count[layer.signature] += 1
    groups = (Group(signature, layer_bytes[signature], tuple(found)) for (signature, _), found in members.items())
    return ordered(group for group in groups if len(group.occurrences) > 1)


def find_stem(models: Mapping[str, nn.Module], depth: int) -> Configuration:
    """Groups over the first `depth` layers only: tasks share layer i if all their layers up to i are alike.

    Source: Jiang et al., "Mainstream: Dynamic Stem-Sharing for Multi-Tenant Video Processing", ATC 2018.
    """
    prefixes: dict[tuple[str, ...], list[Occurrence]] = defaultdict(list)
    layer_bytes: dict[str, int] = {}
    for task, model in models.items():
        layers = find_layers(model)[:depth]
        for end, layer in enumerate(layers, 1):
            prefixes[tuple(other.signature for other in layers[:end])].append(Occurrence(task, layer.name))
            layer_bytes[layer.signature] = layer.bytes
    groups = (Group(prefix[-1], layer_bytes[prefix[-1]], tuple(found)) for prefix, found in prefixes.items())
    return ordered(group for group in groups if len(group.occurrences) > 1)


def ordered(groups) -> Configuration:
    """A configuration in its one order: largest saving first, then by signature and occurrences."""
    return tuple(sorted(groups, key=lambda g: (-g.saved_bytes, g.signature, g.occurrences)))


def restrict(groups: Configuration, tasks: Collection[str]) -> Configuration:
    """The groups among these tasks only, without those that then share nothing."""
    trimmed = (group.restricted_to(tasks) for group in groups)
    return ordered(group for group in trimmed if len(group.occurrences) > 1)


def joined(*configurations: Configuration) -> Configuration:
    """One configuration that ties whatever any of these ties; groups with an occurrence in common become one.

    Its residuals are those of the last of them, since a later configuration says what becomes of an earlier one.
    """
    merged: list[Group] = []
    for group in (group for configuration in configurations for group in configuration):
        overlapping = [other for other in merged if set(group.occurrences) & set(other.occurrences)]
        parts = sorted([*overlapping, group], key=lambda part: -len(part.occurrences))
        occurrences = dict.fromkeys(occurrence for part in parts for occurrence in part.occurrences)
        merged = [other for other in merged if other not in overlapping]
        merged.append(replace(group, occurrences=tuple(occurrences)))
    return ordered(merged)


def around(kept: Configuration, groups: Configuration) -> Configuration:
    """The groups, made to agree with what is kept: what is tied stays together, and no task comes in twice.

    An occurrence joins the kept group with which its group has most in common; what does not fit is left out.
    """
    tied, found, left = {o for group in kept for o in group.occurrences}, list(kept), []
    for group in ordered(groups):
        partners = [i for i, other in enumerate(found) if set(other.occurrences) & set(group.occurrences)]
        if not partners:
            left.append(group)
            continue
        best = max(partners, key=lambda i: len(set(found[i].occurrences) & set(group.occurrences)))
        free = [o for o in group.occurrences if o not in tied and o.task not in found[best].tasks]
        found[best] = replace(found[best], occurrences=(*found[best].occurrences, *free))
        tied |= set(free)
    return ordered(replace(group, rank=0, adapter_bytes=0) for group in (*found, *left))


def to_plain(configuration: Configuration) -> list[dict]:
    """The configuration as JSON values; `shared_layers` of the manifest."""
    return [
        {"signature": g.signature, "bytes": g.bytes, "occurrences": [o._asdict() for o in g.occurrences]}
        | ({"rank": g.rank, "adapter_bytes": g.adapter_bytes} if g.rank else {})
        for g in configuration
    ]


def from_plain(plain: list[dict]) -> Configuration:
    """What `to_plain` made plain."""
    return ordered(
        Group(
            g["signature"],
            g["bytes"],
            tuple(Occurrence(o["task"], o["layer"]) for o in g["occurrences"]),
            g.get("rank", 0),
            g.get("adapter_bytes", g.get("residual_bytes", 0)),  # the key of earlier versions
        )
        for g in plain
    )


def saved_bytes(configuration: Configuration) -> int:
    """Bytes that a configuration saves."""
    return sum(group.saved_bytes for group in configuration)


def affected_tasks(before: Configuration, after: Configuration) -> list[str]:
    """Tasks whose weights change when ties go from `before` to `after`, directly or through other ties."""
    touched = {task for group in set(before) ^ set(after) for task in group.tasks}
    grown = True
    while grown:
        reached = {task for group in after if touched & set(group.tasks) for task in group.tasks}
        grown = not reached <= touched
        touched |= reached
    return sorted(touched)


def compared_layers(model: nn.Module, task: str, configuration: Configuration) -> list[str]:
    """Layers at which a merged model is compared with its unmerged one: tied ones over the depth, and the last."""
    names = [layer.name for layer in find_layers(model)]
    tied = {o.layer for group in configuration for o in group.occurrences if o.task == task}
    candidates = [name for name in names if name in tied]
    steps = (round(i * (len(candidates) - 1) / (NUM_COMPARED - 1)) for i in range(NUM_COMPARED))
    chosen = {candidates[step] for step in steps} if candidates else set()
    return [name for name in names if name in chosen | set(names[-1:])]
