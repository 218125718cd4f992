"""Memory against accuracy: every configuration that a merge measured, and those that no other one beats."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MEASURED_NOTHING = "out of memory"  # a trial that ended so


def points_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One point per configuration that was measured, in the order of the rounds; first the unmerged workload.

    A round that was kept for some of its tasks gives two: the whole trial, and what is kept of it. A point holds
    `bytes` and `saved_bytes` of the workload, `accuracies` (task -> accuracy on val), `worst_task` and its
    `worst_accuracy_of_target` (accuracy / target), `kept`, `round` (0: unmerged), `steps` of training, and
    `non_dominated`: no other point takes as few bytes with as good a worst task. In a trial that was not kept, a task
    below its target may have been measured on the screening subset only. Rounds of another workload, whose optimal
    saving differs, and rounds whose trial was not recorded (earlier versions) have no points.
    """
    total, optimal = manifest["memory"]["unmerged_bytes"], manifest["memory"]["optimal_saved_bytes"]
    targets = {name: task["target_acc"] for name, task in manifest["tasks"].items()}
    accuracies = {name: task["measured_unmerged_acc"] for name, task in manifest["tasks"].items()}
    points = [_point(total, 0, accuracies, targets, {"kept": True, "round": 0, "steps": 0})]
    for row in manifest["run"].get("rounds", []):
        if row.get("trial_saved_bytes") is None or row["optimal_saved_bytes"] != optimal:
            continue
        for saved, measured, kept in _measured(row):
            now = {**accuracies, **{name: value for name, value in measured.items() if name in targets}}
            points.append(
                _point(total, saved, now, targets, {"kept": kept, "round": row["round"], "steps": row["steps"]})
            )
            if kept:
                accuracies = now
    return [{**point, "non_dominated": not _is_dominated(point, points)} for point in points]


def _measured(row: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, float], bool]]:
    """(saved bytes, accuracies of the tasks that it changed, whether it was kept) of what a round measured."""
    is_whole = row["kept"] and len(row["kept_for"]) == len(row["trained"])
    if row["reason"] != MEASURED_NOTHING:
        yield row["trial_saved_bytes"], row["accuracies"], is_whole
    if row["kept"] and not is_whole:
        yield row["saved_bytes"], {name: row["accuracies"][name] for name in row["kept_for"]}, True


def _point(
    total: int, saved: int, accuracies: Mapping[str, float], targets: Mapping[str, float], more: Mapping[str, Any]
) -> dict[str, Any]:
    ratios = {name: accuracy / targets[name] for name, accuracy in accuracies.items()}
    worst = min(ratios, key=ratios.__getitem__)
    found = {"worst_task": worst, "worst_accuracy_of_target": ratios[worst], "accuracies": dict(accuracies)}
    return {"bytes": total - saved, "saved_bytes": saved, **found, **more}


def _is_dominated(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> bool:
    """Whether another point is at least as good in both, and better in one."""

    def cost(one: Mapping[str, Any]) -> tuple[int, float]:
        return one["bytes"], -one["worst_accuracy_of_target"]

    own = cost(point)
    return any(cost(other) != own and all(a <= b for a, b in zip(cost(other), own, strict=True)) for other in points)
