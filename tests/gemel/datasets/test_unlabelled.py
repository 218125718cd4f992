"""Tasks whose train images have no labels: recovered from their unmerged models alone."""

import copy
import shutil

import pytest
import torch
from pico import PicoDetector, PicoNet, classification_entry, detection_entry

from dataset_manager import open_task
from gemel.datasets.checks import check
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.workload import read_workload
from merge_workloads import merge_workload

CPU = torch.device("cpu")


@pytest.fixture
def unlabelled(datasets, tmp_path):
    """The datasets without what says what is on the images of train."""
    root = tmp_path / "datasets"
    for name in ("north_CL", "south_CL", "east_OD"):
        shutil.copytree(datasets / name, root / name)
    train = root / "north_CL" / "train"
    for i, image in enumerate(sorted(train.rglob("*.png"))):
        shutil.move(image, train / f"{i}.png" if i % 2 else train / "class0" / f"moved{i}.png")
    for folder in ("class1", "class2"):
        (train / folder).rmdir()
    shutil.rmtree(root / "east_OD" / "train" / "annotations")
    return root


def test_images_are_found_anywhere_and_classes_come_from_val(unlabelled, entries):
    tasks, _ = read_workload({name: {**entry, "labels": False} for name, entry in entries.items()})
    assert check(tasks, [unlabelled]) == []
    data = {name: open_task(task, [unlabelled], device=CPU, seed=0, batch_size=6) for name, task in tasks.items()}
    assert len(data["north_pico"].train.dataset) == 24 and data["north_pico"].class_names == (
        "class0",
        "class1",
        "class2",
    )
    assert all((labels == -1).all() for _, labels in data["north_pico"].train)
    assert {int(label) for _, labels in data["north_pico"].val for label in labels} == {0, 1, 2}
    assert all(len(target["boxes"]) == 0 for _, targets in data["east_pico"].train for target in targets)
    assert any(len(target["boxes"]) for _, targets in data["east_pico"].val for target in targets)


def test_labels_that_are_missing_and_not_announced_are_an_error(unlabelled, entries):
    tasks, _ = read_workload(entries)
    wrong = {problem.task for problem in check(tasks, [unlabelled])}
    assert wrong == {"north_pico", "east_pico"}
    (problem,) = read_workload({"north_pico": {**entries["north_pico"], "labels": "no"}})[1]
    assert problem.key == "labels" and "True or False" in problem.allowed


def test_losses_of_a_classifier_come_from_its_teacher_alone():
    torch.manual_seed(0)
    tasks, _ = read_workload({"a_pico": classification_entry(PicoNet(3), labels=False)})
    task = tasks["a_pico"]
    teacher = Teacher(task.model, copy.deepcopy(task.model).eval(), ["conv2"])
    with torch.no_grad():
        task.model.fc.weight += 0.1 * torch.randn(3, 8)
    losses = task_losses(task, (torch.rand(4, 3, 16, 16), torch.full((4,), -1)), CPU, teacher)
    assert set(losses) == {"features", "probabilities"} and float(losses["probabilities"]) > 0


def test_a_detector_learns_from_what_its_teacher_is_sure_of(monkeypatch):
    torch.manual_seed(0)
    tasks, _ = read_workload({"a_pico": detection_entry(PicoDetector(), labels=False)})
    task = tasks["a_pico"]
    teacher = Teacher(task.model, copy.deepcopy(task.model).eval(), ["conv2"])
    images = [torch.rand(3, 16, 16) for _ in range(4)]
    monkeypatch.setattr("gemel.training.distillation.MIN_SCORE", 0.0)
    found = teacher.detections(images)
    assert [len(target["boxes"]) for target in found] == [2, 2, 2, 2] and found[0]["labels"].min() >= 1
    monkeypatch.setattr("gemel.training.distillation.MIN_SCORE", 1.1)
    assert [len(target["boxes"]) for target in teacher.detections(images)] == [0, 0, 0, 0]
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]
    task.model.train()
    assert set(task_losses(task, (images, nothing), CPU, teacher)) == {"classification", "boxes", "features"}


@pytest.mark.parametrize("strategy", ["adaptive", "all"])
def test_a_workload_without_labels_merges(entries, unlabelled, tmp_path, strategy):
    entries = {name: {**entry, "labels": name == "south_pico"} for name, entry in entries.items()}
    options = {"learning_rate": 0.02, "max_epochs": 60, "patience_epochs": 10, "tolerance": 0.6}
    manifest = merge_workload(
        entries, tmp_path / "results", datasets=unlabelled, device="cpu", strategy=strategy, **options
    )
    assert manifest["memory"]["saved_bytes"] > 0
    assert all(task["met"] for task in manifest["tasks"].values())
