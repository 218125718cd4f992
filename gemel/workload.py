"""Turns the task dictionary of a user into validated Task records.

`read_workload(model_dict)` is the only way to create the records. It reports all problems at once and does not read
datasets; dataset_manager.check does that for tasks without problems.
"""

import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from gemel.environment.imports import prefer

CLASSIFICATION = "image_classification"
DETECTION = "object_detection"
DATASET_SUFFIX = {CLASSIFICATION: "_CL", DETECTION: "_OD"}
REQUIRED_KEYS = ("model", "task", "eval_method", "transforms", "unmerged_acc")
READING_KEYS = ("background_class", "labels", "num_classes", "class_ids", "exif_orientation")
OPTIONAL_KEYS = ("dataset", "tolerance", "batch_size", *READING_KEYS)
IN_ORDER, AS_NUMBERED = "in_order", "as_numbered"  # class_ids: what the ids of a COCO file mean
DEFAULT_TOLERANCE = 0.95
OWN_MODEL = "a model of its own for every task (copy.deepcopy)"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Problem(NamedTuple):
    """One problem of the input: the task and key, what was given, and what is allowed."""

    task: str
    key: str
    got: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.task}: {self.key}: got {self.got}; allowed: {self.allowed}"


class WorkloadError(ValueError):
    """The input is wrong; `problems` lists every problem."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem{'s' * (len(problems) != 1)} in the workload:\n{lines}")


@dataclass(frozen=True)
class Reading:
    """How a task's dataset is read: its optional keys of the same names (docs/datasets.md).

    num_classes: outputs of the model, the background counted; None: as far as the model shows it. class_ids: IN_ORDER,
    AS_NUMBERED, the model's class id of every class name, or None: by the dataset alone where that is unambiguous.
    exif_orientation: whether images are turned as it says.
    """

    background_class: bool = True
    labels: bool = True
    num_classes: int | None = None
    class_ids: str | Mapping[str, int] | None = None
    exif_orientation: bool = True

    def changes(self) -> dict[str, Any]:
        """The keys that differ from their defaults, but for the two that every fingerprint has."""
        default = Reading()
        found = {key: getattr(self, key) for key in READING_KEYS[2:]}
        return {key: value for key, value in found.items() if value != getattr(default, key)}


@dataclass(frozen=True)
class Task:
    """One entry of the dictionary: a model, its dataset, its eval method, and its accuracy before merging."""

    name: str
    model: nn.Module
    kind: str  # CLASSIFICATION or DETECTION
    eval_method: Callable[[nn.Module, Any], float]
    train_transform: Callable
    val_transform: Callable
    unmerged_acc: float
    tolerance: float
    dataset: str  # name of the dataset folder
    batch_size: int | None  # None: the trainer's default for the kind
    reading: Reading = field(default_factory=Reading)

    @property
    def background_class(self) -> bool:
        """Of a detector: whether label 0 of the model means background."""
        return self.reading.background_class

    @property
    def labels(self) -> bool:
        """Whether the train images have labels; val images always have them."""
        return self.reading.labels

    @property
    def target_acc(self) -> float:
        """The accuracy that a merged model must reach."""
        return self.tolerance * self.unmerged_acc


def load_model_dict(path: str | Path) -> dict:
    """The task dictionary of a workload file; executes the file. Raises WorkloadError if it defines none, or fails.

    From then on the names of Python files in the same folder mean these, not files of the checkout.
    """
    file = Path(os.path.abspath(os.path.expanduser(path)))  # as in __file__, so that a second load is recognised
    allowed = "a Python file that defines create_model_dict()"
    if not file.is_file() or file.suffix != ".py":
        got = f"{path}, which is no file" if not file.is_file() else f"{path}, whose name does not end in .py"
        raise WorkloadError([Problem("workload", "--workload", got, allowed)])
    loaded = sys.modules.get(file.stem)
    if loaded is not None and getattr(loaded, "__file__", None) != str(file):
        got = f"{path}, whose name is that of a module in use here"
        raise WorkloadError([Problem("workload", "--workload", got, "another file name")])
    prefer(file.parent)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, "the spec of a Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # loader processes import the file under this name, from this folder
    try:
        spec.loader.exec_module(module)
        create = getattr(module, "create_model_dict", None)
        if callable(create):
            return create()
    except WorkloadError:
        raise
    except Exception as error:  # a user's file may raise anything
        sys.modules.pop(file.stem, None)
        raise WorkloadError([Problem("workload", "--workload", _where_it_failed(file, error), allowed)]) from error
    raise WorkloadError([Problem("workload", "--workload", f"{path} without it", allowed)])


def _where_it_failed(file: Path, error: Exception) -> str:
    """The error of a user's file, with the line of that file in which it arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(file) else (lines or [None])[-1]
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__} in {file}{f' line {line}' if line else ''}: {' '.join(text.split())[:500]}"


