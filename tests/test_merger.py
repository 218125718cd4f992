"""The round loop end to end on pico workloads: invariants of DESIGN section 6, through merge_workload."""

import copy
import json
import time

import pytest
import torch
from pico import PicoNet, classification_entry
from torch import nn

import merger
from dataset_manager import open_task
from eval_methods import classification_eval
from gemel.environment import clock as clock_module
from gemel.evaluation.eval_method import evaluate
from gemel.merging import architecture
from gemel.merging.plan import plan
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.sharing.groups import Configuration, find_groups
from gemel.sharing.memory import distinct_bytes
from gemel.training.outcome import Outcome
from gemel.trials import evaluator
from gemel.workload import WorkloadError, read_workload
from merge_workloads import merge_workload
from merger import Merger

QUICK = {"learning_rate": 0.02, "max_epochs": 60, "patience_epochs": 10, "tolerance": 0.85}


def merge(entries, results, datasets, **options) -> dict:
    return merge_workload(
        entries, results, datasets=datasets, **{**QUICK, "device": "cpu", "strategy": "gemel", **options}
    )


def state_of(entries) -> dict:
    models = nn.ModuleDict({name: entry["model"] for name, entry in entries.items()})
    return {key: value.clone() for key, value in models.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("strategy", ["adaptive", "gemel", "all", "stem"])
def test_a_workload_merges_end_to_end(entries, trained_entries, datasets, tmp_path, strategy, capsys):
    """Invariant 1: every task, reloaded from disk, evaluates to the accuracy in the manifest, at its target."""
    manifest = merge(entries, tmp_path / "results", datasets, strategy=strategy)
    assert manifest == read_manifest(tmp_path / "results")
    assert manifest["memory"]["saved_bytes"] > 0 and manifest["run"]["finished"]
    copies = {name: copy.deepcopy(entry["model"]) for name, entry in trained_entries.items()}
    loaded = load_merged(tmp_path / "results", copies)
    for name, task in read_workload(entries)[0].items():
        data = open_task(task, [datasets], device=torch.device("cpu"), seed=0, batch_size=8)
        record = manifest["tasks"][name]
        assert evaluate(task, data.val, loaded[name]) == record["merged_acc"] >= record["target_acc"]
        assert record["met"] and record["target_acc"] == pytest.approx(0.85 * record["unmerged_acc"])
        assert record["class_names"] == (list(data.class_names) or None)
    tested = manifest["tasks"]["north_pico"]
    assert 0 <= tested["test_acc"] <= 1 and manifest["tasks"]["south_pico"]["test_acc"] is None
    printed = capsys.readouterr().out
    assert "of optimal" in printed and "sharing every identical layer would save" in printed and "memory" in printed


def test_the_manifest_says_what_is_shared(entries, datasets, tmp_path):
    """Published fault: which layers are shared is never stored. Invariant 3 in the manifest's own words."""
    manifest = merge(entries, tmp_path / "results", datasets, strategy="all")
    copies = {name: copy.deepcopy(entry["model"]) for name, entry in entries.items()}
    loaded = nn.ModuleDict(load_merged(tmp_path / "results", copies))
    assert manifest["shared_layers"]
    for group in manifest["shared_layers"]:
        layers = [loaded[o["task"]].get_submodule(o["layer"]) for o in group["occurrences"]]
        assert len(layers) > 1 and len({id(layer.weight) for layer in layers}) == 1
        assert group["bytes"] == sum(p.nbytes for p in layers[0].parameters(recurse=False))
    saved = sum(group["bytes"] * (len(group["occurrences"]) - 1) for group in manifest["shared_layers"])
    memory = manifest["memory"]
    assert memory["saved_bytes"] == saved == memory["unmerged_bytes"] - memory["merged_bytes"]
    assert memory["merged_bytes"] == distinct_bytes(loaded) and saved <= memory["optimal_saved_bytes"]


def test_statistics_for_plots(entries, datasets, tmp_path):
    manifest = merge(entries, tmp_path / "results", datasets)
    statistics = json.loads((tmp_path / "results" / "workload_stats.json").read_text())
    assert statistics["total_bytes"] == manifest["memory"]["unmerged_bytes"]
    assert statistics["optimal_saved_bytes"] == manifest["memory"]["optimal_saved_bytes"]
    history = statistics["history"]
    assert [entry["saved_bytes"] for entry in history] == sorted(entry["saved_bytes"] for entry in history)
    assert history[-1]["saved_bytes"] == manifest["memory"]["saved_bytes"]
    assert len(history) == sum(row["kept"] for row in manifest["run"]["rounds"])
    assert all(entry["tasks_met"] == 3 and entry["seconds"] > 0 for entry in history)
    for cost in ("seconds", "cpu_seconds", "steps", "samples"):
        assert [entry[cost] for entry in history] == sorted(entry[cost] for entry in history), cost
    rounds = manifest["run"]["rounds"][: history[-1]["round"]]
    assert history[-1]["steps"] == sum(row["steps"] for row in rounds) > 0
    assert history[-1]["samples"] == sum(row["samples"] for row in rounds) > 0
    assert 0 < history[-1]["cpu_seconds"] < manifest["run"]["cpu_seconds"]


class FailingRecover:
    """Trains for real, then says that the trial failed, for some rounds."""

    def __init__(self, fails):
        self.fails, self.rounds, self.recover = fails, 0, merger.recover

    def __call__(self, *args, **kwargs) -> Outcome:
        outcome = self.recover(*args, **kwargs)
        self.rounds += 1
        if self.fails(self.rounds):
            return Outcome("given up", {n: 0.1 for n in outcome.accuracies}, (), outcome.steps, outcome.samples)
        return outcome


def test_an_undone_round_leaves_weights_bit_identical(entries, datasets, tmp_path, monkeypatch):
    """Invariant 2."""
    before = state_of(entries)
    monkeypatch.setattr(merger, "recover", FailingRecover(lambda number: True))
    manifest = merge(entries, tmp_path / "results", datasets)
    assert same(before, state_of(entries)) and manifest["shared_layers"] == []
    assert manifest["memory"]["saved_bytes"] == 0 and manifest["run"]["rounds"]
    assert all(not row["kept"] for row in manifest["run"]["rounds"])
    for name, entry in entries.items():
        stored = torch.load(tmp_path / "results" / "weights" / f"{name}.pt", weights_only=True)
        assert same(dict(entry["model"].state_dict()), stored)


def test_some_rounds_fail_and_what_is_shipped_still_meets_every_target(entries, datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(merger, "recover", FailingRecover(lambda number: number % 2))
    manifest = merge(entries, tmp_path / "results", datasets)
    rounds = manifest["run"]["rounds"]
    assert {row["kept"] for row in rounds} == {True, False}
    assert all(task["met"] and task["merged_acc"] >= task["target_acc"] for task in manifest["tasks"].values())


def test_an_error_in_a_round_leaves_the_models_and_the_folder_as_they_were(entries, datasets, tmp_path, monkeypatch):
    before = state_of(entries)

    def crash(*args, **kwargs):
        merger_recover(*args, **kwargs)
        raise RuntimeError("CUDA error")

    merger_recover = merger.recover
    monkeypatch.setattr(merger, "recover", crash)
    with pytest.raises(RuntimeError, match="CUDA error"):
        merge(entries, tmp_path / "results", datasets)
    assert same(before, state_of(entries))
    assert read_manifest(tmp_path / "results")["memory"]["saved_bytes"] == 0


def test_a_reloaded_tensor_that_is_not_what_was_judged_is_an_error(entries, datasets, tmp_path, monkeypatch):
    honest = architecture.load_merged

    def another_bit(*args, **kwargs):
        loaded = honest(*args, **kwargs)
        if "south_pico" in loaded:  # one task at a time
            with torch.no_grad():
                loaded["south_pico"].bn1.running_var[0].mul_(1 + 2e-7)
        return loaded

    monkeypatch.setattr(architecture, "load_merged", another_bit)
    with pytest.raises(RuntimeError, match="south_pico: bn1.running_var: reloaded from .* is not what was judged"):
        merge(entries, tmp_path / "results", datasets, strategy="all")


def test_the_last_confirmation_evaluates_val_of_no_task_again(entries, datasets, tmp_path, monkeypatch):
    """The same tensors compute the same (test_a_workload_merges_end_to_end evaluates them): bits are compared."""
    evaluated, honest = [], evaluator.evaluate
    monkeypatch.setattr(evaluator, "evaluate", lambda task, *more: evaluated.append(task.name) or honest(task, *more))
    confirm = Merger.confirm
    monkeypatch.setattr(Merger, "confirm", lambda self: evaluated.clear() or confirm(self))
    manifest = merge(entries, tmp_path / "results", datasets, strategy="all")
    assert evaluated == ["north_pico"], "which has a test split"
    assert manifest["tasks"]["north_pico"]["test_acc"] is not None


def test_a_budget_too_short_for_the_unmerged_models_is_refused(entries, datasets, tmp_path):
    with pytest.raises(WorkloadError, match="options: time_budget: got 0.01; allowed: more seconds than measuring"):
        merge(entries, tmp_path / "results", datasets, time_budget=0.01)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("second", [None, "width"])
def test_one_task_or_nothing_in_common(trained_entries, datasets, tmp_path, second, capsys):
    """Invariant 5: the run ends normally, says so, and hands the models back unchanged."""
    entries = {"north_pico": copy.deepcopy(trained_entries["north_pico"])}
    if second:
        entries["south_other"] = classification_entry(PicoNet(4, width=5), 0.01)
    before = state_of(entries)
    manifest = merge(entries, tmp_path / "results", datasets)
    assert same(before, state_of(entries)) and manifest["shared_layers"] == [] and manifest["run"]["finished"]
    assert manifest["tasks"]["north_pico"]["met"] and "nothing to merge" in capsys.readouterr().out
    copies = {name: copy.deepcopy(entry["model"]) for name, entry in entries.items()}
    assert same(before, nn.ModuleDict(load_merged(tmp_path / "results", copies)).state_dict())


def test_preflight_says_which_task_is_below_its_target_and_by_how_much(entries, datasets, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for parameter in entries["south_pico"]["model"].parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    with pytest.raises(
        WorkloadError, match=r"south_pico: unmerged_acc: got .* reaches 0\.\d+ on val, 0\.\d+ below its"
    ) as e:
        merge(entries, tmp_path / "results", datasets)
    assert [problem.task for problem in e.value.problems] == ["south_pico"]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("value", [93.0, -1, None])
def test_preflight_lists_every_eval_method_that_does_not_work(entries, datasets, tmp_path, value):
    def fails(model, loader):
        raise KeyError("boxes")

    entries["north_pico"]["eval_method"] = lambda model, loader: value
    entries["east_pico"]["eval_method"] = fails
    with pytest.raises(WorkloadError) as error:
        merge(entries, tmp_path / "results", datasets)
    assert [(p.task, p.key) for p in error.value.problems] == [
        ("north_pico", "eval_method"),
        ("east_pico", "eval_method"),
    ]
    assert "KeyError: 'boxes'" in str(error.value) and f"got {value!r}" in str(error.value)
    assert not (tmp_path / "results").exists()


def test_same_seed_same_result(entries, trained_entries, datasets, tmp_path):
    """Invariant 7, bit for bit."""
    first = merge(entries, tmp_path / "one", datasets)
    again = copy.deepcopy(trained_entries)
    second = merge(again, tmp_path / "two", datasets)
    assert same(state_of(entries), state_of(again)) and first["tensors"] == second["tensors"]
    assert first["tasks"] == second["tasks"] and first["shared_layers"] == second["shared_layers"]


@pytest.mark.parametrize(
    "killed_in", [pytest.param(1, marks=pytest.mark.exhaustive), 2, pytest.param(4, marks=pytest.mark.exhaustive)]
)
def test_a_killed_run_goes_on_where_it_was(entries, trained_entries, datasets, tmp_path, monkeypatch, killed_in):
    """Invariant 4: it ends bit for bit where the uninterrupted run ends."""
    merge(entries, tmp_path / "whole", datasets)
    play_round, rounds = Merger.play_round, iter(range(1, 100))

    def killed(self, proposal: Configuration) -> bool:
        if next(rounds) == killed_in:
            raise KeyboardInterrupt
        return play_round(self, proposal)

    interrupted = copy.deepcopy(trained_entries)
    with monkeypatch.context() as patch:
        patch.setattr(Merger, "play_round", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(interrupted, tmp_path / "halted", datasets)
    assert len(read_manifest(tmp_path / "halted")["run"]["rounds"]) == killed_in - 1
    resumed = copy.deepcopy(trained_entries)
    manifest = merge(resumed, tmp_path / "halted", datasets)
    whole = read_manifest(tmp_path / "whole")
    assert same(state_of(entries), state_of(resumed)) and manifest["tensors"] == whole["tensors"]
    assert manifest["tasks"] == whole["tasks"] and manifest["shared_layers"] == whole["shared_layers"]
    assert [row["kept"] for row in manifest["run"]["rounds"]] == [row["kept"] for row in whole["run"]["rounds"]]
    for cost in ("steps", "samples"):
        assert [e[cost] for e in manifest["run"]["history"]] == [e[cost] for e in whole["run"]["history"]]
    cpu_seconds = [entry["cpu_seconds"] for entry in manifest["run"]["history"]]
    assert cpu_seconds == sorted(cpu_seconds), "what the killed run has spent counts on"


def test_an_undone_round_is_remembered_when_the_next_one_is_killed(
    entries, trained_entries, datasets, tmp_path, monkeypatch
):
    """Invariant 4: at most the round in flight is lost, also where nothing was kept before it."""
    proposals, play_round = [], Merger.play_round

    def killed(self, proposal: Configuration) -> bool:
        if len(proposals) == 2:
            raise KeyboardInterrupt
        proposals.append(proposal)
        return play_round(self, proposal)

    def fails(models, trained, *args, **kwargs) -> Outcome:
        return Outcome("given up", dict.fromkeys(trained, 0.1), (), steps=1, samples=1)

    monkeypatch.setattr(merger, "recover", fails)
    with monkeypatch.context() as patch:
        patch.setattr(Merger, "play_round", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(entries, tmp_path / "results", datasets)
    assert [row["kept"] for row in read_manifest(tmp_path / "results")["run"]["rounds"]] == [False, False]
    with monkeypatch.context() as patch:
        patch.setattr(
            Merger, "play_round", lambda self, proposal: proposals.append(proposal) or play_round(self, proposal)
        )
        manifest = merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets)
    assert len(set(proposals)) == len(proposals) == len(manifest["run"]["rounds"]) > 2


def test_a_finished_run_is_reported_again_and_fresh_keeps_it_aside(
    entries, trained_entries, datasets, tmp_path, monkeypatch, capsys
):
    first = merge(entries, tmp_path / "results", datasets, strategy="all")
    monkeypatch.setattr(merger, "recover", None)  # nothing is trained
    again = merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets, strategy="all")
    assert again == first and "finished result" in capsys.readouterr().out
    monkeypatch.undo()
    fresh = merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets, strategy="all", fresh=True)
    assert fresh["tensors"] == first["tensors"] and fresh["run"]["date"] >= first["run"]["date"]
    assert read_manifest(tmp_path / "results-previous-1") == first


def test_another_workload_in_the_folder_is_refused_and_named(entries, trained_entries, datasets, tmp_path):
    first = merge(entries, tmp_path / "results", datasets, strategy="all")
    changed = copy.deepcopy(trained_entries)
    changed["north_pico"]["tolerance"] = 0.9
    with torch.no_grad():
        changed["south_pico"]["model"].fc.bias += 1e-3
    with pytest.raises(WorkloadError) as error:
        merge(changed, tmp_path / "results", datasets, strategy="all", seed=1)
    message = str(error.value)
    assert "seed: was 0, is 1" in message and "north_pico: tolerance: was 0.85, is 0.9" in message
    assert "south_pico: model: was" in message and "--fresh" in message and len(error.value.problems) == 3
    assert read_manifest(tmp_path / "results") == first


def test_a_time_budget_ends_the_run_with_what_was_kept(entries, trained_entries, datasets, tmp_path, monkeypatch):
    clock = {"now": time.monotonic()}
    play_round = Merger.play_round

    def slow(self, proposal):
        clock["now"] += 3600
        return play_round(self, proposal)

    with monkeypatch.context() as patch:
        patch.setattr(Merger, "play_round", slow)
        patch.setattr(clock_module.time, "monotonic", lambda: clock["now"])
        manifest = merge(entries, tmp_path / "results", datasets, time_budget=5000)
    assert len(manifest["run"]["rounds"]) == 1 and not manifest["run"]["finished"]
    assert all(task["met"] for task in manifest["tasks"].values())
    finished = merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets)
    assert finished["run"]["finished"] and len(finished["run"]["rounds"]) > 1


def test_plan_says_what_could_be_saved_and_needs_no_dataset(entries):
    printed, saved = plan(entries)
    models = {name: entry["model"] for name, entry in entries.items()}
    assert saved == sum(group.saved_bytes for group in find_groups(models)) > 0
    assert "Conv2d(8, 8" in printed and "could save" in printed


def test_every_class_before_and_after(entries, datasets, tmp_path, capsys):
    options = {"datasets": datasets, "device": "cpu", "strategy": "all", **QUICK, "tolerance": 0.3}
    entries["south_pico"]["eval_method"] = lambda model, loader: classification_eval(model, loader)
    plain = merge_workload(copy.deepcopy(entries), tmp_path / "results", **options)
    assert all(task["per_class"] is None for task in plain["tasks"].values())
    again = merge_workload(entries, tmp_path / "results", per_class=True, **options)
    tasks = again["tasks"]
    assert set(tasks["north_pico"]["per_class"]) == {"0", "1", "2"} and tasks["south_pico"]["per_class"] is None
    assert set(tasks["east_pico"]["per_class"]) == {"0", "1"}
    merged = [measured["merged"]["ap"] for measured in tasks["east_pico"]["per_class"].values()]
    assert sum(merged) / 2 == pytest.approx(tasks["east_pico"]["merged_acc"])
    right = [m["merged"]["top1"] * m["merged"]["images"] for m in tasks["north_pico"]["per_class"].values()]
    assert sum(right) / 24 == pytest.approx(tasks["north_pico"]["merged_acc"])
    assert read_manifest(tmp_path / "results")["tasks"] == tasks
    printed = capsys.readouterr().out
    assert "unmerged -> merged" in printed and "class2" in printed and "ap50" in printed


def test_on_a_cpu_weights_lie_channels_last_and_results_do_not(entries, datasets, tmp_path):
    """Convolutions are quicker that way; what is stored is laid out as everybody expects it."""
    merge(entries, tmp_path / "results", datasets, strategy="all")
    model = entries["north_pico"]["model"]
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    state = torch.load(tmp_path / "results" / "weights" / "north_pico.pt", weights_only=True)
    assert state["conv2.weight"].is_contiguous()
    assert torch.equal(state["conv2.weight"], model.conv2.weight)


def test_tasks_that_met_their_targets_keep_what_they_share_when_another_fails(
    entries, trained_entries, datasets, tmp_path, monkeypatch, capsys
):
    """The failing task gets its weights back bit by bit, and the folder holds a saving after the first trial."""
    honest, states = merger.recover, []

    def east_fails(models, tasks, *more):
        outcome = honest(models, tasks, *more)
        if "east_pico" not in tasks:
            return outcome
        states.append({n: {k: v.clone() for k, v in models[n].state_dict().items()} for n in outcome.met})
        met = tuple(name for name in outcome.met if name != "east_pico")
        accuracies = {**outcome.accuracies, "east_pico": 0.1}
        return Outcome("needs training", accuracies, met, outcome.steps, outcome.samples, verified=met)

    monkeypatch.setattr(merger, "recover", east_fails)
    with monkeypatch.context() as patch:
        patch.setattr(Merger, "play_round", stopped_after_one_round())
        with pytest.raises(KeyboardInterrupt):
            merge(entries, tmp_path / "results", datasets, strategy="adaptive", tolerance=0.3)
    manifest = read_manifest(tmp_path / "results")
    (row,) = manifest["run"]["rounds"]
    assert row["kept"] and row["kept_for"] == ["north_pico", "south_pico"] and row["met"] == row["kept_for"]
    assert manifest["memory"]["saved_bytes"] > 0 and "2/3 kept for 2" in capsys.readouterr().out
    assert {o["task"] for group in manifest["shared_layers"] for o in group["occurrences"]} == set(row["kept_for"])
    before = trained_entries["east_pico"]["model"].state_dict()
    assert same(dict(entries["east_pico"]["model"].state_dict()), before), "as it came, bit by bit"
    for name in row["kept_for"]:
        assert same(dict(entries[name]["model"].state_dict()), states[0][name]), "as it was judged"
        assert manifest["tasks"][name]["merged_acc"] == row["accuracies"][name] >= manifest["tasks"][name]["target_acc"]
    resumed = merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets, strategy="adaptive", tolerance=0.3)
    assert resumed["memory"]["saved_bytes"] >= manifest["memory"]["saved_bytes"]
    assert all(task["met"] for task in resumed["tasks"].values())


def stopped_after_one_round():
    play_round = Merger.play_round

    def stopped(self, proposal):
        if self.record.rounds:
            raise KeyboardInterrupt
        return play_round(self, proposal)

    return stopped
