"""A memory goal, end to end: it stops when it fits, says what it would take, and that is true when tried."""

import copy
import dataclasses
import json

import pytest
from pico import same_state

import merge_workloads
from gemel import thresholds
from gemel.console import tables
from gemel.forward.modes import state_on_cpu
from gemel.merging.resume import groups_to_tie
from gemel.options import MergeOptions
from gemel.results_store.manifest import read_manifest
from gemel.results_store.points import points_of
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.trials import goal as goal_module
from gemel.trials import initialisation
from gemel.trials.goal import GoalReplay
from gemel.workload import WorkloadError
from merge_workloads import merge_workload
from merger import Merger

QUICK = {"learning_rate": 0.02, "max_epochs": 60, "patience_epochs": 10, "tolerance": 0.85, "device": "cpu"}


def merge(entries, tmp_path, datasets, **options) -> dict:
    return merge_workload(entries, tmp_path / "results", datasets=datasets, **{**QUICK, **options})


def goal_of(entries, share: float) -> int:
    """Bytes of the workload when this share of what is possible is saved."""
    models = {name: entry["model"] for name, entry in entries.items()}
    return distinct_bytes(models) - int(share * saved_bytes(find_groups(models)))


@pytest.mark.parametrize("strategy", ["adaptive", "gemel", "all", "stem"])
def test_the_search_stops_as_soon_as_it_fits(entries, datasets, tmp_path, strategy, capsys):
    goal = goal_of(entries, 0.2)
    manifest = merge(entries, tmp_path, datasets, strategy=strategy, memory=goal)
    rounds = manifest["run"]["rounds"]
    unmerged = manifest["memory"]["unmerged_bytes"]
    assert manifest["memory"]["merged_bytes"] <= goal and all(task["met"] for task in manifest["tasks"].values())
    assert all(unmerged - row["saved_bytes"] > goal for row in rounds[:-1])
    assert manifest["run"]["goal"] == {"bytes": goal, "met": True, "would_take": None}
    assert "it fits: " in capsys.readouterr().out


def test_the_search_goes_on_without_the_goal(entries, trained_entries, datasets, tmp_path, capsys):
    goal = goal_of(entries, 0.3)
    first = merge(entries, tmp_path, datasets, memory=goal)
    assert first["memory"]["merged_bytes"] <= goal and not first["run"]["finished"]
    assert "without --memory the same command saves more" in capsys.readouterr().out
    again = merge(copy.deepcopy(trained_entries), tmp_path, datasets)
    assert again["run"]["finished"] and again["memory"]["merged_bytes"] < first["memory"]["merged_bytes"]
    assert (
        again["run"]["goal"] is None and again["run"]["rounds"][: len(first["run"]["rounds"])] == first["run"]["rounds"]
    )


def test_what_fits_as_it_is_stays_as_it_is(entries, datasets, tmp_path, capsys):
    manifest = merge(entries, tmp_path, datasets, memory=goal_of(entries, 0.0))
    assert manifest["memory"]["saved_bytes"] == 0 and manifest["run"]["rounds"] == []
    assert "it fits without sharing anything" in capsys.readouterr().out
    assert read_manifest(tmp_path / "results") == manifest


def least_of(entries) -> int:
    """Bytes of the workload when everything is shared, with private scales and biases."""
    models = {name: entry["model"] for name, entry in entries.items()}
    return distinct_bytes(models) - saved_bytes(groups_to_tie(MergeOptions(), models, find_groups(models)))


def test_the_least_that_is_allowed_can_be_reached(entries, datasets, tmp_path):
    manifest = merge(entries, tmp_path, datasets, memory=least_of(entries), tolerance=0.05)
    assert manifest["memory"]["merged_bytes"] == manifest["run"]["goal"]["bytes"] and manifest["run"]["goal"]["met"]


def test_less_than_everything_shared_takes_is_refused_before_anything_is_measured(entries, datasets, tmp_path):
    least = least_of(entries)
    calls = []
    for entry in entries.values():
        entry["eval_method"] = calls.append
    with pytest.raises(WorkloadError, match=f"memory: got {least - 1} bytes; allowed: at least {least} bytes"):
        merge(entries, tmp_path, datasets, memory=least - 1)
    assert calls == [] and not (tmp_path / "results" / "merged.json").exists()


@pytest.fixture
def strict(trained_entries, monkeypatch):
    """Makes the workload with targets as high as the unmerged accuracies, and fits on two images."""
    few = dataclasses.replace(thresholds.THRESHOLDS.fit, pixels=2 * 16 * 16, fewest_pixels=16 * 16, positions=8)
    limits = dataclasses.replace(thresholds.THRESHOLDS, fit=few)
    for module in (goal_module, initialisation):
        monkeypatch.setattr(module, "THRESHOLDS", limits)
    return lambda: {name: {**copy.deepcopy(trained_entries[name]), "tolerance": 1.0} for name in trained_entries}


