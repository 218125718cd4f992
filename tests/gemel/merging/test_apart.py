"""A merge of tasks of which some share nothing with others."""

import copy
import json

import pytest
import torch
from pico import PicoNet, classification_entry
from rank_processes import on_ranks

from gemel.merging import memory_need
from gemel.merging.resume import load_search, new_strategy
from gemel.options import MergeOptions
from gemel.results_store.manifest import read_manifest
from gemel.sharing import residence
from gemel.sharing.groups import affected_tasks, find_groups, saved_bytes
from gemel.strategies.adaptive import Adaptive
from gemel.strategies.components import Components
from gemel.trials.state import MergeState
from merge_workloads import merge_workload

NARROW, WIDE = {"north_pico", "south_pico", "east_pico"}, {"wide_pico", "wider_pico"}


@pytest.fixture
def apart(entries):
    """The three tasks that share layers, and two wider ones that share layers with each other alone."""
    for seed, name in enumerate(sorted(WIDE)):
        torch.manual_seed(seed)
        wide = classification_entry(PicoNet(3, width=12), unmerged_acc=0.1, batch_size=6)
        entries[name] = {**wide, "dataset": "north_CL"}
    return entries


def merged(entries, results, datasets, **more) -> dict:
    return merge_workload(entries, results, datasets=datasets, device="cpu", tolerance=0.85, max_epochs=2, **more)


def test_a_round_changes_the_tasks_of_one_component(apart, datasets, tmp_path):
    manifest = merged(apart, tmp_path / "r", datasets)
    trained = [set(row["trained"]) for row in manifest["run"]["rounds"]]
    assert all(tasks <= NARROW or tasks <= WIDE for tasks in trained)
    shared = [{o["task"] for o in group["occurrences"]} for group in manifest["shared_layers"]]
    assert any(tasks <= NARROW for tasks in shared) and any(tasks <= WIDE for tasks in shared)
    assert manifest["run"]["finished"] and all(task["met"] for task in manifest["tasks"].values())


def test_where_memory_is_short_the_others_wait_and_the_result_is_the_same(
    apart, datasets, tmp_path, monkeypatch, caplog
):
    def in_file(model):
        return {"gemel-parked-" in str(p.untyped_storage().filename) for p in model.parameters()}

    seen = []
    begin = MergeState.begin_trial

    def spied(state, proposal, *how):
        continues = begin(state, proposal, *how)
        now = NARROW if set(affected_tasks(state.kept, proposal)) <= NARROW else WIDE
        for model in (state.models, state.unmerged):
            assert all(in_file(model[name]) == {name not in now} for name in NARROW | WIDE)
        seen.append(now)
        return continues

    usual = merged(copy.deepcopy(apart), tmp_path / "usual", datasets)
    monkeypatch.setattr(MergeState, "begin_trial", spied)
    monkeypatch.setattr(residence, "LEAST_BYTES", 1)
    monkeypatch.setattr(memory_need, "memory_there", lambda device: 1 << 20)
    short = merged(apart, tmp_path / "short", datasets)
    assert NARROW in seen and WIDE in seen and "does not change wait in files" in caplog.text
    assert short["shared_layers"] == usual["shared_layers"] and short["store"]["file"] == usual["store"]["file"]
    assert all(in_file(apart[name]["model"]) == {False} for name in NARROW | WIDE), "they come back at the end"
    use, more = short["run"]["memory_use"][0]["parts"], usual["run"]["memory_use"][0]["parts"]
    assert use["models"] < more["models"] and use["unmerged copies"] < more["unmerged copies"]


def test_a_run_that_is_cut_short_goes_on_with_and_without_a_memory_goal(apart, datasets, tmp_path, monkeypatch):
    """With one all tasks are searched together: that search begins on top of what was kept, and so does the next."""
    monkeypatch.setattr("merger.Merger._fits", lambda self: len(self.record.rounds) > 0)
    first = merged(apart, tmp_path / "r", datasets)
    monkeypatch.undo()
    saved = first["memory"]["saved_bytes"]
    assert not first["run"]["finished"] and saved > 0 and "components" in first["run"]["strategy_state"]
    goal = first["memory"]["merged_bytes"] - 4
    second = merged(apart, tmp_path / "r", datasets, memory=goal)
    assert "components" not in second["run"]["strategy_state"] and second["memory"]["saved_bytes"] >= saved
    third = merged(apart, tmp_path / "r", datasets)
    assert third["run"]["finished"] and third["memory"]["saved_bytes"] >= second["memory"]["saved_bytes"]
    assert read_manifest(tmp_path / "r")["memory"] == third["memory"]


@pytest.mark.parametrize("memory", [(None, 1), (1, None)])
def test_a_search_of_the_other_kind_hands_over_what_it_kept(memory):
    models = {f"task{i}_x": PicoNet(width=width) for i, width in enumerate((8, 8, 12, 12))}
    groups = find_groups(models)
    before, after = (MergeOptions(memory=bytes_, initial_weights="mean") for bytes_ in memory)
    earlier = new_strategy(before, models, groups)
    earlier.goal_saving = None
    earlier.propose()
    earlier.record(True, set(models))
    strategy = new_strategy(after, models, groups)
    assert {type(earlier), type(strategy)} == {Adaptive, Components}
    strategy.goal_saving = None
    assert not load_search(strategy, json.loads(json.dumps(earlier.state())), after, models, groups)
    assert strategy.kept == earlier.kept and saved_bytes(strategy.kept) > 0
    again = new_strategy(before, models, groups)
    assert load_search(again, json.loads(json.dumps(earlier.state())), before, models, groups)
    assert again.kept == earlier.kept


@pytest.mark.exhaustive
def test_two_ranks_keep_what_one_process_keeps(apart, datasets, tmp_path):
    found = on_ranks(2, lambda: merged(apart, tmp_path / "two", datasets)["shared_layers"])
    assert found[0] == found[1] == merged(apart, tmp_path / "one", datasets)["shared_layers"]
