"""Groups with the largest adapters that a budget allows."""

from collections.abc import Mapping

from torch import nn

from gemel.sharing.adapters import adapter_bytes, rank_within
from gemel.sharing.groups import Configuration, Group


def with_adapters(groups: Configuration, models: Mapping[str, nn.Module], adapter_budget: float) -> list[Group]:
    """Each group with an adapter per task, of at most this share of the layer's bytes; without, where there is none."""
    return [_with_adapters(group, models, adapter_budget) for group in groups]


def _with_adapters(group: Group, models: Mapping[str, nn.Module], adapter_budget: float) -> Group:
    first = group.occurrences[0]
    layer = models[first.task].get_submodule(first.layer)
    rank = rank_within(layer, adapter_budget)
    return group.with_adapters(rank, group.as_counted(layer, adapter_bytes(layer, rank))) if rank else group
