"""What a merge is predicted to take in memory, and where that is more than there is."""

from dataclasses import replace

import pytest
import torch
from pico import same_state
from torch import nn

from gemel.environment.memory import memory_there
from gemel.fitting.memory import FitMemory
from gemel.forward.modes import state_on_cpu
from gemel.merging import earlier_merges, memory_need
from gemel.merging.measured_memory import FitWork, bytes_of_activations, bytes_of_fit, bytes_of_training
from gemel.merging.memory_need import Searched, memory_needs, memory_text
from gemel.options import MergeOptions
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.training.options import TrainingOptions
from gemel.trials.images import ImageSampler
from gemel.trials.state import MergeState
from merge_workloads import main, merge_workload

CPU = torch.device("cpu")


@pytest.fixture
def state(tasks) -> MergeState:
    return MergeState(tasks, CPU)


def test_training_takes_what_is_trained_and_the_activations_of_one_task(tasks, data, state):
    before = state_on_cpu(state.models)
    for parameter in tasks["north_pico"].model.conv1.parameters():
        parameter.requires_grad_(False)
    frozen = sum(parameter.nbytes for parameter in tasks["north_pico"].model.conv1.parameters())
    options = MergeOptions(training=TrainingOptions())
    each = [bytes_of_activations(tasks[n], data[n], state, options) for n in tasks]
    found = bytes_of_training(state.models, 1.0, max(each))
    trained = sum(parameter.nbytes for parameter in state.models.parameters()) - frozen
    assert found["gradients"] == trained and found["optimizer state"] == 2 * trained
    assert found["average of weights"] == distinct_bytes(state.models)
    assert found["activations of a batch"] == max(each) > 0
    assert same_state(before, state_on_cpu(state.models)), "measuring changes nothing"
    assert not any(parameter.grad is not None for parameter in state.models.parameters())


def test_activations_are_those_of_a_whole_batch(tasks, data, state):
    """Of a convolution and an activation: their outputs and the images, for each of the batch's images."""
    task = tasks["north_pico"]
    size, pixels = 6, 16 * 16

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 64, 3, padding=1)

        def forward(self, images):
            return torch.tanh(self.conv(images)).mean((2, 3))[:, :3]

    task = replace(task, model=Small())
    state.unmerged["north_pico"] = Small()
    options = MergeOptions(training=TrainingOptions())
    found = bytes_of_activations(task, data["north_pico"], state, options)
    assert found == pytest.approx(2 * size * 64 * pixels * 4, rel=0.1)


def test_what_is_predicted_is_the_sum_of_the_worst_moment(tasks, data, state):
    options = MergeOptions(cache_bytes=1000)
    images = ImageSampler(tasks, data, 0, CPU, 16 << 20)
    (need,) = memory_needs(tasks, data, state, images, options, Searched(()))
    models = distinct_bytes(state.models)
    assert need.at_worst["models"] == need.at_worst["unmerged copies"] == models
    assert need.predicted == sum(need.at_worst.values()) and need.there == memory_there(CPU)
    phases = [sum(parts.values()) for parts in need.phases.values()]
    assert need.predicted == sum(need.always.values()) + max(phases)
    assert need.always["samples in memory"] <= 1000
    assert "memory of the machine: up to about" in memory_text([need])


def test_a_trial_takes_what_the_tasks_take_that_can_share(tasks, data, state):
    """The largest set of tasks that are searched apart counts, not all; what it ties is trained once."""
    images, options = ImageSampler(tasks, data, 0, CPU, 16 << 20), MergeOptions(initial_weights="mean")
    groups = find_groups(state.models)
    two = ["north_pico", "south_pico"]

    def parts(searched: Searched) -> dict[str, int]:
        (need,) = memory_needs(tasks, data, state, images, options, searched)
        return {**need.always, **need.phases["training"]}

    whole, apart = parts(Searched(groups)), parts(Searched(groups, 0.0, [two, ["east_pico"]]))
    own = {name: distinct_bytes({name: state.models[name]}) for name in tasks}
    assert whole["copies to undo a round"] == sum(own.values())
    assert apart["copies to undo a round"] == sum(own[name] for name in two)
    assert apart["models"] == whole["models"], "nothing waits yet"
    tied = parts(Searched(groups, 1.0))
    saved = saved_bytes(groups)
    assert tied["average of weights"] == pytest.approx(sum(own.values()) - saved, abs=1)
    assert tied["weights that a round shares"] == sum(group.bytes for group in groups) > 0
    assert tied["gradients"] < whole["gradients"] and whole["weights that a round shares"] == 0


def test_a_fit_stays_within_its_shares():
    work = [
        FitWork(waiting=100, moving=30, backward=25, samples=50, equations=20),
        FitWork(waiting=50, moving=60, backward=40, samples=10, equations=5),
    ]
    assert bytes_of_fit(work, FitMemory(10_000)) == int((150 + 60 + 60 + 25) / 0.8), "and what the allocator leaves"
    assert bytes_of_fit(work, FitMemory(100)) == pytest.approx(100, abs=1), "all of it"
    assert bytes_of_fit([], FitMemory(100)) == 0
    large = [work[0]._replace(backward=1000)]
    assert bytes_of_fit(large, FitMemory(100)) == int((1000 + 20 + 20) / 0.8), "no fewer images"


def test_the_manifest_has_what_was_predicted_and_used(entries, datasets, tmp_path, capsys):
    options = {"datasets": datasets, "device": "cpu", "tolerance": 0.3}
    (found,) = merge_workload(entries, tmp_path / "r", **options)["run"]["memory_use"]
    assert found["predicted_bytes"] == sum(found["parts"].values()) and found["memory_of"] == "cpu"
    assert 0 < found["used_bytes"] < found["available_bytes"]
    assert "models as they came" in found["parts"]
    assert set(found["predicted_by_phase"]) == {"fits", "training"}
    assert max(found["predicted_by_phase"].values()) == found["predicted_bytes"]
    said = capsys.readouterr().out
    assert "memory of the machine: up to about" in said and "memory of the machine in this run: " in said
    again = merge_workload(entries, tmp_path / "r", per_class=True, **options)
    assert again["run"]["memory_use"] == [found], "a finished run is not predicted again"


def test_more_than_there_is_is_a_warning(entries, datasets, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory_need, "memory_there", lambda device: 1 << 20)
    merge_workload(entries, tmp_path / "r", datasets=datasets, device="cpu", tolerance=0.3, time_budget=30.0)
    assert "are predicted, and there are 1.00 MiB" in caplog.text


def test_a_program_that_merges_once_keeps_no_copies_of_models_as_they_came(monkeypatch, tmp_path):
    model = nn.Linear(2, 2)
    seen = []
    monkeypatch.setattr("merge_workloads._loaded", lambda workload: {})

    def merge(*args, **kwargs):
        earlier_merges.remember({"one": model})
        seen.append(earlier_merges.bytes_kept([model]))
        return {"memory": {}}

    monkeypatch.setattr("merge_workloads.merge_workload", merge)
    main(["--results", str(tmp_path)])
    earlier_merges.remember({"one": model})
    assert (seen, earlier_merges.bytes_kept([model])) == ([0], 24)
