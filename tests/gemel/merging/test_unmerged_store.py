"""--keep-unmerged: the unmerged models as a result of their own, and how much merged and unmerged agree."""

import copy
import shutil

import pytest
import torch
from torch import nn

from dataset_manager import open_task
from gemel.edge import Runtime
from gemel.edge.frames import RandomFrames
from gemel.edge.watch import WatchOptions
from gemel.evaluation.agreement import mean_agreement
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.results_store.verify import FAIL, verify
from gemel.sharing.precision import as_stored
from gemel.trials import evaluator
from gemel.workload import WorkloadError, read_workload
from merge_workloads import merge_workload

QUICK = {"learning_rate": 0.02, "max_epochs": 60, "patience_epochs": 10, "tolerance": 0.5, "device": "cpu"}


def merge(entries, results, datasets, **options) -> dict:
    return merge_workload(copy.deepcopy(entries), results, datasets=datasets, **{**QUICK, **options})


def copies_of(entries) -> dict[str, nn.Module]:
    return {name: copy.deepcopy(entry["model"]) for name, entry in entries.items()}


def assert_unmerged(path, entries, dtype: torch.dtype = torch.float32) -> None:
    """The folder holds the models of the dictionary, bit by bit, as a valid result that shares nothing."""
    loaded = load_merged(path, copies_of(entries), verify=True)
    for name, entry in entries.items():
        stored, own = loaded[name].state_dict(), as_stored(entry["model"], dtype).state_dict()
        assert stored.keys() == own.keys()
        assert all(torch.equal(value.float(), own[key].float()) for key, value in stored.items()), name
    manifest = read_manifest(path)
    assert manifest["shared_layers"] == [] and manifest["memory"]["saved_bytes"] == 0
    assert all(task["met"] for task in manifest["tasks"].values())


@pytest.fixture(scope="module")
def merged(trained_entries, datasets, tmp_path_factory):
    """A merge that aligns channels, with the unmerged models asked for once it was finished."""
    path = tmp_path_factory.mktemp("merged") / "results"
    first = merge(trained_entries, path, datasets)
    assert not (path / "unmerged").exists() and any(first["run"]["permutations"].values())
    return path, first, merge(trained_entries, path, datasets, keep_unmerged=True)


def test_the_models_are_kept_as_they_came(merged, trained_entries, datasets):
    path, first, again = merged
    assert again == first
    assert_unmerged(path / "unmerged", trained_entries)
    kept = read_manifest(path / "unmerged")["tasks"]
    assert {n: task["merged_acc"] for n, task in kept.items()} == {
        name: task["measured_unmerged_acc"] for name, task in first["tasks"].items()
    }
    assert kept["north_pico"]["test_acc"] == first["tasks"]["north_pico"]["unmerged_test_acc"]


def test_the_agreement_is_that_of_what_was_written(merged, trained_entries, datasets):
    path, manifest, _ = merged
    one, other = (load_merged(folder, copies_of(trained_entries)) for folder in (path, path / "unmerged"))
    tasks = read_workload(copy.deepcopy(trained_entries))[0]
    for name, task in tasks.items():
        data = open_task(task, [datasets], device=torch.device("cpu"), seed=0, batch_size=8)
        found = manifest["tasks"][name]["agreement"]
        assert found == pytest.approx(mean_agreement(task.kind, data.val, one[name], other[name]), abs=0.03)


def test_a_model_that_shares_nothing_is_not_compared(trained_entries, datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "mean_agreement", lambda *_: pytest.fail("the models are equal"))
    one = {"north_pico": trained_entries["north_pico"]}
    assert merge(one, tmp_path / "results", datasets)["tasks"]["north_pico"]["agreement"] == 1.0


def test_verify_checks_them(merged, tmp_path):
    path = shutil.copytree(merged[0], tmp_path / "results")
    checks = list(verify(path))
    assert not [check for check in checks if check.status == FAIL]
    assert any(f"{path / 'unmerged' / 'merged.json'}: valid" in check.what for check in checks)
    assert not any("not a file of the result" in check.what for check in checks)
    store = next((path / "unmerged").glob("*.safetensors"))
    content = bytearray(store.read_bytes())
    content[-1] ^= 1
    store.write_bytes(content)
    assert any(check.status == FAIL and str(store) in check.what for check in verify(path))


def test_the_edge_watches_with_them(merged, trained_entries):
    options = WatchOptions(1.0)
    with Runtime(merged[0], models=copies_of(trained_entries), watch=options, device="cpu") as runtime:
        summary = runtime.run(RandomFrames(16, 16), fps=1e6, count=5)
    agreed = {name: task["agreed"] for name, task in summary["watch"]["tasks"].items()}
    assert agreed == {name: task["agreement"] for name, task in merged[1]["tasks"].items()}
    assert all(task["sampled"] == 5 for task in summary["watch"]["tasks"].values())


def test_no_merge_resumes_from_them(merged, trained_entries, datasets):
    with pytest.raises(WorkloadError, match="--fresh to start anew"):
        merge(trained_entries, merged[0] / "unmerged", datasets)
    assert_unmerged(merged[0] / "unmerged", trained_entries)


def test_in_half_precision_they_are_judged_as_stored(trained_entries, datasets, tmp_path):
    two = {name: trained_entries[name] for name in ("north_pico", "south_pico")}
    manifest = merge(two, tmp_path / "results", datasets, strategy="all", store_dtype="bfloat16", keep_unmerged=True)
    assert_unmerged(tmp_path / "results" / "unmerged", two, torch.bfloat16)
    kept = read_manifest(tmp_path / "results" / "unmerged")
    assert kept["precision"] == manifest["precision"]


def test_what_is_not_ours_is_not_overwritten(trained_entries, datasets, tmp_path):
    folder = tmp_path / "results" / "unmerged"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "north_pico.pt").write_text("mine")
    with pytest.raises(WorkloadError, match=r"keep_unmerged: got .*unmerged, which holds weights/north_pico.pt"):
        merge(trained_entries, tmp_path / "results", datasets, keep_unmerged=True)
    shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorkloadError, match="which is no folder, or a link"):
        merge(trained_entries, tmp_path / "results", datasets, keep_unmerged=True)
    assert not list((tmp_path / "elsewhere").iterdir())
