"""What must be equal for a run to go on from the results of another: the workload, its datasets, the options."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sharing.memory import named_tensors
from workload import Task

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(tasks: Mapping[str, Task], folders: Mapping[str, Path], options: Mapping) -> dict:
    """Plain values by key; `folders` are the tasks' dataset folders, `options` whatever else decides the outcome."""
    return {"options": dict(options), "tasks": {name: _of_task(task, folders[name]) for name, task in tasks.items()}}


def differences(stored: Mapping, current: Mapping) -> list[str]:
    """One line per key that is not what it was, naming task or option, what was stored and what was got."""
    lines = []
    for part in ("options", "tasks"):
        before, now = stored.get(part, {}), current.get(part, {})
        for name in dict.fromkeys([*before, *now]):
            if part == "options" or name not in before or name not in now:
                lines += _difference(name, before.get(name), now.get(name), part)
            else:
                for key in dict.fromkeys([*before[name], *now[name]]):
                    lines += _difference(f"{name}: {key}", before[name].get(key), now[name].get(key), part)
    return lines


def _difference(name: str, before: object, now: object, part: str) -> list[str]:
    if before == now:
        return []
    if part == "tasks" and (before is None or now is None):
        return [f"{name}: {'a new task' if before is None else 'the task is gone'}"]
    return [f"{name}: was {before!r}, is {now!r}"]


def _of_task(task: Task, folder: Path) -> dict:
    return {
        "model": model_digest(task.model),
        "dataset": f"{task.dataset} {folder_digest(folder)}",
        "task": task.kind,
        "eval_method": _describe(task.eval_method),
        "transforms": f"train {_describe(task.train_transform)}, val {_describe(task.val_transform)}",
        "unmerged_acc": task.unmerged_acc,
        "tolerance": task.tolerance,
        "batch_size": task.batch_size,
        "background_class": task.background_class,
    }


def model_digest(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and values of a model's state dict, shortened."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def folder_digest(folder: Path) -> str:
    """sha256 over the relative names and sizes of all files of a folder, shortened."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _describe(function: object) -> str:
    """A function by its name, a transform by its settings (torchvision's print them)."""
    name = getattr(function, "__qualname__", None)
    return name if name else ADDRESS.sub("", repr(function))
