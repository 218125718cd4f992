"""`share_norm` where a search has released a task from a first layer: it is tied after all, or all stays as it is."""

import copy
import json

import pytest
import torch
from pico import PicoDetector, PicoNet
from test_merger import merge
from torch import nn

from gemel.console.tables import closing_report
from gemel.environment.clock import TimeOver
from gemel.merging.first_layers import FirstLayers
from gemel.merging.resume import new_strategy
from gemel.options import MergeOptions
from gemel.results_store.load import load_merged
from gemel.results_store.verify import FAIL, verify
from gemel.sharing.groups import find_groups, joined
from gemel.strategies.baselines import All

OPTIONS = {"strategy": "all", "share_norm": True, "tolerance": 0.8, "initial_weights": "least_squares"}
RELEASED = "east_pico"  # the detector


@pytest.fixture
def released(monkeypatch):
    """The strategy "all" ties everything but the detector's first layer."""
    original = All.__init__

    def begin(self, models, groups):
        tasks = [task for task in models if task != RELEASED]
        original(self, models, tuple(g.restricted_to(tasks) if is_first(g) else g for g in groups))

    monkeypatch.setattr(All, "__init__", begin)


def is_first(group) -> bool:
    return any(o.layer == "conv1" for o in group.occurrences)


def copies(entries) -> dict:
    return {name: {**entry, "model": copy.deepcopy(entry["model"])} for name, entry in entries.items()}


def tasks_of(manifest, layer: str) -> set[str]:
    """The tasks that share this layer with another one."""
    return {o["task"] for g in manifest["shared_layers"] for o in g["occurrences"] if o["layer"] == layer}


@pytest.mark.parametrize("store", ["float32", pytest.param("int8", marks=pytest.mark.exhaustive)])
def test_a_released_first_layer_is_tied_and_stays_so(released, trained_entries, datasets, tmp_path, store):
    options = {**OPTIONS, "store_dtype": store}
    manifest = merge(copies(trained_entries), tmp_path / "results", datasets, **options)
    run = manifest["run"]["shared_normalisation"]
    assert run["tied_layers"] == 1 and any(RELEASED in group for group in run["groups"])
    assert "the search had left out: 1 are tied" in closing_report(manifest, False)
    assert tasks_of(manifest, "conv1") == set(trained_entries) and tasks_of(manifest, "bn1")
    assert all(task["met"] for task in manifest["tasks"].values()) and manifest["run"]["finished"]
    models = load_merged(tmp_path / "results", {n: e["model"] for n, e in copies(trained_entries).items()})
    assert len({id(model.conv1.weight) for model in models.values()}) == 1
    assert not [check for check in verify(tmp_path / "results", {}) if check.status == FAIL]
    missing = [o["layer"] for row in manifest["run"]["not_shared"] for o in row["occurrences"]]
    assert "conv1" not in missing
    again = merge(copies(trained_entries), tmp_path / "results", datasets, per_class=True, **options)
    assert again["shared_layers"] == manifest["shared_layers"] and again["tensors"] == manifest["tensors"]


@pytest.mark.parametrize("failure", ["below target", "time over"])
def test_a_first_layer_that_cannot_be_tied_leaves_all_as_it_was(
    released, trained_entries, datasets, tmp_path, monkeypatch, failure
):
    without = merge(copies(trained_entries), tmp_path / "without", datasets, **{**OPTIONS, "share_norm": False})

    def judged(self, measured) -> bool:
        if failure == "time over":
            raise TimeOver
        return False

    monkeypatch.setattr(FirstLayers, "_all_met", judged)
    manifest = merge(copies(trained_entries), tmp_path / "results", datasets, **OPTIONS, max_epochs=0.25)
    tied = [group for group in manifest["shared_layers"] if not group.get("normalisation")]
    assert tied == without["shared_layers"]
    run = manifest["run"]["shared_normalisation"]
    if failure == "time over":
        assert run is None and not manifest["run"]["finished"] and manifest["tensors"] == without["tensors"]
    else:
        assert run["tied_layers"] == 0 and run["trials"] > 0 and not any(RELEASED in g for g in run["groups"])


@pytest.mark.parametrize("name", ["adaptive", "apart", "all", "gemel", "stem"])
def test_a_strategy_keeps_what_is_tied_after_it(name):
    """Also through its state, as a run that is resumed has it."""
    torch.manual_seed(0)
    models = nn.ModuleDict({"a_x": PicoNet(3), "b_x": PicoNet(3), "c_x": PicoDetector()})
    if name == "apart":
        models.update({"d_x": PicoNet(3, width=4), "e_x": PicoNet(3, width=4)})
    options = MergeOptions(strategy="adaptive" if name == "apart" else name, initial_weights="mean")
    groups = find_groups(models)

    def new():
        return new_strategy(options, models, groups)

    strategy = new()
    strategy.propose()
    strategy.record(False, ["a_x", "b_x"])
    more = joined(
        strategy.kept, tuple(g.restricted_to(["a_x", "c_x"]) for g in groups if is_first(g) and len(g.tasks) > 2)
    )
    assert more and more != strategy.kept
    strategy.keep_more(more)
    resumed = new()
    resumed.load_state(json.loads(json.dumps(strategy.state())))
    assert strategy.kept == resumed.kept == more
