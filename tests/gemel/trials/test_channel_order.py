"""The order of channels through every end of a run: models, unmerged copies and stored tensors stay in step."""

import copy

import pytest
import torch
from pico import CPU, same_state
from torch import nn

import merger
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.training.outcome import Outcome
from merge_workloads import merge_workload
from merger import Merger

OPTIONS = {"strategy": "gemel", "alignment": "activations", "initial_weights": "least_squares", "tolerance": 0.3}


def merge(entries, results, datasets, **options) -> dict:
    return merge_workload(entries, results, datasets=datasets, device="cpu", **{**OPTIONS, **options})


def state_of(entries) -> dict:
    models = nn.ModuleDict({name: entry["model"] for name, entry in entries.items()})
    return {key: value.clone() for key, value in models.state_dict().items()}


def give_up(models, tasks, *more) -> Outcome:
    return Outcome("given up", dict.fromkeys(tasks, 0.0), (), 0, 0)


def outputs_differ(merge_: Merger) -> dict[str, float]:
    """Largest difference of what each live model that shares nothing puts out and what its unmerged copy does."""
    state = merge_.state
    sharing = {task for group in state.kept for task in group.tasks}
    found = {}
    for name in set(merge_.tasks) - sharing:
        images = torch.stack([merge_.data[name].val.dataset[i][0] for i in range(4)])
        with torch.no_grad():
            ours, theirs = state.models[name].eval()(images), state.unmerged[name](images)
        if torch.is_tensor(ours):
            found[name] = float((ours - theirs).abs().max())
    return found


def layers_differ(merge_: Merger) -> bool:
    """Whether a layer of a model that shares nothing is not, bit for bit, that of its unmerged copy."""
    state = merge_.state
    sharing = {task for group in state.kept for task in group.tasks}
    return not all(
        same_state(state.models[name].state_dict(), state.unmerged[name].state_dict())
        for name in set(merge_.tasks) - sharing
    )


class StopsBefore:
    """Interrupts a merge before the round with that number, after a look at its models."""

    def __init__(self, number: int):
        self.number, self.play_round = number, Merger.play_round
        self.moved: dict = {}
        self.in_step: list[bool] = []

    def __get__(self, merge_, owner=None):
        return lambda proposal: self(merge_, proposal)

    def __call__(self, merge_, proposal) -> bool:
        self.moved.update(merge_.state.order.permutations)
        self.in_step.append(not layers_differ(merge_) and max(outputs_differ(merge_).values(), default=0.0) < 1e-4)
        if len(merge_.record.rounds) == self.number:
            raise KeyboardInterrupt
        return self.play_round(merge_, proposal)


def test_models_that_share_nothing_get_their_order_of_channels_back(
    entries, trained_entries, datasets, tmp_path, monkeypatch
):
    """Channels are aligned before anything is tied; what ends up private is bit for bit what came in."""
    watch = StopsBefore(10**6)
    monkeypatch.setattr(Merger, "play_round", watch)
    monkeypatch.setattr(merger, "recover", give_up)
    manifest = merge(entries, tmp_path / "results", datasets)
    assert any(watch.moved.values()), "the pico models were trained apart, so some channels move"
    assert all(watch.in_step) and same_state(state_of(entries), state_of(trained_entries))
    assert not any(task["permuted"] for task in manifest["tasks"].values())


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_search_has_models_and_unmerged_copies_in_one_order(
    entries, trained_entries, datasets, tmp_path, monkeypatch, killed
):
    """After an interrupt, which restores the order of channels, and after a kill behind a failed round, which does not.

    A layer that is then released gets weights of the unmerged copy: in another order the model would compute nonsense.
    """
    monkeypatch.setattr(merger, "recover", give_up)
    first, second = StopsBefore(1), StopsBefore(2)
    with monkeypatch.context() as patch:
        patch.setattr(Merger, "play_round", first)
        if killed:  # nothing that runs at an orderly end
            patch.setattr("gemel.trials.state.MergeState.restore_channel_order", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets)
    assert any(first.moved.values()) and any(read_manifest(tmp_path / "results")["run"]["permutations"].values())
    with monkeypatch.context() as patch:
        patch.setattr(Merger, "play_round", second)
        with pytest.raises(KeyboardInterrupt):
            merge(entries, tmp_path / "results", datasets)
    assert second.in_step and all(first.in_step + second.in_step)
    assert same_state(state_of(entries), state_of(trained_entries)), "and the models are handed back as they came"


