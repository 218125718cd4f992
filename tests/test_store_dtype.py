"""Merges whose store has weights of 16 bits: what ships is judged with them, and loads as it was judged."""

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
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import json_bytes, read_manifest, seal
from gemel.results_store.verify import FAIL, Evaluation, verify
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.precision import round_weights, weights_of
from gemel.sharing.signatures import is_normalisation
from gemel.workload import WorkloadError, read_workload
from merge_workloads import merge_workload

LIMIT = 1e6  # more than float16 can hold


def merge(entries, results, datasets, **options) -> dict:
    given = {**QUICK, "store_dtype": "float16", "strategy": "all", **options}
    return merge_workload(entries, results, datasets=datasets, **given)


def other_bytes(models) -> int:
    """Bytes of all that is not stored in 16 bits: normalisation and buffers."""
    modules = [module for model in models.values() for module in model.modules() if is_normalisation(module)]
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


@pytest.fixture(scope="module")
def merged(trained_entries, datasets, tmp_path_factory):
    """(results folder, its manifest, the models as they were handed back)."""
    path, entries = tmp_path_factory.mktemp("merged") / "results", copy.deepcopy(trained_entries)
    manifest = merge(entries, path, datasets)
    return path, manifest, {name: entry["model"] for name, entry in entries.items()}


