"""What must be equal for a run to resume another one: the workload, its datasets, the options.

Functions and transforms are compared by name, by what they are made of (gemel/environment/describe.py), and transforms
by what they yield for a few images; models by weights and settings; images by name, size and time, a few by content.
"""

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemel.datasets.folders import FolderDataset, SampleError, open_split
from gemel.datasets.layouts import open_layout
from gemel.datasets.records import Layout
from gemel.environment.describe import describe, digest
from gemel.environment.seeds import generator
from gemel.sharing.adapters import own_modules
from gemel.sharing.memory import named_tensors
from gemel.sharing.signatures import settings_of
from gemel.workload import CLASSIFICATION, Task

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
SPLITS = ("train", "val", "test")
NUM_YIELDED = 4  # images of train and of val that go through the transforms
NUM_READ = 64  # files of a split whose content counts
READ_BYTES = 1 << 16  # at the beginning and at the end of such a file
FAILS = "fails"
YIELD_MARGIN = 1e-3  # of a value; machines round differently
# What only older results lack, with what it refines: it is named where that is the same. Values begin with the version
# of Python where they depend on it, and are then compared within one version alone.
REFINES = {
    "model_settings": ("model",),
    "eval_method_code": ("eval_method",),
    "transforms_code": ("transforms",),
    "transforms_yield": ("transforms", "transforms_code", "dataset", "dataset_content"),
    "dataset_content": ("dataset",),
    "dataset_times": ("dataset", "dataset_content"),
}


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
            lines += _task_differences(f"{name}: ", stored["tasks"][name], current["tasks"][name])
    return lines


def _task_differences(prefix: str, before: Mapping, now: Mapping) -> list[str]:
    plain = ({key: value for key, value in mark.items() if key not in REFINES} for mark in (before, now))
    lines = _differences(prefix, *plain)
    for key, coarser in REFINES.items():
        if key not in before or key not in now or any(before.get(k) != now.get(k) for k in coarser):
            continue
        if not _agree(before[key], now[key]):
            lines += _differences(prefix, {key: _short(before[key])}, {key: _short(now[key])}) or [f"{prefix}{key}"]
    return lines


def _agree(before: Any, now: Any) -> bool:
    """Whether two values are the same; numbers nearly.

    What could not be read once (a disk that was away) is not compared, nor are texts of two versions of Python.
    """
    if FAILS in (before, now):
        return True
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_agree, before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(_agree(before[key], now[key]) for key in before)
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=YIELD_MARGIN, abs_tol=YIELD_MARGIN)
    if isinstance(before, str) and isinstance(now, str) and before.startswith("python "):
        return before.split()[:2] != now.split()[:2] or before == now
    return bool(before == now)


def _short(value: object) -> object:
    """A value as it is printed: of many numbers a digest."""
    return value if isinstance(value, str) else digest(value)


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
    layout = None if task.kind == CLASSIFICATION else open_layout(task, folder)
    splits = {split: open_split(task, folder, split, layout=layout) for split in SPLITS}
    images = {split: [sample[0] for sample in dataset.samples] for split, dataset in splits.items()}
    return {
        "model": model_digest(task.model),
        "model_settings": _code({name: settings_of(module) for name, module in own_modules(task.model)}),
        "dataset": f"{Path(task.dataset).name} {_samples_digest(folder, splits, layout)}",
        "dataset_content": _content_digest(images.values()),
        "dataset_times": digest([[image.stat().st_mtime_ns for image in own] for own in images.values()]),
        "task": task.kind,
        "eval_method": _describe(task.eval_method),
        "eval_method_code": _code(task.eval_method),
        "transforms": f"train {_describe(task.train_transform)}, val {_describe(task.val_transform)}",
        "transforms_code": _code([task.train_transform, task.val_transform]),
        "transforms_yield": {split: _yielded(splits[split]) for split in ("train", "val")},
        "unmerged_acc": task.unmerged_acc,
        "tolerance": task.tolerance,
        "batch_size": task.batch_size,
        "background_class": task.background_class,
        "labels": task.labels,
        **task.reading.changes(),
    }


def model_digest(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and values of a model's state dict, shortened."""
    found = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def dataset_digest(task: Task, folder: Path) -> str:
    """sha256 over the samples of all splits, shortened: name and size of each image, its label or its annotations.

    Images are not read, annotations are: another class id is a file of the same size. What is no sample, such as a
    file manager's hidden files, does not count.
    """
    layout = None if task.kind == CLASSIFICATION else open_layout(task, folder)
    return _samples_digest(folder, {split: open_split(task, folder, split, layout=layout) for split in SPLITS}, layout)


def _samples_digest(folder: Path, splits: Mapping[str, FolderDataset], layout: Layout | None) -> str:
    found = hashlib.sha256()
    for dataset in splits.values():
        for image, truth in dataset.samples:
            name = image.relative_to(folder) if image.is_relative_to(folder) else os.path.relpath(image, folder)
            found.update(os.fsencode(name) + f" {image.stat().st_size} ".encode())
            found.update(truth.content() if layout else f"{truth}\n".encode())
    if layout and layout.class_names:  # by which Pascal VOC's labels are numbered
        found.update(repr(layout.class_names).encode())
    return found.hexdigest()[:16]


def _content_digest(splits: Iterable[Sequence[Path]]) -> str:
    """sha256 over the beginning and the end of some files of every split, shortened."""
    found = hashlib.sha256()
    for images in splits:
        for image in images[:: -(-len(images) // NUM_READ) or 1]:
            with image.open("rb") as opened:
                found.update(opened.read(READ_BYTES))
                opened.seek(max(opened.tell(), image.stat().st_size - READ_BYTES))
                found.update(opened.read())
    return found.hexdigest()[:16]


def _yielded(dataset: FolderDataset) -> list | str:
    """What the transform makes of some images: shape, mean, deviation and a projection of each; and its boxes.

    "random" for a transform that does not depend on the seeded generators alone, "fails" for one that cannot be used.
    """
    dataset = dataset.image_by_image()
    length = len(dataset)
    indices = sorted({round(i * (length - 1) / max(1, NUM_YIELDED - 1)) for i in range(min(NUM_YIELDED, length))})
    try:
        first, second = ([_summary(dataset[index, 0]) for index in indices] for _ in range(2))
    except SampleError:  # what uses the transform reports it
        return FAILS
    return first if _agree(first, second) else "random"


def _summary(sample: tuple) -> list:
    tensors = [value for value in (sample[0], *_values(sample[1])) if isinstance(value, Tensor)]
    return [[list(tensor.shape), *_measures(tensor.as_subclass(Tensor).double().flatten())] for tensor in tensors]


def _values(target: object) -> list:
    return [target[key] for key in ("boxes", "labels")] if isinstance(target, dict) else []


def _measures(values: Tensor) -> list[float]:
    """Mean, deviation and a random projection, which tells a turned or shifted image from the original."""
    if not len(values):
        return []
    weights = torch.randn(len(values), dtype=torch.float64, generator=generator(0, "fingerprint"))
    found = (values.mean(), values.std(correction=0), values @ weights / len(values) ** 0.5)
    return [float(value) if torch.isfinite(value) else 0.0 for value in found]


def _code(value: object) -> str:
    """The digest of functions, objects and settings, behind the version of Python that it is valid for."""
    return f"python {sys.version_info.major}.{sys.version_info.minor} {digest(ADDRESS.sub('', describe(value)))}"


def _describe(function: object) -> str:
    """A function by its name, a transform by its settings (torchvision's print them)."""
    name = getattr(function, "__qualname__", None)
    return name if name else ADDRESS.sub("", repr(function))
