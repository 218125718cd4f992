"""Which layers can share one set of parameters: groups and configurations.

They follow from module structure and tensor shapes alone; no weight is read or changed here, so models on the meta
device work as well. Everything returned is frozen data.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from gemel.forward.modes import Models
from gemel.sharing.signatures import find_layers

NUM_COMPARED = 8  # tied layers at which a merged model is compared with its unmerged one


class Occurrence(NamedTuple):
    """One layer of one task."""

    task: str
    layer: str  # name of the module in the task's model, "" for the model itself


@dataclass(frozen=True)
class Group:
    """Occurrences, at most one per task, that can share one set of parameters of `bytes` bytes.

    rank: of the private adapter that each occurrence has beside the shared parameters (adapters.py); 0: none.
    affine_bytes: of the private scale and bias of each occurrence (affine.py); 0: it has none.
    """

    signature: str
    bytes: int
    occurrences: tuple[Occurrence, ...]
    rank: int = 0
    adapter_bytes: int = 0  # of one occurrence
    affine_bytes: int = 0

    @property
    def private_bytes(self) -> int:
        """Bytes that one occurrence has beside the shared parameters."""
        return self.adapter_bytes + self.affine_bytes

    @property
    def saved_bytes(self) -> int:
        """What sharing saves, less the bytes that each occurrence has beside the shared parameters."""
        return self.bytes * (len(self.occurrences) - 1) - self.private_bytes * len(self.occurrences)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(occurrence.task for occurrence in self.occurrences)

    def as_counted(self, layer: nn.Module, num_bytes: int) -> int:
        """Bytes of something of the layer's type beside its weight, in the type of the store.

        Half of them where the group's bytes are counted in 16 bits; beside weights in 8 bits it stays float32.
        """
        is_halved = 2 * self.bytes == sum(parameter.nbytes for parameter in layer.parameters(recurse=False))
        return num_bytes // 2 if is_halved else num_bytes

    def restricted_to(self, tasks: Collection[str]) -> "Group":
        """The group without the occurrences of other tasks; with fewer than two left it shares nothing."""
        return replace(self, occurrences=tuple(o for o in self.occurrences if o.task in tasks))

    def with_adapters(self, rank: int, adapter_bytes: int) -> "Group":
        """The group with adapters of that rank, each of adapter_bytes, in place of private scales and biases.

        Both together were better for one workload and worse for another: benchmarks/LOG.md, 2026-11-26 Private scale.
        """
        return replace(self, rank=rank, adapter_bytes=adapter_bytes, affine_bytes=0)


Configuration = tuple[Group, ...]  # the groups that are tied


def find_groups(models: Models) -> Configuration:
    """Every group of a workload, largest saving first: the k-th layer of a signature in each task."""
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


def find_stem(models: Models, depth: int) -> Configuration:
    """Groups over the first `depth` layers only: tasks share layer i if their layers up to i have equal signatures.

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


def ordered(groups: Iterable[Group]) -> Configuration:
    """The groups in the order of a configuration: largest saving first, then by signature and occurrences."""
    return tuple(sorted(groups, key=lambda g: (-g.saved_bytes, g.signature, g.occurrences)))


def restrict(groups: Configuration, tasks: Collection[str]) -> Configuration:
    """The groups without the occurrences of other tasks; a group that then shares nothing is left out."""
    trimmed = (group.restricted_to(tasks) for group in groups)
    return ordered(group for group in trimmed if len(group.occurrences) > 1)


def verified_part(kept: Configuration, trial: Configuration, met: Collection[str]) -> Configuration:
    """What may be kept of a trial that failed: what the tasks of `met` share in it, what all others shared before.

    No weights of the others change, and those of the tasks in `met` do not depend on the others. A group that was kept
    may come out split in two.
    """
    others = {task for group in (*kept, *trial) for task in group.tasks} - set(met)
    return ordered((*restrict(trial, met), *restrict(kept, others)))


def joined(*configurations: Configuration) -> Configuration:
    """One configuration that ties all that any of these ties; groups with an occurrence in common become one.

    Such a group has the adapters, and the scales and biases, that it has in the last of the configurations.
    """
    merged: list[Group] = []
    for group in (group for configuration in configurations for group in configuration):
        overlapping = [other for other in merged if set(group.occurrences) & set(other.occurrences)]
        parts = sorted([*overlapping, group], key=lambda part: -len(part.occurrences))
        occurrences = dict.fromkeys(occurrence for part in parts for occurrence in part.occurrences)
        merged = [other for other in merged if other not in overlapping]
        merged.append(replace(group, occurrences=tuple(occurrences)))
    return ordered(merged)


def reconciled(kept: Configuration, groups: Configuration) -> Configuration:
    """The groups, changed so that each kept group is a part of one of them; all without adapters,
    scales and biases.

    Of a group that has occurrences in common with kept groups, the others are added to the kept group with which it has
    most in common, except those that are in a kept group already and those of a task that this one holds already.
    """
    tied, found, disjoint = {o for group in kept for o in group.occurrences}, list(kept), []
    for group in ordered(groups):
        partners = [i for i, other in enumerate(found) if set(other.occurrences) & set(group.occurrences)]
        if not partners:
            disjoint.append(group)
            continue
        best = max(partners, key=lambda i: len(set(found[i].occurrences) & set(group.occurrences)))
        free = [o for o in group.occurrences if o not in tied and o.task not in found[best].tasks]
        found[best] = replace(found[best], occurrences=(*found[best].occurrences, *free))
        tied |= set(free)
    return ordered(replace(group, rank=0, adapter_bytes=0, affine_bytes=0) for group in (*found, *disjoint))


def to_plain(configuration: Configuration) -> list[dict]:
    """The configuration as JSON values; `shared_layers` of the manifest."""
    return [
        {"signature": g.signature, "bytes": g.bytes, "occurrences": [o._asdict() for o in g.occurrences]}
        | ({"rank": g.rank, "adapter_bytes": g.adapter_bytes} if g.rank else {})
        | ({"affine_bytes": g.affine_bytes} if g.affine_bytes else {})
        for g in configuration
    ]


def from_plain(plain: list[dict]) -> Configuration:
    """The configuration that `to_plain` was given."""
    return ordered(
        Group(
            g["signature"],
            g["bytes"],
            tuple(Occurrence(o["task"], o["layer"]) for o in g["occurrences"]),
            g.get("rank", 0),
            g.get("adapter_bytes", g.get("residual_bytes", 0)),  # the key of earlier versions
            g.get("affine_bytes", 0),
        )
        for g in plain
    )


def saved_bytes(configuration: Configuration) -> int:
    """Bytes that the configuration saves."""
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
    """Layers at which a merged model is compared with its unmerged one: tied ones over its depth, and the last."""
    names = [layer.name for layer in find_layers(model)]
    tied = {o.layer for group in configuration for o in group.occurrences if o.task == task}
    candidates = [name for name in names if name in tied]
    steps = (round(i * (len(candidates) - 1) / (NUM_COMPARED - 1)) for i in range(NUM_COMPARED))
    chosen = {candidates[step] for step in steps} if candidates else set()
    return [name for name in names if name in chosen | set(names[-1:])]