def test_what_it_would_take_is_true_when_tried(strict, datasets, tmp_path, capsys):
    entries = strict()
    goal = goal_of(entries, 0.85)
    quick = {"memory": goal, "max_epochs": 0.5}
    missed = merge(entries, tmp_path / "first", datasets, **quick)
    needed = missed["run"]["goal"]["would_take"]
    said = capsys.readouterr().out
    assert missed["memory"]["merged_bytes"] > goal and not missed["run"]["goal"]["met"]
    assert needed["bytes"] <= goal and needed["tolerance"]
    for name, tolerance in needed["tolerance"].items():
        assert f"a tolerance of {tolerance:g} for {name}" in said
        assert missed["tasks"][name]["unmerged_acc"] * tolerance <= needed["accuracy"][name] < needed["target"][name]
    relaxed = {name: {**entry, "tolerance": needed["tolerance"].get(name, 1.0)} for name, entry in strict().items()}
    tried = merge(relaxed, tmp_path / "second", datasets, **quick)
    assert tried["memory"]["merged_bytes"] <= goal and all(task["met"] for task in tried["tasks"].values())
    assert {name: tried["tasks"][name]["merged_acc"] for name in needed["accuracy"]} == needed["accuracy"]


def test_looking_for_what_it_would_take_leaves_the_models_as_they_are(strict, datasets, tmp_path, monkeypatch):
    look, looked = GoalReplay.what_it_would_take, []

    def compared(self, *args):
        before = state_on_cpu(self.state.models)
        found = look(self, *args)
        assert found is not None and same_state(before, state_on_cpu(self.state.models))
        assert self.state.tied == self.state.kept and self.state.continued_trial is None
        looked.append(found)
        return found

    monkeypatch.setattr(GoalReplay, "what_it_would_take", compared)
    entries = strict()
    merge(entries, tmp_path, datasets, memory=goal_of(entries, 0.85), max_epochs=0.5)
    assert len(looked) == 1


@pytest.mark.exhaustive
def test_a_killed_run_finds_the_same(strict, datasets, tmp_path, monkeypatch):
    entries = strict()
    goal, play = goal_of(entries, 0.85), Merger.play_round

    def until_it_is_known(self, proposal):
        if self.record.would_take is not None:
            raise KeyboardInterrupt
        return play(self, proposal)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Merger, "play_round", until_it_is_known)
        merge(entries, tmp_path, datasets, memory=goal, max_epochs=0.5)
    again = merge(strict(), tmp_path, datasets, memory=goal, max_epochs=0.5)
    whole = merge(strict(), tmp_path / "whole", datasets, memory=goal, max_epochs=0.5)
    assert again["run"]["goal"] == whole["run"]["goal"] and whole["run"]["goal"]["would_take"]


def test_a_missed_goal_is_exit_code_1(monkeypatch, entries, datasets, tmp_path):
    manifest = {"memory": {"merged_bytes": 11}}
    monkeypatch.setattr(merge_workloads, "merge_workload", lambda *_, **options: manifest)
    monkeypatch.setattr(merge_workloads, "create_sample_model_dict", dict)
    assert [merge_workloads.main(["--memory", size]) for size in ("11", "10")] == [0, 1]
    assert merge_workloads.main([]) == 0


def test_a_finished_result_is_judged_by_the_goal_of_now(entries, trained_entries, datasets, tmp_path, capsys):
    finished = merge(entries, tmp_path, datasets, strategy="stem")
    assert finished["run"]["finished"]
    merged = finished["memory"]["merged_bytes"]
    for goal, said in ((merged, "it fits: "), (merged - 1, "it does NOT fit: ")):
        merge(copy.deepcopy(trained_entries), tmp_path, datasets, strategy="stem", memory=goal)
        assert said in capsys.readouterr().out


def test_the_nearest_trial_is_named_where_none_was_repeated():
    row = {"round": 1, "trial_saved_bytes": 60, "saved_bytes": 0, "optimal_saved_bytes": 60, "steps": 5}
    row |= {
        "accuracies": {"a": 0.4, "b": 0.6},
        "trained": ["a", "b"],
        "kept": False,
        "kept_for": [],
        "reason": "given up",
    }
    task = {"target_acc": 0.5, "measured_unmerged_acc": 0.6}
    memory = {"unmerged_bytes": 100, "merged_bytes": 100, "saved_bytes": 0, "optimal_saved_bytes": 60}
    manifest = {"memory": memory, "tasks": {"a": task, "b": task}, "run": {"rounds": [row]}}
    assert "nearest was round 1" in tables.goal_report(manifest, 40)
    assert "with a at about 0.400 of its target 0.500" in tables.goal_report(manifest, 40)
    manifest["run"]["rounds"] = []
    assert "no trial that would fit was made" in tables.goal_report(manifest, 40)


def test_the_points_are_written_where_asked_for_and_into_the_statistics(entries, datasets, tmp_path):
    file = tmp_path / "points.json"
    manifest = merge(entries, tmp_path, datasets, memory=goal_of(entries, 0.3), pareto=file)
    points = json.loads(file.read_text())["points"]
    assert points == points_of(manifest)
    assert points == json.loads((tmp_path / "results" / "workload_stats.json").read_text())["points"]
    assert points[0]["bytes"] == manifest["memory"]["unmerged_bytes"]
    last = [point for point in points if point["kept"]][-1]
    assert last["bytes"] == manifest["memory"]["merged_bytes"]
    assert last["accuracies"] == {name: task["merged_acc"] for name, task in manifest["tasks"].items()}