@pytest.mark.parametrize(
    ("strategy", "store_dtype"),
    [
        ("adaptive", "float16"),
        pytest.param("stem", "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("gemel", "float16", marks=pytest.mark.exhaustive),
        pytest.param("all", "bfloat16", marks=pytest.mark.exhaustive),
    ],
)
def test_what_ships_is_judged_as_it_loads(entries, trained_entries, datasets, tmp_path, strategy, store_dtype):
    manifest = merge(entries, tmp_path / "results", datasets, strategy=strategy, store_dtype=store_dtype)
    assert manifest["memory"]["saved_bytes"] > 0
    assert manifest["precision"] == {"weights": store_dtype, "arithmetic": "float32", "device": "cpu"}
    loaded = load_merged(tmp_path / "results", copies_of(trained_entries))
    for name, task in read_workload(entries)[0].items():
        data = open_task(task, [datasets], device=torch.device("cpu"), seed=0, batch_size=8)
        record = manifest["tasks"][name]
        assert evaluate(task, data.val, loaded[name]) == record["merged_acc"] >= record["target_acc"]
        assert {p.dtype for p in weights_of(loaded[name])} == {getattr(torch, store_dtype)}
    assert manifest["memory"]["merged_bytes"] == distinct_bytes(loaded)
    assert not [check for check in verify(tmp_path / "results") if check.status == FAIL]


def test_bytes_are_halved_but_for_normalisation(merged, trained_entries):
    path, manifest, handed_back = merged
    others = other_bytes(handed_back)
    memory, models = manifest["memory"], copies_of(trained_entries)
    assert 2 * (memory["merged_bytes"] - others) == distinct_bytes(handed_back) - others
    assert 2 * (memory["unmerged_bytes"] - others) == distinct_bytes(models) - others
    rows = manifest["run"]["rounds"]
    assert (
        rows[-1]["saved_bytes"]
        == memory["saved_bytes"]
        == sum(group["bytes"] * (len(group["occurrences"]) - 1) for group in manifest["shared_layers"])
    )
    assert manifest["run"]["history"][-1]["saved_bytes"] == memory["saved_bytes"]


def test_a_round_that_misses_only_as_stored_is_undone(entries, trained_entries, datasets, tmp_path):
    """The eval method says 0 for a model with 16-bit weights that are not the rounded ones it came with."""
    came = copies_of(trained_entries)
    for name, entry in entries.items():
        honest = entry["eval_method"]
        known = [p.to(torch.float16) for p in weights_of(came[name])]

        def judged(model, loader, honest=honest, known=known):
            own = list(weights_of(model))
            stored = own[0].dtype == torch.float16
            same = stored and len(own) == len(known) and all(map(torch.equal, own, known))
            return 0.0 if stored and not same else honest(model, loader)

        entry["eval_method"] = judged
    manifest = merge(entries, tmp_path / "results", datasets)
    assert manifest["memory"]["saved_bytes"] == 0 and not manifest["shared_layers"]
    assert all(task["met"] for task in manifest["tasks"].values())
    reasons = {row["reason"] for row in manifest["run"]["rounds"]}
    assert "below target in the type of the store" in reasons
    for name, model in load_merged(tmp_path / "results", came).items():
        assert all(
            torch.equal(p.float(), q.half().float())
            for p, q in zip(weights_of(model), weights_of(trained_entries[name]["model"]), strict=True)
        )


def test_a_model_that_misses_its_target_in_the_type_of_the_store_is_named(entries, datasets, tmp_path):
    """Weights beyond the range of float16, which the normalisation behind them takes back: fine in bfloat16."""
    model = entries["north_pico"]["model"]
    convolution, norm = next(
        (m, n) for m, n in zip(model.children(), list(model.children())[1:], strict=False) if is_normalisation(n)
    )
    with torch.no_grad():
        convolution.weight *= LIMIT
        norm.running_mean *= LIMIT
        norm.running_var *= LIMIT**2
    with pytest.raises(WorkloadError, match=r"north_pico: store_dtype: got float16.*allowed: float32 or bfloat16"):
        merge(entries, tmp_path / "results", datasets)
    assert not (tmp_path / "results").exists()
    manifest = merge(two_of(entries), tmp_path / "results", datasets, store_dtype="bfloat16")
    assert manifest["tasks"]["north_pico"]["met"]


def test_models_in_another_type_and_unknown_types_are_refused_together(entries, datasets, tmp_path):
    entries["north_pico"]["model"].double()
    with pytest.raises(WorkloadError, match=r"north_pico: store_dtype: got float16, for .* in torch.float64"):
        merge(entries, tmp_path / "results", datasets)
    with pytest.raises(WorkloadError, match=r"store_dtype: got 'int4'; allowed: float32, float16, bfloat16"):
        merge(entries, tmp_path / "results", datasets, store_dtype="int4")
    assert not (tmp_path / "results").exists()


def test_an_interrupted_run_ends_where_the_uninterrupted_one_ends(trained_entries, datasets, tmp_path):
    entries, options = two_of(trained_entries), {"strategy": "gemel", "tolerance": 0.4}
    whole = merge(entries, tmp_path / "whole", datasets, **options)
    assert len(whole["run"]["rounds"]) > 1
    with interrupted_in_the_second_round():
        merge(two_of(trained_entries), tmp_path / "halted", datasets, **options)
    with pytest.raises(WorkloadError, match=r"store_dtype: was 'float16', is None"):
        merge(two_of(trained_entries), tmp_path / "halted", datasets, **options, store_dtype="float32")
    resumed = two_of(trained_entries)
    again = merge(resumed, tmp_path / "halted", datasets, **options)
    assert again["tensors"] == whole["tensors"] and again["memory"] == whole["memory"]
    for name, entry in entries.items():
        own, other = entry["model"].state_dict(), resumed[name]["model"].state_dict()
        assert all(torch.equal(own[key], other[key]) for key in own)


def test_other_types_are_loaded_with_a_warning_unless_they_compute_the_same(merged, trained_entries):
    path, _, handed_back = merged
    images = torch.rand(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = load_merged(path, copies_of(trained_entries))
        wide = load_merged(path, copies_of(trained_entries), dtype=torch.float32)
    assert {p.dtype for p in wide["north_pico"].parameters()} == {torch.float32}
    with torch.inference_mode():
        answers = [models["north_pico"].eval()(images) for models in (stored, wide, handed_back)]
    assert torch.equal(answers[0], answers[1])
    torch.testing.assert_close(answers[0], answers[2])  # these are laid out channels-last
    with pytest.warns(UserWarning, match="loaded in bfloat16, and were judged in float16: accuracies may differ"):
        other = load_merged(path, copies_of(trained_entries), dtype=torch.bfloat16)
    assert {p.dtype for p in weights_of(other["north_pico"])} == {torch.bfloat16}
    shared = next(iter(read_manifest(path)["shared_layers"]))["occurrences"]
    assert len({id(other[o["task"]].get_submodule(o["layer"]).weight) for o in shared}) == 1


def test_plain_files_load_without_the_package(merged, trained_entries):
    path, _, handed_back = merged
    model = copy.deepcopy(trained_entries["south_pico"]["model"]).eval()
    state = torch.load(path / "weights" / "south_pico.pt", weights_only=True)
    assert {t.dtype for t in state.values() if t.dtype != torch.int64} == {torch.float16, torch.float32}
    model.load_state_dict(state)
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), handed_back["south_pico"].eval()(images))


