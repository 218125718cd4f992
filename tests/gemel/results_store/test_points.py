"""The points of memory against accuracy, from the rounds of a manifest."""

import pytest

from gemel.results_store.points import points_of


def row(number: int, trial: int, accuracies: dict, kept_for: tuple = (), saved: int = 0, **more) -> dict:
    return {
        "round": number,
        "trial_saved_bytes": trial,
        "saved_bytes": saved,
        "optimal_saved_bytes": 60,
        "accuracies": accuracies,
        "trained": sorted(accuracies),
        "kept": bool(kept_for),
        "kept_for": list(kept_for),
        "reason": "needs training",
        "steps": 0,
        **more,
    }


def manifest(*rounds: dict) -> dict:
    return {
        "memory": {"unmerged_bytes": 100, "optimal_saved_bytes": 60},
        "tasks": {name: {"target_acc": 0.5, "measured_unmerged_acc": acc} for name, acc in (("a", 0.6), ("b", 0.8))},
        "run": {"rounds": list(rounds)},
    }


def found(*rounds: dict) -> list[tuple]:
    keys = ("round", "bytes", "kept", "worst_task", "non_dominated")
    return [tuple(point[key] for key in keys) for point in points_of(manifest(*rounds))]


def test_the_unmerged_workload_is_the_first_point():
    (point,) = points_of(manifest())
    assert point["worst_accuracy_of_target"] == pytest.approx(1.2)
    assert {**point, "worst_accuracy_of_target": 0} == {
        **{"bytes": 100, "saved_bytes": 0, "worst_task": "a", "worst_accuracy_of_target": 0, "kept": True},
        **{"accuracies": {"a": 0.6, "b": 0.8}, "round": 0, "steps": 0, "non_dominated": True},
    }


def test_what_was_undone_does_not_count_for_later_points():
    rounds = row(1, 60, {"a": 0.1, "b": 0.4}), row(2, 20, {"b": 0.55}, ("b",), 20, steps=7)
    first, second, third = points_of(manifest(*rounds))
    assert second["accuracies"] == {"a": 0.1, "b": 0.4} and not second["kept"]
    assert third["accuracies"] == {"a": 0.6, "b": 0.55} and third["kept"] and third["steps"] == 7
    assert all(point["non_dominated"] for point in (first, second, third))


def test_what_is_kept_of_a_failed_trial_is_a_point_of_its_own():
    rounds = row(1, 60, {"a": 0.55, "b": 0.4}, ("a",), 30), row(2, 50, {"b": 0.6}, ("b",), 50)
    assert found(*rounds) == [
        (0, 100, True, "a", True),
        (1, 40, False, "b", True),
        (1, 70, True, "a", False),  # round 2 is smaller, with the same worst task
        (2, 50, True, "a", True),
    ]
    assert points_of(manifest(*rounds))[-1]["accuracies"] == {"a": 0.55, "b": 0.6}


@pytest.mark.parametrize(
    "change", [{"optimal_saved_bytes": 61}, {"trial_saved_bytes": None}, {"reason": "out of memory"}]
)
def test_rounds_that_measured_nothing_of_this_workload_have_no_point(change):
    assert len(found({**row(1, 60, {"a": 0.0, "b": 0.0}), **change})) == 1


def test_tasks_that_are_gone_do_not_count():
    assert points_of(manifest(row(1, 60, {"a": 0.5, "gone": 0.0})))[1]["accuracies"] == {"a": 0.5, "b": 0.8}
