"""Going on after an end that nobody planned: within a round, after Ctrl-C, with other tasks, without memory."""

import contextlib
import copy
import os
import signal

import pytest
import torch
from long_rounds import CPU, merge, same, state_of
from pico import PicoNet, classification_entry, thresholds, write_classification
from torch import nn

import merger
from dataset_manager import open_task
from gemel.datasets.folders import SampleError
from gemel.datasets.loaders import reseed
from gemel.environment.clock import Clock
from gemel.environment.interrupts import Interrupted, Interrupts
from gemel.environment.seeds import random_state, seeded, set_random_state
from gemel.evaluation.eval_method import evaluate
from gemel.results_store import files as results_files
from gemel.results_store.checkpoint import read_checkpoint
from gemel.results_store.files import ResultsError
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.sharing.adapters import adapter_of
from gemel.sharing.groups import compared_layers, find_groups, from_plain, saved_bytes
from gemel.training import validation
from gemel.training.batches import Batches
from gemel.training.context import RoundContext
from gemel.training.distillation import Teacher
from gemel.training.options import TrainingOptions
from gemel.training.outcome import MET, Outcome
from gemel.trials import evaluator
from gemel.workload import WorkloadError, read_workload
from merger import Merger
from trainer import recover


class StopsAfter:
    """The user's wish to end, after a number of steps."""

    def __init__(self, steps: int):
        self.steps, self.asked = steps, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked > self.steps


TAUGHT = {"feature_weight": 1.0, "probability_weight": 1.0, "private_epochs": 1.0}


@pytest.mark.parametrize("options", [{}, TAUGHT, {**TAUGHT, "precision": "bfloat16"}])
@pytest.mark.parametrize("steps", [0, 3, 11])
def test_a_round_goes_on_within_bit_for_bit(entries, tasks, data, steps, options, monkeypatch):
    """The weights, the optimizer, the average, the batches and the random numbers are all where they were."""
    training = TrainingOptions(learning_rate=0.005, max_epochs=4, patience_epochs=10, **options)
    monkeypatch.setattr(validation, "evaluate", lambda task, loader, model=None: 0.1)  # nobody gets there
    start = state_of(entries)
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    unmerged = copy.deepcopy(models).eval()

    def run(**more):
        groups = find_groups(models)
        teachers = {n: Teacher(models[n], unmerged[n], compared_layers(models[n], n, groups)) for n in tasks}
        try:
            around = RoundContext(CPU, 0, ("x",), **more)
            return recover(models, tasks, data, training, around, teachers if training.teaches else {})
        finally:
            for teacher in teachers.values():
                teacher.close()

    whole = run()
    expected = state_of(entries)
    models.load_state_dict(start)
    saved = []
    with pytest.raises(Interrupted):
        clock = Clock()
        clock.stop_asked, clock.raise_if_over = StopsAfter(steps), lambda: None
        run(save=lambda state, last: saved.append(copy.deepcopy(state)), clock=clock)
    assert saved[-1]["step"] == steps
    models.load_state_dict(start)
    torch.manual_seed(99)  # what the global generators hold has no say
    assert run(saved=saved[-1]) == whole and whole.steps > steps
    assert same(expected, state_of(entries))


PREFIX = {"strategy": "gemel", "freeze_prefix": True}


@pytest.mark.parametrize(
    "steps, options",
    [
        (1, {}),
        pytest.param(14, PREFIX, marks=pytest.mark.exhaustive),
        pytest.param(14, {}, marks=pytest.mark.exhaustive),
        pytest.param(1, PREFIX, marks=pytest.mark.exhaustive),
    ],
)
def test_an_interrupted_run_ends_where_the_uninterrupted_one_ends(
    entries, trained_entries, datasets, tmp_path, monkeypatch, steps, options
):
    whole = merge(entries, tmp_path / "whole", datasets, **options)
    halted = copy.deepcopy(trained_entries)
    with monkeypatch.context() as patch:
        stop = StopsAfter(steps)
        patch.setattr("gemel.environment.interrupts.Interrupts.asked", lambda self: stop())
        patch.setattr(Clock, "raise_if_over", lambda self: None)  # only the trainer asks, once a step
        patch.setattr(Interrupts, "immediate", lambda self: contextlib.nullcontext())
        with pytest.raises(KeyboardInterrupt):
            merge(halted, tmp_path / "halted", datasets, **options)
    assert same(state_of(halted), state_of(trained_entries)), "the models are handed back as they were kept"
    assert read_checkpoint(tmp_path / "halted")["state"]["step"] == steps
    resumed = copy.deepcopy(trained_entries)
    manifest = merge(resumed, tmp_path / "halted", datasets, **options)
    assert manifest["tensors"] == whole["tensors"] and same(state_of(entries), state_of(resumed))
    assert not (tmp_path / "halted" / "in_flight.pt").exists()
    assert manifest["run"]["rounds"][0]["steps"] == whole["run"]["rounds"][0]["steps"] > steps


