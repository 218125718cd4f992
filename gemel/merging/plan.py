"""What could be saved: planned on structure and shapes alone, without data, weights or training.

A model is given by its builder's name (`resnet50`, or `resnet50:10` for ten classes), or by a workload file. The same
record makes the text, the JSON file and the page.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gemel.console.tables import fit_table, plan_table, workload_table, wrap
from gemel.environment.units import box_size, mib, share
from gemel.forward.modes import Models
from gemel.results_store.load import build_empty
from gemel.sharing.groups import Configuration, find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.signatures import find_layers
from gemel.workload import Problem, Task, WorkloadError, read_workload
from model_architectures import names

BOXES = tuple(gib << 30 for gib in (2, 4, 8))  # memory of common small boxes
CLASSES, DETECTOR_CLASSES = 1000, 91  # of ImageNet and COCO: what a bare name is built with
DETECTORS = ("rcnn", "fcos", "retinanet", "ssd", "yolo")  # in the names of their builders
MANY_TENSORS = 100_000  # more than any builder makes
MATRIX_MODELS, MOST_PAIRS = 6, 12  # up to so many models the console shows every pair, else the closest pairs


@dataclass(frozen=True)
class Plan:
    """What a workload takes, and what its models have in common. All sizes in bytes."""

    models: dict[str, int]  # each by itself
    groups: Configuration  # all layers that could share, largest saving first
    pairs: list[tuple[str, str, int]]  # what the two could share
    added: dict[str, int]  # what each model adds at best to those before it

    @property
    def total_bytes(self) -> int:
        return sum(self.models.values())

    @property
    def optimal_saved_bytes(self) -> int:
        """The saving if every identical layer were shared."""
        return saved_bytes(self.groups)

    def boxes(self, memory: int | None = None) -> list[tuple[int, bool, bool]]:
        """(bytes of a box, whether the workload fits before merging, and at best after it)."""
        best = self.total_bytes - self.optimal_saved_bytes
        return [(box, self.total_bytes <= box, best <= box) for box in ([memory] if memory else BOXES)]

    def to_plain(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "models": self.models,
            "total_bytes": self.total_bytes,
            "optimal_saved_bytes": self.optimal_saved_bytes,
            "pairs": [list(pair) for pair in self.pairs],
            "added_bytes": self.added,
        }


def make_plan(models: Models) -> Plan:
    """The plan of models by task; their parameters may be on the meta device."""
    layers = {name: find_layers(model) for name, model in models.items()}
    size_of = {layer.signature: layer.bytes for found in layers.values() for layer in found}
    counts = {name: Counter(layer.signature for layer in found) for name, found in layers.items()}
    sizes = {name: distinct_bytes({name: model}) for name, model in models.items()}
    ordered = list(models)
    pairs = [
        (a, b, _common_bytes(counts[a], counts[b], size_of)) for i, a in enumerate(ordered) for b in ordered[i + 1 :]
    ]
    there: Counter[str] = Counter()  # per signature, the most layers that any model so far has
    added = {}
    for name in ordered:
        added[name] = sizes[name] - _common_bytes(counts[name], there, size_of)
        there |= counts[name]
    return Plan(sizes, find_groups(models), pairs, added)


def _common_bytes(first: Counter, second: Counter, size_of: Mapping[str, int]) -> int:
    return sum(min(count, second[key]) * size_of[key] for key, count in first.items() if key in second)


def build_named(given: Sequence[str]) -> dict[str, nn.Module]:
    """Models without weights, by their builders' names, each with an optional `:NUM_CLASSES`; repeats get a number.

    Raises WorkloadError with every name that is wrong.
    """
    if problems := name_problems(given):
        raise WorkloadError(problems)
    models: dict[str, nn.Module] = {}
    seen = Counter[str]()
    for text in given:
        name, _, classes = text.partition(":")
        default = DETECTOR_CLASSES if any(part in name for part in DETECTORS) else CLASSES
        seen[name] += 1
        key = name if seen[name] == 1 else f"{name}_{seen[name]}"
        architecture = {"name": name, "num_classes": int(classes or default), "kwargs": {}}
        models[key] = build_empty(architecture, MANY_TENSORS)
    return models


def name_problems(given: Sequence[str]) -> list[Problem]:
    """A problem for each name that is no builder's, or whose number of classes is none."""
    problems, known = [], set(names())
    for text in given:
        name, _, classes = text.partition(":")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            allowed = f"a builder's name, such as {', '.join(near or ('resnet50', 'fasterrcnn_resnet50_fpn'))}; or one"
            problems.append(Problem("plan", "MODEL", repr(text), f"{allowed} workload file FILE.py alone"))
        elif classes and not (classes.isdecimal() and int(classes) > 0):
            problems.append(Problem("plan", "MODEL", repr(text), f"{name}:N with N the number of classes, from 1 on"))
    return problems


