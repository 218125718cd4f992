import time

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.sharing.groups import (
    Occurrence,
    affected_tasks,
    find_groups,
    find_stem,
    restrict,
    saved_bytes,
    verified_part,
)
from gemel.sharing.memory import distinct_bytes
from model_architectures import build, names


class Scale(nn.Module):
    """A user's own layer."""

    def __init__(self, width: int):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(width))


def test_modules_of_users_are_shared_too():
    models = {"a_x": nn.Sequential(Scale(4), Scale(5)), "b_x": nn.Sequential(Scale(5), Scale(6))}
    (group,) = find_groups(models)
    assert group.occurrences == (Occurrence("a_x", "1"), Occurrence("b_x", "0")) and group.bytes == 20


def test_the_kth_layers_are_paired_and_a_task_is_once_in_a_group():
    models = {"a_x": PicoNet(extra=2), "b_x": PicoNet(extra=1), "c_x": PicoNet(num_classes=5)}
    groups = find_groups(models)
    by_layers = {tuple(group.occurrences) for group in groups}
    assert by_layers == {
        (("a_x", "conv1"), ("b_x", "conv1"), ("c_x", "conv1")),
        (("a_x", "conv2"), ("b_x", "conv2"), ("c_x", "conv2")),
        (("a_x", "more.0"), ("b_x", "more.0")),
        (("a_x", "fc"), ("b_x", "fc")),
    }
    assert all(len(set(group.tasks)) == len(group.tasks) for group in groups)
    assert [g.saved_bytes for g in groups] == sorted((g.saved_bytes for g in groups), reverse=True)


def test_classifier_and_detector_share_their_backbone():
    groups = find_groups({"a_x": PicoNet(num_classes=7), "b_x": PicoDetector()})
    assert {o.layer for group in groups for o in group.occurrences} == {"conv1", "conv2"}


def test_nothing_in_common():
    assert find_groups({"a_x": PicoNet(width=4), "b_x": PicoNet(width=6)}) == ()
    assert find_groups({"a_x": PicoNet()}) == ()


# DESIGN: share of the pair's bytes that identical convolutions and linear layers could save.
@pytest.mark.parametrize(
    "one, other, percent",
    [
        ("resnet18", "resnet34", 35),
        ("resnet50", "resnet101", 36.5),
        ("resnet50", "fasterrcnn_resnet50_fpn", 35),
        ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", 36),
        ("vgg16", "vgg19", 49),
        ("mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", 12),
        ("resnet50", "vgg16", 0),
        ("resnet18", "resnet18", 50),
    ],
)
def test_ceilings_of_torchvision_pairs(one, other, percent):
    def classes(name):
        return 91 if "fpn" in name or name.startswith("ssd") else 1000

    with torch.device("meta"):
        models = {"a_x": build(one, classes(one)), "b_x": build(other, classes(other))}
    assert 100 * saved_bytes(find_groups(models)) / distinct_bytes(models) == pytest.approx(percent, abs=1)


@pytest.mark.exhaustive
def test_grouping_every_model_of_torchvision_is_quick():
    with torch.device("meta"):
        models = {f"task{i}_x": build(name, 10) for i, name in enumerate(names())}
    began = time.process_time()  # not the clock on the wall: the machine may be busy
    groups = find_groups(models)
    assert time.process_time() - began < 20
    assert len(models) > 90 and len(groups) > 500


def test_a_stem_ends_where_models_differ():
    models = {"a_x": PicoNet(extra=1), "b_x": PicoNet(extra=2), "c_x": PicoNet(width=4)}
    assert find_stem(models, 0) == ()
    (first,) = find_stem(models, 1)
    assert first.occurrences == (("a_x", "conv1"), ("b_x", "conv1"))
    assert {g.occurrences[0].layer for g in find_stem(models, 99)} == {"conv1", "conv2", "more.0"}


def test_affected_tasks_follow_ties():
    models = {f"{k}_x": PicoNet() for k in "abcd"}
    groups = find_groups(models)
    kept = (groups[0].restricted_to(["a_x", "b_x"]), groups[0].restricted_to(["c_x", "d_x"]))
    assert affected_tasks(kept, (*kept, groups[1].restricted_to(["b_x", "c_x"]))) == ["a_x", "b_x", "c_x", "d_x"]
    assert affected_tasks((), kept[:1]) == ["a_x", "b_x"]
    assert affected_tasks(kept, (*kept, groups[1].restricted_to(["c_x", "d_x"]))) == ["c_x", "d_x"]


def test_the_verified_part_of_a_trial_leaves_the_other_tasks_as_they_were():
    names = ("a_x", "b_x", "c_x", "d_x")
    groups = find_groups({name: PicoNet() for name in names})
    everything = {o.task for group in groups for o in group.occurrences}
    assert verified_part((), groups, everything) == groups
    assert verified_part((), groups, ("a_x",)) == ()
    of_two = verified_part((), groups, ("a_x", "b_x"))
    assert of_two == restrict(groups, ("a_x", "b_x"))
    kept = restrict(groups, ("b_x", "c_x", "d_x"))
    split = verified_part(kept, groups, ("a_x", "b_x"))
    assert set(split) == {*restrict(groups, ("a_x", "b_x")), *restrict(kept, ("c_x", "d_x"))}
    assert saved_bytes(split) == 2 * saved_bytes(of_two)
