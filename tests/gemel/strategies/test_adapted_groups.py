"""Adapters of a budget: the same share of every layer, or more where tying is expected to hurt more."""

import json

import pytest
from pico import PicoNet
from torch import nn

from gemel.sharing.adapters import adapter_bytes, max_rank
from gemel.sharing.groups import find_groups
from gemel.strategies.adapted_groups import MAX_SHARE, AdaptedGroups
from gemel.strategies.adaptive import Adaptive
from gemel.strategies.phases import SEARCH, WITH_ADAPTERS
from gemel.thresholds import THRESHOLDS

NAMES = ("task0_x", "task1_x")
BUDGET = 0.125


class Wide(nn.Module):
    """Three layers of one size, whose adapters can have many ranks."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(96, 96 + i) for i in range(3))


def adapted_groups(build=Wide, budget: float = BUDGET) -> AdaptedGroups:
    models = {name: build() for name in NAMES}
    return AdaptedGroups(find_groups(models), models, budget)


def ranks_of(groups) -> list[int]:
    return [group.rank for group in groups]


def test_at_first_every_adapter_takes_the_same_share_of_its_layer():
    found = adapted_groups()
    for i, layer in enumerate(found.layers):
        own = sum(parameter.nbytes for parameter in layer.parameters())
        for groups, share in ((found.full, BUDGET), (found.smaller, THRESHOLDS.fill.smaller_adapters * BUDGET)):
            assert adapter_bytes(layer, groups[i].rank) <= share * own < adapter_bytes(layer, groups[i].rank + 1)


def test_more_ranks_where_it_hurts_more_in_no_more_bytes(monkeypatch):
    found, even = adapted_groups(), adapted_groups()
    found.allocate({0: 1e-6, 1: 1e-5, 2: 1e-4})
    for groups, before in ((found.full, even.full), (found.smaller, even.smaller)):
        assert ranks_of(groups) == sorted(ranks_of(groups)) and groups[0].rank < before[0].rank < groups[2].rank
        spent, limit = (sum(group.adapter_bytes for group in one) for one in (groups, before))
        assert limit - max(group.adapter_bytes // group.rank for group in groups) * len(groups) < spent <= limit


def test_where_it_hurts_alike_nothing_changes():
    found, even = adapted_groups(), adapted_groups()
    found.allocate(dict.fromkeys(range(3), 3e-7))
    for one, other in zip(ranks_of([*found.full, *found.smaller]), ranks_of([*even.full, *even.smaller]), strict=True):
        assert abs(one - other) <= 1


def test_only_the_given_groups_change():
    found, even = adapted_groups(), adapted_groups()
    found.allocate({1: 1e-3, 2: 1e-9})
    assert found.full[0] == even.full[0] and found.smaller[0] == even.smaller[0]
    assert found.full[1].rank > even.full[1].rank


@pytest.mark.parametrize("density", [0.0, 1e-30])
def test_no_adapter_is_lost_or_grows_without_bound(density):
    found = adapted_groups()
    found.allocate({0: 1.0, 1: density, 2: density})
    for group, layer in zip(found.full, found.layers, strict=True):
        own = sum(parameter.nbytes for parameter in layer.parameters())
        assert 1 <= group.rank <= max_rank(layer) and group.adapter_bytes <= MAX_SHARE * own


def test_nothing_is_known_of_any_group():
    found, even = adapted_groups(), adapted_groups()
    found.allocate({0: 0.0, 1: 0.0})
    found.allocate({})
    assert ranks_of(found.full)[2] == ranks_of(even.full)[2] and min(ranks_of(found.full)) >= 1


def test_layers_that_cannot_have_an_adapter_have_none():
    found = adapted_groups(PicoNet, 0.01)
    found.allocate({i: 1.0 for i in range(len(found.groups))})
    assert found.full == list(found.groups)


def test_they_are_stored_with_the_search():
    models = {name: Wide() for name in NAMES}
    strategy = Adaptive(models, adapter_budget=BUDGET)
    strategy.sensitivity.errors = {(i, name): 10.0 ** -(3 - i) for i in range(3) for name in NAMES}
    strategy._begin_filling(WITH_ADAPTERS)
    uneven = strategy.adapted.ranks
    assert uneven != AdaptedGroups(strategy.groups, models, BUDGET).ranks
    assert strategy.parts == [dict.fromkeys(range(3), NAMES)]
    other = Adaptive(models, adapter_budget=BUDGET)
    other.load_state(json.loads(json.dumps(strategy.state())))
    assert other.adapted.ranks == uneven and other.propose() == strategy.propose()


def test_what_is_kept_with_adapters_keeps_their_ranks():
    models = {name: Wide() for name in NAMES}
    strategy = Adaptive(models, adapter_budget=BUDGET)
    strategy.sensitivity.errors = {(i, name): 10.0 ** -(3 - i) for i in range(3) for name in NAMES}
    strategy.own = (strategy.adapted.full[0],)
    before = strategy.adapted.ranks
    strategy._begin_filling(WITH_ADAPTERS)
    assert strategy.adapted.ranks == before


def test_a_state_of_an_earlier_version_has_even_ranks():
    strategy = Adaptive({name: Wide() for name in NAMES}, adapter_budget=BUDGET)
    before, state = strategy.adapted.ranks, strategy.state()
    del state["ranks"]
    strategy.load_state(state)
    assert strategy.adapted.ranks == before and strategy.phase == SEARCH
