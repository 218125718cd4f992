"""The same dictionary merged twice in one process, as when a notebook's cell is run again."""

import copy

import pytest
import torch
from pico import same_state

from gemel.results_store.load import load_merged
from gemel.workload import WorkloadError
from merge_workloads import merge_workload

EASY = {"tolerance": 0.5, "device": "cpu"}


@pytest.fixture
def pair(entries):
    return {name: entries[name] for name in ("north_pico", "south_pico")}


def parameters_of(entries):
    return [id(p) for entry in entries.values() for p in entry["model"].parameters()]


def test_the_same_cell_twice_reports_the_result_again(pair, datasets, tmp_path, capsys):
    before = copy.deepcopy({name: entry["model"].state_dict() for name, entry in pair.items()})
    modes = [entry["model"].training for entry in pair.values()]
    pair["south_pico"]["model"].fc.requires_grad_(False)
    first = merge_workload(pair, tmp_path / "results", datasets=datasets, **EASY)
    assert first["shared_layers"] and len(set(parameters_of(pair))) < len(parameters_of(pair))
    again = merge_workload(pair, tmp_path / "results", datasets=datasets, **EASY)
    assert again["files"] == first["files"] and "holds the finished result" in capsys.readouterr().out
    fresh = merge_workload(pair, tmp_path / "results", datasets=datasets, fresh=True, **EASY)
    other = merge_workload(pair, tmp_path / "other", datasets=datasets, strategy="all", adapter_budget=None, **EASY)
    assert fresh["shared_layers"] == first["shared_layers"]
    assert other["tasks"]["north_pico"]["measured_unmerged_acc"] == pair["north_pico"]["unmerged_acc"]
    with pytest.raises(WorkloadError):
        merge_workload(pair, tmp_path / "results", datasets=tmp_path, **EASY)
    assert all(same_state(entry["model"].state_dict(), before[name]) for name, entry in pair.items())
    assert [entry["model"].training for entry in pair.values()] == modes
    assert len(set(parameters_of(pair))) == len(parameters_of(pair))
    assert [p.requires_grad for p in pair["south_pico"]["model"].fc.parameters()] == [False, False]


def test_models_that_somebody_changed_after_the_merge_stay_as_they_are(pair, datasets, tmp_path):
    merge_workload(pair, tmp_path / "results", datasets=datasets, **EASY)
    model = pair["north_pico"]["model"]
    with torch.no_grad():
        model.fc.weight += 1
    changed = copy.deepcopy(model.state_dict())
    with pytest.raises(WorkloadError, match="results: got north_pico: model: was '.*', is '.*'; allowed: the same as"):
        merge_workload(pair, tmp_path / "results", datasets=datasets, **EASY)
    assert same_state(model.state_dict(), changed)


def test_what_the_first_call_stored_is_untouched(pair, datasets, tmp_path):
    merge_workload(pair, tmp_path / "results", datasets=datasets, **EASY)
    plain = {name: copy.deepcopy(entry["model"]) for name, entry in pair.items()}
    with pytest.raises(WorkloadError):
        merge_workload(pair, tmp_path / "results", datasets=tmp_path, **EASY)  # brings the models back
    loaded = load_merged(tmp_path / "results", {name: entry["model"] for name, entry in pair.items()})
    images = torch.rand(4, 3, 16, 16)
    for name, model in loaded.items():
        assert torch.allclose(model.eval()(images), plain[name].eval()(images), atol=1e-5)