def plan_text(planned: Plan, memory: int | None = None) -> str:
    """The plan for the console, at most 100 columns wide."""
    rows = [
        (name, mib(size), mib(planned.added[name]), share(planned.added[name], size))
        for name, size in planned.models.items()
    ]
    parts = [
        fit_table(("model", "size", "adds at best", "of its size"), rows),
        pair_text(planned),
        plan_table(planned.groups, planned.total_bytes),
        "\n".join(box_line(planned, *box) for box in planned.boxes(memory)),
    ]
    return "\n\n".join(part for part in parts if part)


def pair_text(planned: Plan) -> str:
    """The share of the bytes of each pair of models that they could share; of many models, the closest pairs alone."""
    if not planned.pairs:
        return ""
    order = list(planned.models)
    shares = {(a, b): share(common, planned.models[a] + planned.models[b]) for a, b, common in planned.pairs}
    if len(order) <= MATRIX_MODELS:
        header = ("share of a pair's bytes in common", *(f"[{i}]" for i, _ in enumerate(order, 1)))
        rows = [
            (f"[{i}] {a}", *(shares.get((a, b)) or shares.get((b, a)) or "" for b in order))
            for i, a in enumerate(order, 1)
        ]
        return fit_table(header, rows)
    closest = sorted(planned.pairs, key=lambda pair: -pair[2])[:MOST_PAIRS]
    rows = [(f"{a} + {b}", shares[a, b], mib(common)) for a, b, common in closest]
    return fit_table(("closest pairs", "in common", "could save"), rows)


def box_line(planned: Plan, box: int, before: bool, after: bool) -> str:
    """One line: whether the parameters and buffers fit a box of so many bytes."""
    best = planned.total_bytes - planned.optimal_saved_bytes
    if before:
        said = f"the weights fit without merging ({mib(planned.total_bytes)})"
    elif after:
        said = f"the weights fit once merged, at best {mib(best)} of {mib(planned.total_bytes)}"
    else:
        said = f"the weights do not fit, even at best: {mib(best)}"
    return wrap(f"a box of {box_size(box)}: {said}")


def plan(model_dict: dict, tolerance: float | None = None, memory: int | None = None) -> tuple[str, int]:
    """(tables as text, bytes that sharing every identical layer would save). Raises WorkloadError."""
    text, planned = tables_and_plan(model_dict, tolerance, memory)
    return text, planned.optimal_saved_bytes


def tables_and_plan(model_dict: dict, tolerance: float | None, memory: int | None) -> tuple[str, Plan]:
    """The plan of a task dictionary, and as text with its tasks' targets. Raises WorkloadError."""
    tasks = _tasks_of(model_dict, tolerance)
    models = {name: task.model for name, task in tasks.items()}
    planned = make_plan(models)
    text = f"{workload_table(tasks, models, planned.groups)}\n\n{plan_text(planned, memory)}"
    return text, planned


def plan_of(model_dict: dict, tolerance: float | None = None) -> Plan:
    """The plan of a task dictionary. Raises WorkloadError with every problem of it."""
    return make_plan({name: task.model for name, task in _tasks_of(model_dict, tolerance).items()})


def _tasks_of(model_dict: dict, tolerance: float | None) -> dict[str, Task]:
    tasks, problems = read_workload(model_dict, tolerance)
    if problems:
        raise WorkloadError(problems)
    return tasks