def read_workload(model_dict: object, tolerance: float | None = None) -> tuple[dict[str, Task], list[Problem]]:
    """(task records by name, all problems of the dictionary); a task with a problem has no record.

    tolerance: for tasks that state none (default 0.95). Raises nothing: the caller adds the problems of the datasets
    and raises one WorkloadError for all.
    """
    if not isinstance(model_dict, Mapping) or not model_dict:
        got = "an empty dictionary" if isinstance(model_dict, Mapping) else _describe(model_dict)
        return {}, [Problem("workload", "dictionary", got, "{task name: {model, task, ...}} with at least one task")]
    default = DEFAULT_TOLERANCE if tolerance is None else tolerance
    tasks, problems = {}, []
    if not _is_share(default):
        problems.append(Problem("workload", "tolerance", _describe(default), "a number in (0, 1]"))
        default = DEFAULT_TOLERANCE
    for name, entry in model_dict.items():
        found = _name_problems(name) + _entry_problems(str(name), entry)
        problems += found
        if not found:
            tasks[name] = _record(name, entry, default)
    return tasks, problems + _clashes(model_dict) + _shared_models(tasks)


def canonical_kind(text: object) -> str | None:
    """The task kind for either spelling ("object detection", "object_detection", any case), or None."""
    kind = text.strip().lower().replace(" ", "_") if isinstance(text, str) else None
    return kind if kind in DATASET_SUFFIX else None


def _record(name: str, entry: Mapping, tolerance: float) -> Task:
    """The record of an entry without problems."""
    kind = canonical_kind(entry["task"])
    assert kind is not None, "the entry is valid"
    own_tolerance = entry.get("tolerance")
    return Task(
        name=name,
        model=entry["model"],
        kind=kind,
        eval_method=entry["eval_method"],
        train_transform=entry["transforms"]["train"],
        val_transform=entry["transforms"]["val"],
        unmerged_acc=float(entry["unmerged_acc"]),
        tolerance=float(tolerance if own_tolerance is None else own_tolerance),
        dataset=entry.get("dataset") or name.rsplit("_", 1)[0] + DATASET_SUFFIX[kind],
        batch_size=None if entry.get("batch_size") is None else int(entry["batch_size"]),
        reading=_reading(entry),
    )


def _reading(entry: Mapping) -> Reading:
    given = {key: entry[key] for key in READING_KEYS if entry.get(key) is not None}
    if "num_classes" in given:
        given["num_classes"] = int(given["num_classes"])
    if isinstance(given.get("class_ids"), Mapping):  # plain values, as the results folder holds them
        given["class_ids"] = {name: int(number) for name, number in given["class_ids"].items()}
    return Reading(**given)


def _name_problems(name: object) -> list[Problem]:
    rule = "letters, digits, '_' and '-', ending in _<model>, such as main_2nd_cars_resnet18"
    if not isinstance(name, str):
        return [Problem(str(name), "name", _describe(name), rule)]
    dataset, _, model = name.rpartition("_")
    if not NAME_PATTERN.fullmatch(name) or not dataset.strip("_") or not model:
        return [Problem(name, "name", repr(name), rule)]
    if hasattr(nn.ModuleDict(), name):
        return [Problem(name, "name", repr(name), "a name that is not an attribute of torch.nn.Module")]
    return []


def _clashes(model_dict: Mapping) -> list[Problem]:
    """Names that differ only in case: on some file systems they are one file."""
    seen: dict[str, str] = {}
    problems = []
    for name in filter(lambda n: isinstance(n, str), model_dict):
        other = seen.setdefault(name.lower(), name)
        if other != name:
            problems.append(Problem(name, "name", f"{name!r} beside {other!r}", "names that differ in more than case"))
    return problems


def _shared_models(tasks: Mapping[str, Task]) -> list[Problem]:
    """Models of two tasks with a common parameter or buffer, or one whose values lie in the same memory."""
    owner: dict[tuple, str] = {}
    problems = []
    for task in tasks.values():
        tensors = [*task.model.parameters(), *task.model.buffers()]
        keys: dict[tuple, Tensor] = {("object", id(tensor)): tensor for tensor in tensors}
        keys |= {("memory", t.device, t.untyped_storage().data_ptr()): t for t in tensors if t.numel()}
        others: dict[str, str] = {}  # task -> what of it is shared
        for key, tensor in keys.items():
            other = owner.setdefault(key, task.name)
            if other != task.name:
                others.setdefault(other, "parameters" if isinstance(tensor, nn.Parameter) else "buffers")
        for other, what in sorted(others.items()):
            got = f"{what} that are also those of {other}"
            problems.append(Problem(task.name, "model", got, OWN_MODEL))
    return problems


