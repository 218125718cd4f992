import dataclasses

import pytest
from pico import PicoNet

from gemel.sharing.groups import Group, Occurrence, compared_layers, find_groups
from gemel.sharing.memory import Memory, distinct_bytes
from gemel.sharing.tying import tie


def test_a_shared_tensor_counts_once():
    models = {"a_x": PicoNet(), "b_x": PicoNet(extra=1)}
    before, groups = distinct_bytes(models), find_groups(models)
    tie(models, groups[:1])
    assert distinct_bytes(models) == before - groups[0].bytes


def test_what_was_saved_of_what_could_be():
    assert Memory(100, 70, 40).saved_bytes == 30 and Memory(100, 70, 40).saved_of_optimal == 0.75
    assert Memory(100, 100, 0).saved_of_optimal == 1.0, "nothing could be saved, and nothing is missing"


@pytest.mark.parametrize("value", [Memory(2, 1, 1), Group("Linear", 8, (Occurrence("a_x", "fc"),))])
def test_a_plan_cannot_be_changed(value):
    """So that a configuration can be a key, and be kept while others are tried."""
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, 0)
    assert hash(value) == hash(dataclasses.replace(value))


def test_compared_layers_are_the_tied_ones_over_the_depth_of_a_task_and_its_last():
    models = {"a_x": PicoNet(extra=20), "b_x": PicoNet(extra=20)}
    groups = find_groups(models)
    of_a = [f"more.{i}" for i in range(20)]
    tied = tuple(group for group in groups if group.occurrences[0].layer in of_a)
    found = compared_layers(models["a_x"], "a_x", tied)
    assert found == [f"more.{i}" for i in (0, 3, 5, 8, 11, 14, 16, 19)] + ["fc"]
    assert compared_layers(models["a_x"], "a_x", ()) == compared_layers(models["a_x"], "c_x", tied) == ["fc"]
    (stem,) = (group for group in groups if group.occurrences[0].layer == "conv1")
    assert compared_layers(models["a_x"], "a_x", (stem,)) == ["conv1", "fc"]
