"""Merges whose store has weights of 8 bits: judged with the values that load, a quarter of the bytes."""

import copy
import shutil
import warnings

import pytest
import torch
from rounded_stores import QUICK, copies_of, interrupted_in_the_second_round, two_of
from torch.utils._pytree import tree_leaves

from dataset_manager import open_task
from gemel.edge import Runtime
from gemel.edge.frames import RandomFrames
from gemel.evaluation.eval_method import evaluate
from gemel.forward.eight_bits import SCALE
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import json_bytes, read_manifest, read_result, seal
from gemel.results_store.tensors import SCALES
from gemel.results_store.verify import FAIL, verify
from gemel.sharing.memory import distinct_tensors
from gemel.sharing.precision import stored_bytes
from gemel.sharing.quantisation import is_rounded, quantised_weights
from gemel.workload import WorkloadError, read_workload
from merge_workloads import merge_workload


def merge(entries, results, datasets, **options) -> dict:
    given = {**QUICK, "store_dtype": "int8", "strategy": "adaptive", **options}
    return merge_workload(entries, results, datasets=datasets, **given)


@pytest.fixture(scope="module")
def merged(trained_entries, datasets, tmp_path_factory):
    """(results folder, its manifest, the models as they were handed back)."""
    path, entries = tmp_path_factory.mktemp("merged") / "results", copy.deepcopy(trained_entries)
    manifest = merge(entries, path, datasets)
    return path, manifest, {name: entry["model"] for name, entry in entries.items()}


def check(path, manifest, entries, came, datasets) -> None:
    """What was judged is what loads, and bytes are those of the store."""
    loaded = load_merged(path, came)
    for name, task in read_workload(entries)[0].items():
        data = open_task(task, [datasets], device=torch.device("cpu"), seed=0, batch_size=8)
        record = manifest["tasks"][name]
        assert evaluate(task, data.val, loaded[name]) == record["merged_acc"] >= record["target_acc"]
        assert all(map(is_rounded, quantised_weights(loaded[name])))
    assert manifest["memory"]["merged_bytes"] == stored_bytes(loaded, torch.int8)
    assert not [check for check in verify(path) if check.status == FAIL]


def test_what_ships_is_judged_as_it_loads(merged, trained_entries, datasets):
    path, manifest, _ = merged
    assert manifest["memory"]["saved_bytes"] > 0
    assert manifest["precision"] == {"weights": "int8", "arithmetic": "float32", "device": "cpu"}
    check(path, manifest, copy.deepcopy(trained_entries), copies_of(trained_entries), datasets)


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["all", "gemel", "stem"])
def test_other_strategies_ship_what_they_judged(entries, trained_entries, datasets, tmp_path, strategy):
    manifest = merge(entries, tmp_path / "results", datasets, strategy=strategy)
    check(tmp_path / "results", manifest, entries, copies_of(trained_entries), datasets)


def test_bytes_are_quartered_but_for_scales_and_what_stays(merged, trained_entries):
    path, manifest, handed_back = merged
    small = {id(w): w for model in handed_back.values() for w in quantised_weights(model)}
    others = sum(t.nbytes for t in distinct_tensors(handed_back) if id(t) not in small)
    weights, scales = sum(w.nbytes for w in small.values()), sum(4 * len(w) for w in small.values())
    assert 4 * (manifest["memory"]["merged_bytes"] - others - scales) == weights
    store = read_result(path)[1]
    assert sum(entry.bytes for entry in store.entries.values()) == manifest["memory"]["merged_bytes"]
    assert sum(entry.bytes for key, entry in store.entries.items() if key.endswith(SCALES)) == scales
    rows = manifest["run"]["rounds"]
    assert rows[-1]["saved_bytes"] == manifest["memory"]["saved_bytes"]


def test_a_round_that_misses_only_as_stored_is_undone(entries, trained_entries, datasets, tmp_path):
    """The eval method says 0 for rounded weights that are not those of the unmerged model."""
    first: dict = {}
    entries = {name: entries[name] for name in ("north_pico", "south_pico")}
    for name, entry in entries.items():
        honest = entry["eval_method"]

        def judged(model, loader, honest=honest, name=name):
            own = quantised_weights(model)
            if not all(map(is_rounded, own)):
                return honest(model, loader)
            known = first.setdefault(name, [w.clone() for w in own])
            return honest(model, loader) if all(map(torch.equal, own, known)) else 0.0

        entry["eval_method"] = judged
    manifest = merge(entries, tmp_path / "results", datasets, strategy="all")
    assert manifest["memory"]["saved_bytes"] == 0 and not manifest["shared_layers"]
    assert "below target in the type of the store" in {row["reason"] for row in manifest["run"]["rounds"]}
    for name, model in load_merged(tmp_path / "results", copies_of(two_of(trained_entries))).items():
        assert all(map(torch.equal, quantised_weights(model), first[name])), "the values that were judged"


def test_a_model_that_misses_its_target_in_8_bits_is_named_and_unchanged(entries, datasets, tmp_path):
    for entry in entries.values():
        honest = entry["eval_method"]
        entry["eval_method"] = lambda model, loader, honest=honest: (
            0.0 if all(map(is_rounded, quantised_weights(model))) else honest(model, loader)
        )
    before = {name: copy.deepcopy(entry["model"].state_dict()) for name, entry in entries.items()}
    with pytest.raises(WorkloadError, match=r"north_pico: store_dtype: got int8, in which .* reaches 0.0000"):
        merge(entries, tmp_path / "results", datasets)
    assert not (tmp_path / "results").exists()
    for name, entry in entries.items():
        assert all(torch.equal(value, before[name][key]) for key, value in entry["model"].state_dict().items())


