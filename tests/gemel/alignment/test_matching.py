import copy

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.alignment.matching import match_groups
from gemel.sharing.groups import Group, Occurrence, find_groups, reconciled, saved_bytes

BATCH = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5


def net(seed: int = 0, extra: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    model = PicoNet(extra=extra)
    with torch.no_grad():  # layers whose weights differ
        for i, layer in enumerate([model.conv2, *model.more]):
            layer.weight[: i + 1] *= 3 + i
    return model.eval()


def pairs(groups) -> set[tuple[str, ...]]:
    return {tuple(occurrence.layer for occurrence in group.occurrences) for group in groups}


def test_by_order_is_find_groups():
    models = {"a_x": net(), "b_x": net(1, extra=2)}
    assert match_groups(models) == match_groups(models, "order") == find_groups(models)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_the_most_similar_layers_are_paired(by):
    """A copy without two of the layers: its layers are paired with those they are copies of, not with the k-th."""
    long, short = net(), net(extra=2)
    short.load_state_dict(long.state_dict(), strict=False)
    short.conv2.load_state_dict(long.conv2.state_dict())
    for i, j in ((0, 2), (1, 3)):
        short.more[i].load_state_dict(long.more[j].state_dict())
    if by == "activations":  # the same inputs and outputs: the layers left out do nothing in the long one
        for i in (0, 1):
            nn.init.dirac_(long.more[i].weight)
            nn.init.zeros_(long.more[i].bias)
    models = {"a_x": long, "b_x": short}
    groups = match_groups(models, by, {task: [BATCH] for task in models})
    assert {("more.2", "more.0"), ("more.3", "more.1")} <= pairs(groups)
    assert saved_bytes(groups) == saved_bytes(find_groups(models)) and pairs(groups) != pairs(find_groups(models))


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_the_order_of_channels_does_not_matter(by):
    long = net()
    other = copy.deepcopy(long)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        other.more[1].weight.copy_(long.more[1].weight[order])
        other.more[1].bias.copy_(long.more[1].bias[order])
        other.more[2].weight.copy_(long.more[2].weight[:, order])
    models = {"a_x": long, "b_x": other}
    assert match_groups(models, by, {task: [BATCH] for task in models}) == find_groups(models)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_groups_are_sound_and_save_as_much(by):
    models = {"a_x": net(1, 1), "b_x": net(2, 4), "c_x": net(3, 3), "d_x": PicoDetector()}
    images = {task: [BATCH if task != "d_x" else [*BATCH]] for task in models}
    groups = match_groups(models, by, images)
    assert saved_bytes(groups) == saved_bytes(find_groups(models))
    occurrences = [occurrence for group in groups for occurrence in group.occurrences]
    assert len(occurrences) == len(set(occurrences))
    assert all(len(set(group.tasks)) == len(group.tasks) > 1 for group in groups)
    assert list(groups) == sorted(groups, key=lambda g: (-g.saved_bytes, g.signature, g.occurrences))
    assert groups == match_groups(models, by, images)


def test_wrong_input_is_named_all_at_once():
    with pytest.raises(ValueError, match="by: got 'luck'"):
        match_groups({"a_x": net()}, "luck")
    with pytest.raises(ValueError, match="a_x: images.*\n.*b_x: images"):
        match_groups({"a_x": net(), "b_x": net()}, "activations")


def test_groups_are_reconciled_with_those_that_are_kept():
    def group(*names):
        return Group("x", 4, tuple(Occurrence(*name.split(".")) for name in names))

    kept = (group("a.1", "b.2").with_adapters(1, 1),)
    found = reconciled(kept, (group("a.1", "b.1", "c.1"), group("a.2", "b.2", "c.2"), group("a.3", "c.3")))
    tied = [set(g.occurrences) for g in found]
    assert any(set(kept[0].occurrences) < occurrences for occurrences in tied), "what is tied stays, and grows"
    assert all(len(set(g.tasks)) == len(g.tasks) for g in found) and not any(g.rank for g in found)
    assert sum(map(len, tied)) == len(set().union(*tied)), "an occurrence is in one group"
    assert set(group("a.3", "c.3").occurrences) in tied