def test_a_resumed_search_ends_where_the_uninterrupted_one_ends(
    entries, trained_entries, datasets, tmp_path, monkeypatch
):
    """Some rounds kept, some not: the weights that are fitted after resuming are those of the whole run."""
    honest, rounds = merger.recover, []

    def some(models, tasks, data, options, context, *more):
        outcome = honest(models, tasks, data, options, context, *more)
        rounds.append(context.purpose[1])
        return outcome if context.purpose[1] % 2 else give_up(models, tasks)

    monkeypatch.setattr(merger, "recover", some)
    whole = merge(entries, tmp_path / "whole", datasets)
    assert {row["kept"] for row in whole["run"]["rounds"]} == {True, False}
    for number in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(Merger, "play_round", StopsBefore(number))
            with pytest.raises(KeyboardInterrupt):
                merge(copy.deepcopy(trained_entries), tmp_path / str(number), datasets)
        again = merge(copy.deepcopy(trained_entries), tmp_path / str(number), datasets)
        assert again["tensors"] == whole["tensors"] and again["tasks"] == whole["tasks"], number


def test_a_task_is_added_to_models_in_either_order(trained_entries, datasets, tmp_path, monkeypatch):
    """One task shares nothing and is stored in its own order; then another task comes."""
    two = {name: copy.deepcopy(trained_entries[name]) for name in ("north_pico", "south_pico")}
    with monkeypatch.context() as patch:
        patch.setattr(merger, "recover", give_up)
        before = merge(two, tmp_path / "results", datasets)
    assert any(before["run"]["permutations"].values()) and not before["shared_layers"]
    watch = StopsBefore(10**6)
    monkeypatch.setattr(Merger, "play_round", watch)
    after = merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets)
    assert watch.in_step and all(watch.in_step) and after["shared_layers"]
    assert all(task["met"] for task in after["tasks"].values())


def test_what_is_stored_says_in_which_order_it_is(entries, trained_entries, datasets, tmp_path):
    """A kept round stores permuted models; loaded into modules of the user they compute what was judged."""
    manifest = merge(entries, tmp_path / "results", datasets)
    moved = {name for name, spaces in manifest["run"]["permutations"].items() if spaces}
    sharing = {o["task"] for group in manifest["shared_layers"] for o in group["occurrences"]}
    assert {name for name, task in manifest["tasks"].items() if task["permuted"]} == moved & sharing != set()
    copies = {name: copy.deepcopy(entry["model"]) for name, entry in trained_entries.items()}
    loaded = load_merged(tmp_path / "results", copies, CPU)
    images = torch.rand(4, 3, 16, 16)
    for name in ("north_pico", "south_pico"):
        assert torch.allclose(loaded[name](images), entries[name]["model"].eval()(images), atol=1e-5)


def test_a_finished_result_hands_back_models_as_they_are_stored(trained_entries, datasets, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(merger, "recover", give_up)
        first = merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets)
    assert first["run"]["finished"]
    entries = copy.deepcopy(trained_entries)
    again = merge(entries, tmp_path / "results", datasets)
    assert again == first and same_state(state_of(entries), state_of(trained_entries))


def test_a_task_that_shares_nothing_beside_others_that_do(trained_entries, datasets, tmp_path, monkeypatch):
    """It was stored in the order that alignment found, and ends in its own: live, on disk, and as the manifest says."""
    honest = merger.recover

    def without_one(models, tasks, *more):
        if alone not in tasks:
            return honest(models, tasks, *more)
        others = [name for name in tasks if name != alone]
        return Outcome("given up", {**dict.fromkeys(others, 1.0), alone: 0.0}, tuple(others), 0, 0)

    monkeypatch.setattr(merger, "recover", without_one)
    entries = {**trained_entries, "west_pico": {**copy.deepcopy(trained_entries["north_pico"]), "dataset": "north_CL"}}
    del entries["east_pico"]
    moved = []
    for alone in ("north_pico", "south_pico"):
        own = copy.deepcopy(entries)
        manifest = merge(own, tmp_path / alone, datasets, strategy="adaptive", alignment="weights")
        assert not manifest["tasks"][alone]["permuted"] and manifest["shared_layers"]
        assert same_state(own[alone]["model"].state_dict(), trained_entries[alone]["model"].state_dict())
        moved.append(bool(manifest["run"]["permutations"][alone]))
    assert any(moved), "or nothing was tried"


def test_alignment_is_recorded_before_the_first_round_is_decided(trained_entries, datasets, tmp_path, monkeypatch):
    """A run that is killed within it goes on in the order that the weights of the round in flight have."""
    monkeypatch.setattr(Merger, "play_round", StopsBefore(0))
    with pytest.raises(KeyboardInterrupt):
        merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets)
    assert any(read_manifest(tmp_path / "results")["run"]["permutations"].values())
