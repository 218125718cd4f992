"""What makes a run another one: any change of the workload, its datasets and the options, and nothing else."""

import copy
import json
import os
import types
from functools import partial

import pytest
import torch
from pico import (
    PicoDetector,
    PicoNet,
    classification_entry,
    detection_entry,
    to_tensor,
    write_classification,
    write_detection,
)
from torchvision.transforms import v2

from gemel.merging.fingerprint import REFINES, differences, fingerprint, task_changes
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


class Crop:
    """A transform of a user, without a repr of its own."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        return to_tensor(image)[:, : self.size, : self.size]


def evaluation(threshold):
    def accuracy(model, loader):
        return 0.5 + threshold

    return accuracy


def with_transforms(transform):
    return lambda entries: entries["cars_net"].update(transforms={"train": transform, "val": to_tensor})


def with_method(method):
    return lambda entries: entries["cars_net"].update(eval_method=method)


@pytest.mark.parametrize(
    "one, other, key",
    [
        (with_transforms(Crop(8)), with_transforms(Crop(4)), "transforms_code"),
        (with_transforms(lambda i: to_tensor(i)), with_transforms(lambda i: to_tensor(i) + 1), "transforms_code"),
        (with_method(evaluation(0.1)), with_method(evaluation(0.2)), "eval_method_code"),
        (lambda entries: None, lambda e: setattr(e["cars_net"]["model"].conv2, "stride", (2, 2)), "model_settings"),
    ],
)
def test_what_is_inside_counts(entries, tmp_path, one, other, key):
    """Settings of objects, constants and closures of functions, settings of layers: their names are the same."""
    marks = []
    for change in (one, other):
        changed = copy.deepcopy(entries)
        change(changed)
        marks.append(json.loads(json.dumps(mark(changed, tmp_path))))
    (line,) = differences(*marks)
    assert line.startswith(f"cars_net: {key}: was 'python 3.") and differences(marks[0], marks[0]) == []
    assert differences(*[{**m, "tasks": {n: older(t) for n, t in m["tasks"].items()}} for m in marks]) == []


def older(task: dict) -> dict:
    """As earlier versions wrote it."""
    return {key: value for key, value in task.items() if key not in REFINES}


def test_what_a_transform_yields_counts(entries, tmp_path, monkeypatch):
    """It does something else although nothing in it is different: a library behind it is."""
    before = mark(entries, tmp_path)
    module = types.ModuleType("behind")
    module.scale = 1.0
    transform = eval("lambda image: to_tensor(image) * behind.scale", {"to_tensor": to_tensor, "behind": module})
    with_transforms(transform)(entries)
    before = mark(entries, tmp_path)
    assert differences(before, mark(entries, tmp_path)) == []
    module.scale = 1.0 + 1e-6
    assert differences(before, mark(entries, tmp_path)) == [], "as machines round differently"
    module.scale = 0.5
    (line,) = differences(before, mark(entries, tmp_path))
    assert line.startswith("cars_net: transforms_yield: was ")


def test_a_transform_that_draws_its_own_numbers_is_not_compared(entries, tmp_path):
    with_transforms(lambda image: to_tensor(image) * float.fromhex("0x" + os.urandom(1).hex()))(entries)
    marks = [mark(entries, tmp_path) for _ in range(2)]
    assert differences(*marks) == [] and marks[0]["tasks"]["cars_net"]["transforms_yield"]["train"] == "random"


@pytest.mark.parametrize("keeps_time", [True, False])
def test_an_image_that_is_replaced_in_place_is_noticed(changes, tmp_path, keeps_time):
    """By another of the same size in bytes; by its content, and by its time alone where its content does not count."""
    image = tmp_path / "cars_CL" / "val" / "class1" / "0.png"
    content, status = bytearray(image.read_bytes()), image.stat()
    if keeps_time:
        content[-20] ^= 1  # in the checksum of a chunk: no decoder sees it
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + (0 if keeps_time else 10**9)))
    (line,) = changes()
    assert line.startswith(f"cars_net: {'dataset_content' if keeps_time else 'dataset_times'}: was ")
