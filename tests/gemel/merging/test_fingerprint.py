"""What makes a run another one: any change of the workload, its datasets and the options, and nothing else."""

import copy
import os
from functools import partial

import pytest
import torch
from pico import PicoDetector, PicoNet, classification_entry, detection_entry, write_classification, write_detection
from torchvision.transforms import v2

from gemel.merging.fingerprint import differences, fingerprint, task_changes
from gemel.workload import read_workload

OPTIONS = {"strategy": "gemel", "seed": 0}


@pytest.fixture
def entries(tmp_path):
    write_classification(tmp_path, "cars_CL", classes=3, images=2)
    write_detection(tmp_path, "vans_OD", classes=2, images=6)
    return {"cars_net": classification_entry(PicoNet(3)), "vans_net": detection_entry(PicoDetector())}


@pytest.fixture
def changes(entries, tmp_path):
    """Applies a change to a copy of the entries, or to the disk; returns what differs afterwards."""
    before = mark(entries, tmp_path)

    def apply(change=lambda entries: None, **options):
        after = copy.deepcopy(entries)
        change(after)
        return differences(before, mark(after, tmp_path, **options))

    return apply


def mark(entries, root, **options):
    tasks, problems = read_workload(entries)
    assert not problems
    return fingerprint(tasks, {name: root / task.dataset for name, task in tasks.items()}, {**OPTIONS, **options})


def test_the_same_is_the_same(changes):
    assert changes() == []


def test_options_and_tasks_are_named(changes):
    assert changes(seed=1) == ["seed: was 0, is 1"]
    assert changes(lambda entries: entries.pop("vans_net")) == [], "tasks may come and go"
    assert changes(lambda entries: entries["cars_net"].update(tolerance=0.5)) == [
        "cars_net: tolerance: was 0.95, is 0.5"
    ]


def test_tasks_that_come_and_go_are_named(entries, tmp_path):
    everyone = mark(entries, tmp_path)
    fewer = mark({name: entry for name, entry in entries.items() if name != "vans_net"}, tmp_path)
    assert task_changes(everyone, fewer) == ["vans_net: the task is gone; what only it used is dropped"]
    assert task_changes(fewer, everyone) == ["vans_net: a new task, added to what is there"]
    assert task_changes(everyone, everyone) == []


def test_one_weight_is_enough(changes):
    def nudge(entries):
        with torch.no_grad():
            entries["vans_net"]["model"].conv1.weight[0, 0, 0, 0] += 1e-6

    (line,) = changes(nudge)
    assert line.startswith("vans_net: model: was ")


def test_transforms_are_compared_by_their_settings(changes):
    def resize(size):
        transforms = {"train": v2.Resize(size), "val": partial(torch.clamp, min=0)}
        return lambda entries: entries["cars_net"].update(transforms=transforms)

    (first,), (second,), (again,) = changes(resize(8)), changes(resize(9)), changes(resize(8))
    assert first != second and first == again


def test_a_class_id_that_changes_is_noticed(changes, tmp_path):
    """The file keeps its name and its size."""
    path = tmp_path / "vans_OD" / "val" / "annotations" / "frame0.txt"
    path.write_text("1" + path.read_text()[1:])
    (line,) = changes()
    assert line.startswith("vans_net: dataset: was 'vans_OD ")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_image_more_is_noticed_also_behind_a_link(changes, entries, tmp_path, split):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    image = (tmp_path / "cars_CL" / "train" / "class0" / "0.png").read_bytes()
    (folder / os.fsdecode(b"\xff.png")).write_bytes(image)  # no valid UTF-8, which is legal in file names
    classes = tmp_path / "cars_CL" / split / "class3"
    classes.parent.mkdir(exist_ok=True)
    classes.symlink_to(folder)
    (tmp_path / "cars_CL" / "train" / "class3").mkdir(exist_ok=True)
    before = changes()
    (folder / "more.png").write_bytes(image)
    assert before != changes() != []


def test_what_is_no_sample_does_not_count(changes, tmp_path):
    (tmp_path / "cars_CL" / "train" / "class0" / ".DS_Store").write_bytes(b"1")
    (tmp_path / "vans_OD" / "train" / "annotations" / "classes.txt").write_text("car")
    (tmp_path / "vans_OD" / "README").write_text("2024")
    assert changes() == []