def test_an_interrupt_before_the_first_round_ends_there(entries, datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("gemel.environment.interrupts.Interrupts.asked", lambda self: True)
    with pytest.raises(KeyboardInterrupt):
        merge(entries, tmp_path / "results", datasets)
    assert not (tmp_path / "results").exists()


def test_random_states_go_through_a_file(tmp_path):
    with seeded(3, "x"):
        state = random_state()
        torch.save(state, tmp_path / "state.pt")
        expected = torch.rand(3)
        set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(torch.rand(3), expected)


def test_a_failed_trial_that_goes_on_survives_an_interruption(
    entries, trained_entries, datasets, tmp_path, monkeypatch
):
    """What was fitted and not met is trained from there: the weights are in the checkpoint between the two trials."""
    monkeypatch.setattr(
        "gemel.strategies.adaptive.THRESHOLDS", thresholds(worth_a_fit=1.0, worth_a_trial=0.3, worth_adapters=0.0)
    )
    honest, rounds = merger.recover, []

    def everything_then_a_part(self):
        part = tuple(group for group in self.groups if group.occurrences[0].layer != "conv2")
        return next((trial for trial in (self.groups, part) if self._is_new(trial)), None)

    monkeypatch.setattr("gemel.strategies.adaptive.Adaptive._most_promising", everything_then_a_part)

    def recover(models, tasks, data, options, *more):
        outcome = honest(models, tasks, data, options, *more)
        rounds.append(len(more[0].purpose) and more[0].purpose[1])
        if rounds[-1] in (0, 2):  # everything; the part that is filled in with adapters
            return Outcome("needs training", dict.fromkeys(tasks, 0.0), (), 0, 0)
        if rounds[-1] == 1:
            return Outcome(MET, dict.fromkeys(tasks, 1.0), tuple(tasks), 0, 0, tuple(tasks))
        return outcome

    monkeypatch.setattr(merger, "recover", recover)
    options = {"strategy": "adaptive", "private_epochs": 1.0, "tolerance": 0.3, "adapter_budget": 0.3}
    whole = merge(entries, tmp_path / "whole", datasets, **options)
    assert [row["kept"] for row in whole["run"]["rounds"][:3]] == [False, True, False] and rounds[:4] == [0, 1, 2, 3]
    halted, play_round = copy.deepcopy(trained_entries), Merger.play_round

    def killed(self, proposal):
        if len(self.record.rounds) == 3:
            raise KeyboardInterrupt
        return play_round(self, proposal)

    with monkeypatch.context() as patch:
        patch.setattr(Merger, "play_round", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(halted, tmp_path / "halted", datasets, **options)
    assert read_checkpoint(tmp_path / "halted")["working"]
    again = merge(copy.deepcopy(trained_entries), tmp_path / "halted", datasets, **options)
    assert again["tensors"] == whole["tensors"] and again["shared_layers"] == whole["shared_layers"]


# ---- tasks come and go --------------------------------------------------------------------------------------


def two_of(entries) -> dict:
    return {name: copy.deepcopy(entries[name]) for name in ("north_pico", "south_pico")}


def test_a_task_is_added_to_what_is_shared(trained_entries, datasets, tmp_path, capsys):
    options = {"strategy": "gemel", "initial_weights": "mean", "learning_rate": 0.02}
    before = merge(two_of(trained_entries), tmp_path / "results", datasets, **options)
    assert before["shared_layers"]
    everyone = copy.deepcopy(trained_entries)
    after = merge(everyone, tmp_path / "results", datasets, **options)
    assert "east_pico: a new task" in capsys.readouterr().out
    assert set(after["tasks"]) == set(trained_entries) and all(task["met"] for task in after["tasks"].values())
    for group in from_plain(before["shared_layers"]):
        assert any(set(group.occurrences) <= set(g.occurrences) for g in from_plain(after["shared_layers"]))
    assert after["memory"]["saved_bytes"] > before["memory"]["saved_bytes"]
    assert after["run"]["rounds"][: len(before["run"]["rounds"])] == before["run"]["rounds"]


def test_a_task_is_added_where_layers_pair_by_likeness(trained_entries, datasets, tmp_path):
    options = {"strategy": "adaptive", "initial_weights": None, "tolerance": 0.3, "matching": "weights"}
    before = merge(two_of(trained_entries), tmp_path / "results", datasets, **options)
    assert before["shared_layers"]
    after = merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets, **options)
    groups = from_plain(after["shared_layers"])
    assert all(len(set(group.tasks)) == len(group.tasks) for group in groups)
    for group in from_plain(before["shared_layers"]):
        assert any(set(group.occurrences) <= set(g.occurrences) for g in groups), "what is tied stays tied"
    assert after["memory"]["saved_bytes"] >= before["memory"]["saved_bytes"]
    assert all(task["met"] for task in after["tasks"].values())


def test_tasks_that_share_nothing_with_a_new_one_stay_as_they_are(trained_entries, datasets, tmp_path):
    write_classification(tmp_path / "more", "other_CL", 3, seed=9)
    root = tmp_path / "more"
    for folder in datasets.iterdir():
        (root / folder.name).symlink_to(folder)
    before = merge(two_of(trained_entries), tmp_path / "results", root)
    entries = {**two_of(trained_entries), "other_wide": classification_entry(PicoNet(3, width=5), 0.01, batch_size=6)}
    after = merge(entries, tmp_path / "results", root)
    for name in ("north_pico", "south_pico"):
        assert after["tensors"][name] == before["tensors"][name] and after["tasks"][name] == before["tasks"][name]
    assert after["shared_layers"] == before["shared_layers"] and "other_wide" in after["tasks"]


def test_a_task_that_is_taken_away_takes_its_private_tensors_along(trained_entries, datasets, tmp_path, capsys):
    before = merge(copy.deepcopy(trained_entries), tmp_path / "results", datasets)
    kept = two_of(trained_entries)
    after = merge(kept, tmp_path / "results", datasets)
    assert after["tasks"]["north_pico"]["test_acc"] == before["tasks"]["north_pico"]["test_acc"]
    assert "east_pico: the task is gone" in capsys.readouterr().out
    assert set(after["tasks"]) == set(kept) and not (tmp_path / "results" / "weights" / "east_pico.pt").exists()
    for name in kept:
        assert after["tasks"][name]["met"]
        assert after["tensors"][name] == before["tensors"][name]
    used = {key for name in kept for key in before["tensors"][name].values()}
    assert {key for task in after["tensors"].values() for key in task.values()} == used
    loaded = load_merged(tmp_path / "results", {name: copy.deepcopy(entry["model"]) for name, entry in kept.items()})
    assert saved_bytes(from_plain(after["shared_layers"])) == after["memory"]["saved_bytes"] > 0
    assert loaded["north_pico"].conv1.weight is loaded["south_pico"].conv1.weight


def test_a_workload_without_a_task_in_common_is_refused(trained_entries, datasets, tmp_path):
    first = merge({"north_pico": copy.deepcopy(trained_entries["north_pico"])}, tmp_path / "results", datasets)
    with pytest.raises(WorkloadError, match="tasks: were north_pico, are east_pico"):
        merge({"east_pico": copy.deepcopy(trained_entries["east_pico"])}, tmp_path / "results", datasets)
    assert read_manifest(tmp_path / "results") == first


def test_a_second_process_is_refused_before_it_evaluates_anything(entries, datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "evaluate", None)
    with results_files.lock(tmp_path / "results"), pytest.raises(ResultsError, match="another process is merging"):
        merge(entries, tmp_path / "results", datasets)


# ---- residuals ------------------------------------------------------------------------------------------------


def refuse_without_adapter(monkeypatch) -> None:
    """conv2 is never at target where it is shared without a residual."""
    honest = merger.recover

    def recover(models, tasks, *more):
        layers = [models[name].conv2 for name in tasks]
        shared = len({id(layer.weight) for layer in layers}) < len(layers)
        if shared and not all(adapter_of(layer) for layer in layers):
            return Outcome("needs training", dict.fromkeys(tasks, 0.1), (), 0, 0)
        return honest(models, tasks, *more)

    monkeypatch.setattr(merger, "recover", recover)


WITH_ADAPTERS = {
    "strategy": "adaptive",
    "initial_weights": None,
    "alignment": "none",
    "tolerance": 0.3,
    "adapter_budget": 0.3,
}


def test_what_is_shared_at_a_price_goes_through_every_door(trained_entries, datasets, tmp_path, monkeypatch, capsys):
    """A kill between rounds, a run that goes on, a task that is taken away: residuals are where they were."""
    refuse_without_adapter(monkeypatch)
    entries = copy.deepcopy(trained_entries)
    whole = merge(entries, tmp_path / "whole", datasets, **WITH_ADAPTERS)
    images = torch.rand(4, 3, 16, 16)
    loaded = load_merged(tmp_path / "whole", {n: copy.deepcopy(e["model"]) for n, e in trained_entries.items()})
    expected = loaded["north_pico"](images)
    assert torch.allclose(expected, entries["north_pico"]["model"].eval()(images), atol=1e-5)
    kept = {g.occurrences[0].layer: g for g in from_plain(whole["shared_layers"])}
    assert kept["conv2"].rank > 0 and kept["conv1"].rank == 0
    assert whole["memory"]["saved_bytes"] == saved_bytes(from_plain(whole["shared_layers"]))
    last, play_round = len(whole["run"]["rounds"]) - 1, Merger.play_round

    def killed(self, proposal):
        if len(self.record.rounds) == last:
            raise KeyboardInterrupt
        return play_round(self, proposal)

    with monkeypatch.context() as patch:
        patch.setattr(Merger, "play_round", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(copy.deepcopy(trained_entries), tmp_path / "halted", datasets, **WITH_ADAPTERS)
    again = merge(copy.deepcopy(trained_entries), tmp_path / "halted", datasets, **WITH_ADAPTERS)
    assert again["tensors"] == whole["tensors"] and again["shared_layers"] == whole["shared_layers"]

    alone = {name: copy.deepcopy(trained_entries[name]) for name in ("north_pico",)}
    after = merge(alone, tmp_path / "whole", datasets, **WITH_ADAPTERS)
    assert not after["shared_layers"] and not any("low_rank" in name for name in after["tensors"]["north_pico"])
    assert after["tasks"]["north_pico"]["merged_acc"] == whole["tasks"]["north_pico"]["merged_acc"]
    plain = torch.load(tmp_path / "whole" / "weights" / "north_pico.pt", weights_only=True)
    model = copy.deepcopy(trained_entries["north_pico"]["model"])
    model.load_state_dict(plain)
    assert torch.allclose(model.eval()(images), expected, atol=1e-4)


# ---- faults ---------------------------------------------------------------------------------------------------


def test_a_loader_process_that_is_killed_is_started_again(tasks, datasets):
    def some(kill: bool) -> list:
        task = tasks["north_pico"]
        data = open_task(task, [datasets], device=CPU, seed=0, batch_size=6, num_workers=1)
        reseed(data, 0, "x")
        batches, found = Batches(data), []
        for i in range(6):
            if kill and i == 2:
                os.kill(batches.loader._iterator._workers[0].pid, signal.SIGKILL)
                batches.loader._iterator._workers[0].join()
            found.append(batches.next()[0])
        return found

    assert all(torch.equal(a, b) for a, b in zip(some(kill=False), some(kill=True), strict=True))


def test_a_dataset_that_disappears_ends_the_run_with_its_name_and_the_result_stays(
    entries, datasets, tmp_path, monkeypatch
):
    honest = merger.recover

    def gone(*more):
        path = datasets / "north_CL" / "train" / "class0"
        monkeypatch.setattr(
            "gemel.datasets.folders.load_image", lambda p, turned: (_ for _ in ()).throw(FileNotFoundError(str(path)))
        )
        return honest(*more)

    monkeypatch.setattr(merger, "recover", gone)
    with pytest.raises(SampleError, match=r"pico: .*FileNotFoundError"):
        merge(entries, tmp_path / "results", datasets)
    assert read_manifest(tmp_path / "results")["memory"]["saved_bytes"] == 0
    assert load_merged(tmp_path / "results", {name: copy.deepcopy(entry["model"]) for name, entry in entries.items()})


def test_a_task_whose_partners_are_gone_keeps_what_it_reached_on_test(trained_entries, datasets, tmp_path):
    """It shares nothing any more, but its weights are those of the merge."""
    before = merge(two_of(trained_entries), tmp_path / "results", datasets)
    alone = {"north_pico": copy.deepcopy(trained_entries["north_pico"])}
    after = merge(alone, tmp_path / "results", datasets)
    assert before["shared_layers"] and not after["shared_layers"]
    task = read_workload(alone)[0]["north_pico"]
    data = open_task(task, [datasets], device=CPU, seed=0, batch_size=6)
    assert after["tasks"]["north_pico"]["test_acc"] == evaluate(task, data.test)
