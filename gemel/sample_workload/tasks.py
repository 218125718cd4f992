"""The tasks of the embedded default: what is drawn and trained for them, and where it is stored.

All backbones descend from one ancestor, as in practice they descend from ImageNet weights: a classifier of the crops of
both cameras, and a detector of the frames of both cameras that starts from it. Each task starts from an ancestor and is
trained on its own camera, so the weights differ but are related, as those of fine-tuned models are.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gemel.sample_workload.objects import KINDS
from gemel.workload import CLASSIFICATION, DETECTION
from model_architectures import build, load_weights

SAMPLE_ROOT = Path(__file__).resolve().parents[2] / "sample_data"
DATASETS_ROOT = SAMPLE_ROOT / "datasets"
CROP_SIZE, FRAME_SIZE = 40, 128  # pixels a side
WIDTH = 24  # channels of the first stage, the same in all models
SHALLOW, DEEP = (1, 1, 1, 1), (1, 1, 2, 1)
SPLITS = ("train", "val", "test")


class SampleTask(NamedTuple):
    """One task of the workload, or an ancestor: its cameras and classes, its model, how long it is trained."""

    cameras: tuple[str, ...]
    kind: str
    classes: tuple[str, ...]  # in the order of the class ids
    builder: str
    num_classes: int  # as the builder counts: with the background for a detector
    kwargs: dict[str, Any]
    epochs: int
    learning_rate: float
    parent: str | None  # the ancestor whose weights it starts from


class Plan(NamedTuple):
    """How much is drawn and trained; tuples are for train, val and test."""

    scenes: tuple[int, int, int] = (228, 70, 25)  # per camera, one frame each
    crops: tuple[int, int, int] = (240, 60, 20)  # at most, per camera and class, cut out of the scenes
    epochs: float = 1.0  # factor for the epochs of every task


PLAN = Plan()


def _classifier(cameras: tuple, classes: tuple, layers: tuple, epochs: int, parent: str | None) -> SampleTask:
    rate = 4e-3 if parent else 8e-3
    kwargs = {"layers": layers, "width": WIDTH}
    return SampleTask(cameras, CLASSIFICATION, classes, "slim_resnet", len(classes), kwargs, epochs, rate, parent)


def _detector(cameras: tuple, classes: tuple, epochs: int, parent: str) -> SampleTask:
    kwargs = {"backbone": "slim_resnet", "layers": SHALLOW, "width": WIDTH, "head_convs": 1, "min_size": FRAME_SIZE}
    return SampleTask(cameras, DETECTION, classes, "fcos_model", len(classes) + 1, kwargs, epochs, 3e-3, parent)


MAIN, ELM, VEHICLES = ("main_2nd",), ("elm_1st",), ("car", "motorcycle", "truck")
ANCESTORS = {
    "ancestor_resnet12": _classifier(MAIN + ELM, KINDS, DEEP, 5, None),
    "ancestor_fcos": _detector(MAIN + ELM, KINDS, 2, "ancestor_resnet12"),
}
TASKS = {
    "main_2nd_vehicles_resnet10": _classifier(MAIN, VEHICLES, SHALLOW, 8, "ancestor_resnet12"),
    "elm_1st_street_resnet12": _classifier(ELM, KINDS, DEEP, 8, "ancestor_resnet12"),
    "main_2nd_traffic_fcos": _detector(MAIN, KINDS, 4, "ancestor_fcos"),
    "elm_1st_traffic_fcos": _detector(ELM, KINDS, 4, "ancestor_fcos"),
}


def dataset_roots(tasks: Iterable[str], datasets: Path) -> list[Path]:
    """Where datasets of these tasks are looked for: `datasets`; for the embedded default also where they are drawn."""
    return [datasets, *([DATASETS_ROOT] if set(tasks) <= set(TASKS) else [])]


def load_trained(name: str, root: Path = SAMPLE_ROOT) -> nn.Module:
    """The trained model of a task; prepare() must have trained it."""
    return load_weights(new_model(name), weights_path(name, root))


def weights_path(name: str, root: Path = SAMPLE_ROOT) -> Path:
    """The file of a task's trained weights, a state dict."""
    return Path(root) / "weights" / f"{name}.pt"


def unmerged_acc(name: str, root: Path = SAMPLE_ROOT) -> float:
    """The accuracy of a task on val, measured by its eval method after training; prepare() must have trained it."""
    return json.loads(stamp_path(name, root).read_text())["unmerged_acc"]


def task_named(name: str) -> SampleTask:
    """A task or an ancestor by its name. Raises ValueError if there is none."""
    known = {**ANCESTORS, **TASKS}
    if name not in known:
        raise ValueError(f"sample workload: got the task {name!r}; allowed: {', '.join(TASKS)}")
    return known[name]


def new_model(name: str) -> nn.Module:
    """The model of a task with random weights."""
    task = task_named(name)
    return build(task.builder, task.num_classes, **task.kwargs)


def stamp_path(name: str, root: Path) -> Path:
    """The file with a task's accuracy; it is written after the weights, which are incomplete without it."""
    return weights_path(name, root).with_suffix(".json")