def test_the_edge_runs_what_was_loaded(merged, trained_entries):
    path, manifest, _ = merged
    frames, results = RandomFrames(16, 16, 5), []
    whole = load_merged(path, copies_of(trained_entries))
    with Runtime(path, models=copies_of(trained_entries)) as runtime:
        summary = runtime.run(frames, fps=1e6, count=5, on_result=results.append)
        transforms = runtime.transforms
    assert summary["distinct_bytes"] == manifest["memory"]["merged_bytes"] and results
    for result in results:
        image, kind = transforms[result.task](frames[result.frame]), manifest["tasks"][result.task]["task"]
        with torch.inference_mode():
            expected = whole[result.task]([image] if kind == "object_detection" else image[None])[0]
        pairs = zip(tree_leaves(expected), tree_leaves(result.output), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_task_whose_partner_is_gone_is_judged_again(trained_entries, datasets, tmp_path):
    """Its scales, biases and adapters go into its weights, which are then rounded anew."""
    options = {"strategy": "adaptive", "tolerance": 0.3}
    before = merge(two_of(trained_entries), tmp_path / "results", datasets, **options)
    assert any(group.get("affine_bytes") or group.get("rank") for group in before["shared_layers"])
    left = {"north_pico": copy.deepcopy(trained_entries["north_pico"])}
    manifest = merge(left, tmp_path / "results", datasets, **options)
    (model,) = load_merged(tmp_path / "results", copies_of(left)).values()
    task = read_workload(left)[0]["north_pico"]
    data = open_task(task, [datasets], device=torch.device("cpu"), seed=0, batch_size=8)
    record = manifest["tasks"]["north_pico"]
    assert evaluate(task, data.val, model) == record["merged_acc"] >= record["target_acc"]


def test_rounding_leaves_normalisation_and_buffers(trained_entries):
    model = copy.deepcopy(trained_entries["north_pico"]["model"])
    before = copy.deepcopy(model.state_dict())
    round_weights([model], torch.bfloat16)
    names = {name for name, module in model.named_modules() if is_normalisation(module)}
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] in names:
            assert torch.equal(value, before[key])
        else:
            assert torch.equal(value, before[key].bfloat16().float())


def test_verify_finds_weights_of_another_type_than_the_manifest_names(merged, trained_entries, tmp_path, monkeypatch):
    path, manifest, _ = merged
    evaluations = {name: Evaluation(model, lambda *_: 0.0) for name, model in copies_of(trained_entries).items()}
    said = [check for check in verify(path, evaluations) if "weights in" in check.what]
    assert [check.status for check in said] == ["ok"] and "judged in float32 on cpu" in said[0].what
    copied = tmp_path / "results"
    shutil.copytree(path, copied)
    changed = seal({**manifest, "precision": {**manifest["precision"], "weights": "bfloat16"}})
    (copied / "merged.json").write_bytes(json_bytes(changed))
    (found,) = [check for check in verify(copied, evaluations) if "weights in" in check.what]
    assert found.status == FAIL and "weights in bfloat16" in found.what and "loaded in torch.float16" in found.what
    monkeypatch.setattr("gemel.forward.arithmetic.computes_in_16_bits", lambda device_type: True)
    with pytest.warns(UserWarning, match="computed in float16, and were judged in float32"):
        skipped = [check for check in verify(path, evaluations) if "not run as judged" in check.what]
    assert [check.status for check in skipped] == ["skip"]