def _entry_problems(name: str, entry: object) -> list[Problem]:
    if not isinstance(entry, Mapping):
        return [Problem(name, "entry", _describe(entry), f"a dictionary with {', '.join(REQUIRED_KEYS)}")]
    checks = {
        "model": _check_model,
        "task": _check_kind,
        "eval_method": _check_callable,
        "transforms": _check_transforms,
        "unmerged_acc": _check_share,
        "tolerance": _check_share,
        "dataset": _check_dataset,
        "batch_size": _check_batch_size,
        "background_class": _check_flag,
        "labels": _check_flag,
        "num_classes": _check_count,
        "class_ids": _check_class_ids,
        "exif_orientation": _check_flag,
    }
    problems = [Problem(name, key, "nothing", _ALLOWED[key]) for key in REQUIRED_KEYS if key not in entry]
    for key in entry:
        if key not in checks:
            near = difflib.get_close_matches(str(key), checks, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            problems.append(Problem(name, str(key), f"an unknown key{hint}", ", ".join(checks)))
        elif key in OPTIONAL_KEYS and entry[key] is None:
            continue  # None: the default
        elif (got := checks[key](entry[key])) is not None:
            problems.append(Problem(name, key, got, _ALLOWED[key]))
    return problems


_ALLOWED = {
    "model": "a torch.nn.Module with its weights loaded",
    "task": "'image_classification' or 'object_detection' (underscore or space)",
    "eval_method": "a callable f(model, data_loader) -> float in [0, 1]",
    "transforms": "a dictionary {'train': callable, 'val': callable}",
    "unmerged_acc": "a number in (0, 1]",
    "tolerance": "a number in (0, 1]",
    "dataset": "the name of a folder in the datasets root",
    "batch_size": "a whole number of at least 2",
    "background_class": "True or False",
    "labels": "True or False (the images of train have none)",
    "num_classes": "the number of the model's outputs, the background counted: a whole number of at least 1",
    "class_ids": f"{IN_ORDER!r}, {AS_NUMBERED!r}, or a dictionary {{class name: class id of the model from 0}}",
    "exif_orientation": "True or False (images are not turned as their EXIF orientation says)",
}


# Each check returns a description of a wrong value, and None for a right one.


def _check_model(model: object) -> str | None:
    if not isinstance(model, nn.Module):
        return _describe(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if scripted := [name or "itself" for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]:
        return f"a module with TorchScript in it ({scripted[0]}); hand in the module that was scripted"
    if not any(True for _ in model.parameters()):
        return "a module without parameters"
    if lazy := [key for key, tensor in tensors if isinstance(tensor, UninitializedParameter | UninitializedBuffer)]:
        return f"a module whose {lazy[0]} is not initialised yet (a lazy module without a first input)"
    if meta := [key for key, tensor in tensors if tensor.is_meta]:
        return f"a module whose {meta[0]} is on the meta device and has no weights"
    if bad := [key for key, value in model.state_dict().items() if not torch.is_tensor(value)]:
        return f"a module whose state_dict entry {bad[0]} is not a tensor"
    if bad := [key for key, p in model.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]:
        return f"a module whose {bad[0]} holds values that are not finite"
    return None


def _check_kind(text: object) -> str | None:
    if canonical_kind(text):
        return None
    spelled = text.strip().lower().replace(" ", "_") if isinstance(text, str) else ""
    near = difflib.get_close_matches(spelled, DATASET_SUFFIX, 1)
    return _describe(text) + (f" (did you mean {near[0]!r}?)" if near else "")


def _check_callable(value: object) -> str | None:
    return None if callable(value) else _describe(value)


def _check_transforms(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return _describe(value)
    wrong = [f"{key!r}: {_describe(value.get(key))}" for key in ("train", "val") if not callable(value.get(key))]
    return "{" + ", ".join(wrong) + "}" if wrong else None


def _check_share(value: object) -> str | None:
    return None if _is_share(value) else _describe(value)


def _check_dataset(value: object) -> str | None:
    usable = isinstance(value, str) and value not in ("", ".", "..") and not set("/\\\0") & set(value)
    return None if usable else _describe(value)


def _check_batch_size(value: object) -> str | None:
    return None if _is_whole(value) and int(value) >= 2 else _describe(value)


def _check_count(value: object) -> str | None:
    return None if _is_whole(value) and value >= 1 else _describe(value)


def _check_class_ids(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return None if value in (IN_ORDER, AS_NUMBERED) else _describe(value)
    if not value:
        return "an empty dictionary"
    wrong = [key for key, number in value.items() if not isinstance(key, str) or not _is_whole(number) or number < 0]
    if wrong:
        return f"{wrong[0]!r}: {_describe(value[wrong[0]])}"
    return None if len(set(value.values())) == len(value) else "one class id for two classes"


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_flag(value: object) -> str | None:
    return None if isinstance(value, bool) else _describe(value)


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1


def _describe(value: object) -> str:
    """A value, or its type, for messages."""
    if isinstance(value, (str, Real)) or value is None:
        return repr(value)
    return f"{'the class' if isinstance(value, type) else 'a'} {getattr(value, '__name__', type(value).__name__)}"
