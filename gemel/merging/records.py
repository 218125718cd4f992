"""What a merge writes down: the manifest, the statistics for plots, one record per round."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import nn

from gemel.fitting.batch_norm import is_frozen
from gemel.merging.initialisation import LEAST_SQUARES
from gemel.sharing.groups import Configuration, saved_bytes, to_plain
from gemel.sharing.memory import Memory, distinct_bytes
from gemel.training.outcome import Outcome
from gemel.workload import DETECTION, Task
from model_architectures import architecture_of

if TYPE_CHECKING:
    from merger import Run


@dataclass
class Accuracy:
    """What was measured of one task."""

    unmerged: float
    merged: float
    unmerged_test: float | None = None
    merged_test: float | None = None
    per_class: dict[str, dict] | None = None  # class id -> {"unmerged": measures, "merged": measures}, on val


def manifest_of(run: "Run") -> dict:
    """The manifest of the workload as it is now, without what the store adds (README, "Results")."""
    memory = memory_of(run)
    return {
        "tasks": {
            name: task_record(task, run.accuracy[name], run.data[name].class_names, _frozen_normalisation(run, name))
            for name, task in run.tasks.items()
        },
        "shared_layers": to_plain(run.strategy.kept),
        "memory": {**asdict(memory), "saved_bytes": memory.saved_bytes},
        "run": run_record(run),
    }


def statistics_of(run: "Run") -> dict:
    """workload_stats.json."""
    return {
        "total_bytes": run.unmerged_bytes,
        "optimal_saved_bytes": saved_bytes(run.groups),
        "history": run.history,
    }


def memory_of(run: "Run") -> Memory:
    return Memory(run.unmerged_bytes, distinct_bytes(run.models), saved_bytes(run.groups))


def task_record(
    task: Task, accuracy: Accuracy, class_names: Sequence[str], frozen_normalisation: str | None = None
) -> dict:
    """class_names: by class id, without the background; none are null."""
    return {
        "task": task.kind,
        "class_names": list(class_names) or None,
        "frozen_normalisation": frozen_normalisation,
        "architecture": architecture_of(task.model),
        "unmerged_acc": task.unmerged_acc,
        "measured_unmerged_acc": accuracy.unmerged,
        "target_acc": task.target_acc,
        "merged_acc": accuracy.merged,
        "unmerged_test_acc": accuracy.unmerged_test,
        "test_acc": accuracy.merged_test,
        "per_class": accuracy.per_class,
        "met": accuracy.merged >= task.target_acc,
    }


def _frozen_normalisation(run: "Run", name: str) -> str | None:
    """How frozen batch normalisation was treated: "refitted", or "kept" where layers were fitted to it; else None."""
    if not any(map(is_frozen, run.models[name].modules())):
        return None
    shares = any(name in group.tasks for group in run.strategy.kept)
    return "refitted" if shares and run.initial_weights != LEAST_SQUARES else "kept"


def per_class_of(task: Task, unmerged: nn.Module, merged: nn.Module, loader: Iterable) -> dict[str, dict] | None:
    """What the task's eval method can say class by class, before and after; None if it has no `per_class`.

    Classes are ids of the dataset: the background of a detector is taken off.
    """
    measure = getattr(task.eval_method, "per_class", None)
    if measure is None:
        return None
    before, after = measure(unmerged, loader), measure(merged, loader)
    first = int(task.kind == DETECTION and task.background_class)
    return {str(label - first): {"unmerged": before[label], "merged": after[label]} for label in before}


def run_record(run: "Run") -> dict:
    """The `run` part of the manifest: how it was started, and all that a later run needs to go on."""
    return {
        **run.flags,
        "strategy": run.strategy_name,
        "seed": run.seed,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "finished": run.finished,
        "groups": to_plain(run.groups),
        "strategy_state": run.strategy.state(),
        "accuracy": {name: asdict(accuracy) for name, accuracy in run.accuracy.items()},
        "permutations": run.permutations,
        "rounds": run.rounds,
        "history": run.history,
        "fingerprint": run.fingerprint,
    }


def round_record(run: "Run", before: Configuration, proposal: Configuration, outcome: Outcome, seconds: float) -> dict:
    """One round as it is shown and stored."""
    new = [group for group in proposal if group not in set(before)]
    largest = max(new, key=lambda group: group.saved_bytes)
    what = largest.signature.split(":")[0]
    return {
        "round": len(run.rounds) + 1,
        "what": what,
        "num_new_groups": len(new),
        "tasks": sorted({task for group in new for task in group.tasks}),
        "trained": sorted(outcome.accuracies),
        "met": list(outcome.met),
        "accuracies": outcome.accuracies,
        "kept": outcome.success,
        "reason": outcome.reason,
        "saved_bytes": saved_bytes(run.strategy.kept),
        "optimal_saved_bytes": saved_bytes(run.groups),
        "steps": outcome.steps,
        "samples": outcome.samples,
        "seconds": seconds,
    }


def history_entry(run: "Run") -> dict:
    """What was reached by now, and what it has cost since the run began: undone rounds, resumed runs included."""
    met = sum(run.accuracy[name].merged >= task.target_acc for name, task in run.tasks.items())
    return {
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "steps": sum(row["steps"] for row in run.rounds),
        "samples": sum(row["samples"] for row in run.rounds),
        "round": len(run.rounds),
        "saved_bytes": saved_bytes(run.strategy.kept),
        "tasks_met": met,
    }
