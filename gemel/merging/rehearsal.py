"""--check: tries what a merge does with each task on a sample, in under a minute; trains and writes nothing.

The dictionary and the datasets were checked before (dataset_manager.check). Models keep their weights, statistics and
modes.
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemel.console.tables import wrap
from gemel.datasets.loaders import TaskData, num_samples
from gemel.environment.events import emit
from gemel.environment.memory import memory_there
from gemel.environment.seeds import seeded
from gemel.environment.units import duration, mib
from gemel.evaluation.eval_method import evaluate
from gemel.merging.check import training_problems
from gemel.merging.examples import LONGEST_SIDE, thumbnail
from gemel.options import MergeOptions
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import restore_snapshot, take_snapshot
from gemel.training.distillation import Teacher
from gemel.training.losses import task_losses
from gemel.trials.fit_samples import memory_of_fits
from gemel.trials.state import MergeState
from gemel.workload import CLASSIFICATION, Task

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
SHOWN_IMAGES = 4  # of train per task, on the contact sheet
COPIES_ON_DISK = 4  # the store and the .pt files, of this result and of the one before


class Finding(NamedTuple):
    """One thing that was looked at. task: "" where it is about all."""

    verdict: str  # OK, NOTE, PROBLEM
    task: str
    text: str


@dataclass
class Rehearsal:
    """What was found, and images of train after their transform for the contact sheet."""

    findings: list[Finding] = field(default_factory=list)
    sheet: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by task: image, width, height, label, boxes

    @property
    def num_problems(self) -> int:
        return sum(finding.verdict == PROBLEM for finding in self.findings)


def rehearse(
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    options: MergeOptions,
    device: torch.device,
    results_path: Path,
) -> Rehearsal:
    """Tries every task. What a user's model or transform raises is a problem found.

    Raises WorkloadError for models that cannot be copied.
    """
    found, seconds = Rehearsal(), 0.0
    state = MergeState(tasks, device)
    try:
        for task in tasks.values():
            seconds += _try_task(task, data[task.name], state, options, found)
    finally:
        state.hand_back()
    found.findings += _whole(tasks, options, device, results_path, seconds)
    return found


def _try_task(task: Task, data: TaskData, state: MergeState, options: MergeOptions, found: Rehearsal) -> float:
    """Adds what is found of one task; returns the seconds that evaluating all of val would take."""
    what = "a batch of train"
    try:
        emit("doing", what=f"checking {task.name}: {what}")
        batch = _load(task, data, options.seed)
        found.findings += boxes_on_images(task, batch)
        found.sheet[task.name] = _sheet(task, batch)
        what = "batches with gradients"
        emit("doing", what=f"checking {task.name}: {what}")
        problems = training_problems({task.name: task}, {task.name: data}, state, options)
        found.findings += [Finding(PROBLEM, task.name, f"got {p.got}; allowed: {p.allowed}") for p in problems]
        if not problems:
            found.findings.append(_train(task, batch, state, options.seed))
        what = "evaluating"
        emit("doing", what=f"checking {task.name}: {what}")
        finding, seconds = _measure(task, data)
        found.findings.append(finding)
        return seconds
    except Exception as error:  # of a user's transform, model or eval method
        text = f"{what} fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found.findings.append(Finding(PROBLEM, task.name, text))
        return 0.0


def _load(task: Task, data: TaskData, seed: int) -> Any:
    """A batch of train, with its transform."""
    with seeded(seed, "check", task.name):
        return next(iter(data.train))


def boxes_on_images(task: Task, batch: Any) -> Iterator[Finding]:
    """Whether boxes lie on their images after the transform."""
    if task.kind == CLASSIFICATION:
        return
    images, targets = batch
    outside = empty = total = 0
    for image, target in zip(images, targets, strict=True):
        height, width = image.shape[-2:]
        boxes = torch.as_tensor(target["boxes"]).reshape(-1, 4)
        total += len(boxes)
        limit = torch.tensor([width, height, width, height])
        outside += int(((boxes < -0.5) | (boxes > limit + 0.5)).any(1).sum())
        empty += int(((boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])).sum())
    said = f"{total} boxes of {len(images)} images after the train transform"
    if outside or empty:
        text = f"{said}: {outside} outside their image, {empty} without an area; transform boxes with their images"
        yield Finding(PROBLEM, task.name, text)
    else:
        yield Finding(OK if total else NOTE, task.name, f"{said}, all on their images")


def _train(task: Task, batch: Any, state: MergeState, seed: int) -> Finding:
    """The losses of one batch; the model is as before afterwards."""
    snapshot = take_snapshot(task.model)
    teacher = None if task.labels else Teacher(task.model, state.unmerged[task.name], [])
    try:
        with torch.no_grad(), seeded(seed, "check", task.name):
            task.model.train()
            losses = {name: float(loss) for name, loss in task_losses(task, batch, state.device, teacher).items()}
    finally:
        restore_snapshot(snapshot)
        if teacher is not None:
            teacher.close()
    said = ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items())
    if not all(map(math.isfinite, losses.values())):
        return Finding(PROBLEM, task.name, f"a loss is not finite: {said}; look at the train transform and the labels")
    trained = sum(parameter.requires_grad for parameter in task.model.parameters())
    return Finding(OK, task.name, f"losses of one batch: {said}; {trained} parameters can be trained")


def _measure(task: Task, data: TaskData) -> tuple[Finding, float]:
    """(accuracy on the screening subset against what the dictionary says, seconds that all of val would take)."""
    began, number, whole = time.monotonic(), num_samples(data.screen), num_samples(data.val)
    measured = evaluate(task, data.screen)
    seconds = (time.monotonic() - began) * whole / max(1, number)
    of = f"all {whole} images of val" if number == whole else f"{number} of {whole} images of val"
    said = f"accuracy {measured:.3f} on {of}; the dictionary says {task.unmerged_acc:.3f}, the target is"
    said = f"{said} {task.target_acc:.3f}"
    if measured >= task.target_acc:
        return Finding(OK, task.name, said), seconds
    if number == whole:
        advice = f"correct unmerged_acc to {measured:.4f}, or use the val transform that the model was trained with"
        return Finding(PROBLEM, task.name, f"{said}: {advice}"), seconds
    return Finding(NOTE, task.name, f"{said}: a sample; the merge will measure all of val"), seconds


def _whole(
    tasks: Mapping[str, Task], options: MergeOptions, device: torch.device, results_path: Path, seconds: float
) -> Iterator[Finding]:
    """What concerns all tasks: something to share, time, memory, disk."""
    models = {name: task.model for name, task in tasks.items()}
    total, optimal = distinct_bytes(models), saved_bytes(find_groups(models))
    if optimal:
        yield Finding(OK, "", f"sharing every identical layer would save {mib(optimal)} of {mib(total)}")
    else:
        yield Finding(NOTE, "", "no two tasks have an identical layer: there is nothing to merge")
    text = (
        f"evaluating all tasks once takes about {duration(seconds)}; a first round, a fit and evaluations, a few times"
    )
    yield Finding(NOTE, "", f"{text} that")
    needs = 2 * total + memory_of_fits(device, options.fit_memory) + options.cache_bytes
    text = f"memory: at most about {mib(needs)} (models twice, fit_memory, cache_bytes)"
    there = memory_there(device)
    if there is not None:
        text = f"{text}; there are {mib(there)}"
    yield Finding(OK if there is None or needs < there else NOTE, "", text)
    folder = next(parent for parent in (results_path, *results_path.parents) if parent.exists())
    free, wanted = shutil.disk_usage(folder).free, COPIES_ON_DISK * total
    said = f"disk: {mib(free)} free for the results, which take up to {mib(wanted)}"
    yield Finding(OK if free > wanted else PROBLEM, "", said if free > wanted else f"{said}: free some, or --results")


def _sheet(task: Task, batch: Any) -> list[dict[str, Any]]:
    """The first images of a batch, with their labels or boxes (relative to the image)."""
    images, targets = batch
    shown = []
    for i in range(min(SHOWN_IMAGES, len(images))):
        entry: dict[str, Any] = thumbnail(images[i], LONGEST_SIDE)
        if task.kind == CLASSIFICATION:
            shown.append({**entry, "label": int(targets[i]), "boxes": []})
        else:
            height, width = images[i].shape[-2:]
            size = torch.tensor([width, height, width, height])
            boxes: Tensor = torch.as_tensor(targets[i]["boxes"]).reshape(-1, 4).float() / size
            labels: Sequence[int] = [int(label) - int(task.background_class) for label in targets[i]["labels"]]
            both = zip(boxes.tolist(), labels, strict=True)
            shown.append({**entry, "boxes": [{"box": box, "class": label} for box, label in both]})
    return shown


def rehearsal_text(found: Rehearsal) -> str:
    """A line per finding, and what to do."""
    lines = [wrap(f"{f.verdict:8}{f'{f.task}: ' if f.task else ''}{f.text}", " " * 8) for f in found.findings]
    number = found.num_problems
    last = "nothing stands in the way: the same command without --check merges"
    if number:
        last = f"{number} problem{'s' * (number != 1)}: mend what is said above, then check again"
    return "\n".join([*lines, "", last])
