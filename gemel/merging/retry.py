"""Merging one task again with new data: the others keep what they share, and the task is added to them anew.

For a task that went back to its unmerged model on the edge (docs/edge.md, "Watch"), as its images are no longer those
that it was merged with.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemel.datasets.loaders import TaskData
from gemel.datasets.records import NO_CLASS
from gemel.environment import ranks
from gemel.environment.device import pick_device
from gemel.evaluation.eval_method import evaluate
from gemel.merging.fingerprint import differences
from gemel.options import MergeOptions
from gemel.results_store.manifest import has_results, read_manifest
from gemel.workload import Problem, Task, WorkloadError


def with_new_data(
    tasks: dict[str, Task], options: MergeOptions, results_path: Path
) -> tuple[dict[str, Task], list[Problem]]:
    """The tasks, of which the one that is merged again has the new dataset; and what is wrong with the request."""
    name, data = options.retry, options.data
    if name is None and data is None:
        return tasks, []
    if name is None or data is None:
        return tasks, [_problem("retry", f"retry {name!r}, data {data!r}", "both together, or neither")]
    folder = Path(data).expanduser().absolute()
    problems = []
    if name not in tasks:
        problems.append(_problem("retry", repr(name), f"a task of the dictionary: {', '.join(tasks)}"))
    if not folder.is_dir():
        problems.append(_problem("data", repr(str(data)), "a dataset folder, laid out as that of the task"))
    if options.fresh:
        problems.append(_problem("retry", "with fresh", "one of the two: fresh merges all tasks anew"))
    elif not has_results(results_path):
        problems.append(_problem("retry", f"results in {results_path}, where there are none", "a results folder"))
    if len(tasks) == 1:
        problems.append(_problem("retry", f"{name}, the only task", "a task of a workload of several"))
    if problems:
        return tasks, problems
    return {**tasks, name: replace(tasks[name], dataset=str(folder))}, []


def measured_anew(
    tasks: dict[str, Task], data: Mapping[str, TaskData], options: MergeOptions, results_path: Path
) -> dict[str, Task]:
    """The tasks, of which the one that is merged again has the accuracy that its model reaches on the new val.

    Raises WorkloadError if it reaches nothing, or cannot be evaluated, or if a class id has another class in the new
    data than in the results.
    """
    if (name := options.retry) is None:
        return tasks
    tasks[name].model.to(pick_device(options.device))
    reached = ranks.of_first(lambda: _measured(tasks[name], data[name], results_path))
    return {**tasks, name: replace(tasks[name], unmerged_acc=reached)}


def _measured(task: Task, data: TaskData, results_path: Path) -> float:
    before = read_manifest(results_path)["tasks"].get(task.name, {}).get("class_names") or ()
    pairs = zip(before, data.class_names, strict=False)  # a class that is left out at the end shifts no class id
    if any(one != other and NO_CLASS not in (one, other) for one, other in pairs):
        got = f"{task.dataset}, whose classes are, by class id, {', '.join(data.class_names)}"
        allowed = f"the classes that the task was merged with: {', '.join(before)}"
        raise WorkloadError([Problem(task.name, "data", got, allowed)])
    try:
        reached = evaluate(task, data.val)
    except ValueError as error:  # EvalMethodError among them
        raise WorkloadError([Problem(task.name, "data", f"{task.dataset}: {error}", "data of this task")]) from None
    if not reached > 0:
        got = f"{task.dataset}, on whose val the unmerged model reaches {reached}"
        raise WorkloadError([Problem(task.name, "data", got, "data on which it is right at least once")])
    return reached


def retry_text(task: Task) -> str:
    """What is said of the task that is merged again."""
    return (
        f"{task.name}: merged again with {task.dataset}; its unmerged model reaches {task.unmerged_acc:.4f} there\n"
        f"later runs need in the dictionary: dataset {Path(task.dataset).name!r}, unmerged_acc {task.unmerged_acc!r}"
    )


def without_retried(manifest: dict[str, Any], fingerprint: Mapping, retried: str | None) -> dict[str, Any]:
    """The manifest without the task that is merged again, unless that was merged with this data already."""
    mark = manifest["run"]["fingerprint"]
    if retried is None or retried not in mark["tasks"]:
        return manifest
    before, now = ({"options": {}, "tasks": {retried: each["tasks"][retried]}} for each in (mark, fingerprint))
    if not differences(before, now):
        return manifest
    left = {key: value for key, value in mark["tasks"].items() if key != retried}
    tasks = {key: value for key, value in manifest["tasks"].items() if key != retried}
    return {**manifest, "tasks": tasks, "run": {**manifest["run"], "fingerprint": {**mark, "tasks": left}}}


def _problem(key: str, got: str, allowed: str) -> Problem:
    return Problem("options", key, got, allowed)