@pytest.mark.exhaustive
def test_an_interrupted_run_ends_where_the_uninterrupted_one_ends(trained_entries, datasets, tmp_path):
    entries, options = two_of(trained_entries), {"strategy": "gemel", "tolerance": 0.4}
    whole = merge(entries, tmp_path / "whole", datasets, **options)
    assert len(whole["run"]["rounds"]) > 1
    with interrupted_in_the_second_round():
        merge(two_of(trained_entries), tmp_path / "halted", datasets, **options)
    resumed = two_of(trained_entries)
    again = merge(resumed, tmp_path / "halted", datasets, **options)
    assert again["tensors"] == whole["tensors"] and again["memory"] == whole["memory"]
    for name, entry in entries.items():
        own, other = entry["model"].state_dict(), resumed[name]["model"].state_dict()
        assert all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.exhaustive
def test_a_task_whose_partner_is_gone_is_judged_again(trained_entries, datasets, tmp_path):
    """Its scales, biases and adapters go into its weights, which are then rounded anew."""
    options = {"strategy": "adaptive", "tolerance": 0.3}
    before = merge(two_of(trained_entries), tmp_path / "results", datasets, **options)
    assert any(group.get("affine_bytes") or group.get("rank") for group in before["shared_layers"])
    left = {"north_pico": copy.deepcopy(trained_entries["north_pico"])}
    manifest = merge(left, tmp_path / "results", datasets, **options)
    check(tmp_path / "results", manifest, left, copies_of(left), datasets)


def test_other_types_are_loaded_with_a_warning_unless_they_compute_the_same(merged, trained_entries):
    path, _, handed_back = merged
    images = torch.rand(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = load_merged(path, copies_of(trained_entries))
        wide = load_merged(path, copies_of(trained_entries), dtype=torch.float32)
    with torch.inference_mode():
        answers = [models["north_pico"].eval()(images) for models in (stored, wide, handed_back)]
    assert torch.equal(answers[0], answers[1])
    torch.testing.assert_close(answers[0], answers[2])  # these are laid out channels-last
    with pytest.warns(UserWarning, match="loaded in float16, and were judged in int8: accuracies may differ"):
        other = load_merged(path, copies_of(trained_entries), dtype=torch.float16)
    shared = next(iter(read_manifest(path)["shared_layers"]))["occurrences"]
    assert len({id(other[o["task"]].get_submodule(o["layer"]).weight) for o in shared}) == 1


def test_plain_files_load_without_the_package(merged, trained_entries):
    path, _, handed_back = merged
    model = copy.deepcopy(trained_entries["south_pico"]["model"]).eval()
    state = torch.load(path / "weights" / "south_pico.pt", weights_only=True)
    assert {t.dtype for t in state.values() if t.dtype != torch.int64} == {torch.float32}
    model.load_state_dict(state)
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), handed_back["south_pico"].eval()(images))


def test_the_edge_moves_and_keeps_8_bits_and_answers_as_what_was_loaded(merged, trained_entries):
    path, manifest, _ = merged
    frames, results = RandomFrames(16, 16, 5), []
    whole = load_merged(path, copies_of(trained_entries))
    with Runtime(path, models=copies_of(trained_entries)) as runtime:
        summary = runtime.run(frames, fps=1e6, count=5, on_result=results.append)
        transforms = runtime.transforms
        tensors = list(distinct_tensors(runtime.weights.models))
        held = sum(t.nbytes for t in (*tensors, *(getattr(t, SCALE) for t in tensors if hasattr(t, SCALE))))
    assert summary["distinct_bytes"] == summary["peak_resident_bytes"] == manifest["memory"]["merged_bytes"] == held
    assert summary["bytes_moved"] == held and results
    for result in results:
        image, kind = transforms[result.task](frames[result.frame]), manifest["tasks"][result.task]["task"]
        with torch.inference_mode():
            expected = whole[result.task]([image] if kind == "object_detection" else image[None])[0]
        pairs = zip(tree_leaves(expected), tree_leaves(result.output), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def scales_of_another_type(manifest: dict) -> None:
    manifest["precision"]["weights"] = "float32"


def scales_as_a_tensor(manifest: dict) -> None:
    scales = next(key for key in manifest["store"]["checksums"] if key.endswith(SCALES))
    manifest["tensors"]["north_pico"]["extra"] = scales


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scales_of_another_type, "scales in a store of float32"),
        (scales_as_a_tensor, "not of the tensors that the tasks use"),
    ],
)
def test_a_manifest_that_contradicts_its_scales_is_refused(merged, tmp_path, change, said):
    path, _, _ = merged
    shutil.copytree(path, tmp_path / "results")
    manifest = read_manifest(path)
    change(manifest)
    (tmp_path / "results" / "merged.json").write_bytes(json_bytes(seal(manifest)))
    (found,) = [check for check in verify(tmp_path / "results") if check.status == FAIL]
    assert said in found.what
