"""What must be equal for a run to resume another one: the workload, its datasets, the options."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from gemel.datasets.folders import open_split
from gemel.datasets.layouts import open_layout
from gemel.sharing.memory import named_tensors
from gemel.workload import CLASSIFICATION, Task

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(tasks: Mapping[str, Task], folders: Mapping[str, Path], options: Mapping) -> dict:
    """Plain values by key; `folders` are the tasks' dataset folders, `options` whatever else decides the outcome."""
    return {"options": dict(options), "tasks": {name: _of_task(task, folders[name]) for name, task in tasks.items()}}


def differences(stored: Mapping, current: Mapping) -> list[str]:
    """One line per key that is not what it was, naming task or option, what was stored and what was got.

    Tasks that only one of the two has make no difference here: see `task_changes`.
    """
    lines = _differences("", stored["options"], current["options"])
    for name in stored["tasks"]:
        if name in current["tasks"]:
            lines += _differences(f"{name}: ", stored["tasks"][name], current["tasks"][name])
    return lines


def task_changes(stored: Mapping, current: Mapping) -> list[str]:
    """One line per task that was added or taken away."""
    before, now = stored["tasks"], current["tasks"]
    added = [f"{name}: a new task, added to what is there" for name in now if name not in before]
    return added + [f"{name}: the task is gone; what only it used is dropped" for name in before if name not in now]


def _differences(prefix: str, before: Mapping, now: Mapping) -> list[str]:
    return [
        f"{prefix}{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]


def _of_task(task: Task, folder: Path) -> dict:
    return {
        "model": model_digest(task.model),
        "dataset": f"{task.dataset} {dataset_digest(task, folder)}",
        "task": task.kind,
        "eval_method": _describe(task.eval_method),
        "transforms": f"train {_describe(task.train_transform)}, val {_describe(task.val_transform)}",
        "unmerged_acc": task.unmerged_acc,
        "tolerance": task.tolerance,
        "batch_size": task.batch_size,
        "background_class": task.background_class,
        "labels": task.labels,
        **task.reading.changes(),
    }


def model_digest(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and values of a model's state dict, shortened."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def dataset_digest(task: Task, folder: Path) -> str:
    """sha256 over the samples of all splits, shortened: name and size of each image, its label or its annotations.

    Images are not read, annotations are: another class id is a file of the same size. What is no sample, such as a
    file manager's hidden files, does not count.
    """
    digest = hashlib.sha256()
    layout = None if task.kind == CLASSIFICATION else open_layout(task, folder)
    for split in ("train", "val", "test"):
        for image, truth in open_split(task, folder, split, layout=layout).samples:
            name = image.relative_to(folder) if image.is_relative_to(folder) else os.path.relpath(image, folder)
            digest.update(os.fsencode(name) + f" {image.stat().st_size} ".encode())
            digest.update(truth.content() if layout else f"{truth}\n".encode())
    if layout and layout.class_names:  # by which Pascal VOC's labels are numbered
        digest.update(repr(layout.class_names).encode())
    return digest.hexdigest()[:16]


def _describe(function: object) -> str:
    """A function by its name, a transform by its settings (torchvision's print them)."""
    name = getattr(function, "__qualname__", None)
    return name if name else ADDRESS.sub("", repr(function))
