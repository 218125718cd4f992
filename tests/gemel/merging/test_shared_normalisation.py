"""`share_norm`: normalisation of common first layers becomes one, at target, stored, verified, and run once."""

import copy

import pytest
import torch
from pico import PicoDetector, PicoNet, classification_entry
from test_merger import merge

from gemel.console.tables import closing_report
from gemel.edge import Runtime
from gemel.edge.frames import RandomFrames
from gemel.environment.clock import TimeOver
from gemel.merging.joint_training import JointTraining
from gemel.results_store.load import load_merged
from gemel.results_store.verify import FAIL, Evaluation, verify

FRAMES = RandomFrames(16, 16, 5)
KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norms_of(manifest) -> list[dict]:
    return [group for group in manifest["shared_layers"] if group.get("normalisation")]


def copies(entries) -> dict:
    return {name: {**entry, "model": copy.deepcopy(entry["model"])} for name, entry in entries.items()}


def models_of(entries) -> dict:
    return {name: entry["model"] for name, entry in copies(entries).items()}


@pytest.fixture(scope="module")
def shared(trained_entries, datasets, tmp_path_factory):
    """(results, manifest, models as they came)"""
    path = tmp_path_factory.mktemp("shared") / "results"
    manifest = merge(copies(trained_entries), path, datasets, strategy="all", share_norm=True, tolerance=0.8)
    return path, manifest, models_of(trained_entries)


def test_norms_are_one_after_loading_and_every_task_is_at_target(shared):
    path, manifest, models = shared
    groups, run = norms_of(manifest), manifest["run"]["shared_normalisation"]
    assert groups and run["layers"] == len(groups) and run["trials"] >= 1 and run["groups"]
    assert manifest["normalisation"] == "shared" and all(task["met"] for task in manifest["tasks"].values())
    assert run["saved_bytes"] == sum(g["bytes"] * (len(g["occurrences"]) - 1) for g in groups)
    loaded = load_merged(path, copy.deepcopy(models))
    for group in groups:
        layers = [loaded[o["task"]].get_submodule(o["layer"]) for o in group["occurrences"]]
        for key in KEYS:
            assert len({id(getattr(layer, key)) for layer in layers}) == 1
    accuracy = {name: record["merged_acc"] for name, record in manifest["tasks"].items()}
    evaluations = {n: Evaluation(m, lambda *_, n=n: accuracy[n]) for n, m in copy.deepcopy(models).items()}
    checks = list(verify(path, evaluations))
    assert "normalisation layers are shared" in (path / "report.html").read_text()
    assert "needs to run once a frame" in closing_report(manifest, False)
    assert len(checks) > 10 and not [check for check in checks if check.status == FAIL]


def test_a_shared_buffer_that_no_group_names_fails_the_check(shared, monkeypatch):
    path, _, models = shared
    monkeypatch.setattr("gemel.results_store.verify.own_tensors", lambda layer: dict(layer.named_parameters()))
    found = list(verify(path, {n: Evaluation(m, lambda *_: 1.0) for n, m in copy.deepcopy(models).items()}))
    assert any(check.status == FAIL and "running_mean" in check.what for check in found)


def test_first_layers_run_once_with_the_answers_of_whole_models(shared):
    """A camera of 40 frames, which all three tasks see with one transform."""
    path, manifest, models = shared
    whole = load_merged(path, copy.deepcopy(models))
    transforms = dict.fromkeys(whole, lambda image: image.float() / 255)
    answers = []
    with Runtime(path, models=copy.deepcopy(models), transforms=transforms) as runtime:
        summary = runtime.run(FRAMES, fps=1e6, count=40, on_result=answers.append)
    found = summary["shared_computation"]
    assert [set(group["tasks"]) for group in found["groups"]] == [
        set(group) for group in manifest["run"]["shared_normalisation"]["groups"]
    ]
    assert sum(found["frames"].values()) == 40 * (len(found["groups"][0]["tasks"]) - 1)
    assert len(answers) == 120 and found["peak_bytes"] > 0
    for answer in answers:
        image = transforms[answer.task](FRAMES[answer.frame % 5])
        with torch.inference_mode():
            model = whole[answer.task]
            expected = model([image] if isinstance(model, PicoDetector) else image[None])[0]
        if isinstance(expected, dict):
            assert all(torch.equal(value, answer.output[key]) for key, value in expected.items())
        else:
            assert torch.equal(expected, answer.output)


def test_a_finished_run_keeps_its_norms(shared, trained_entries, datasets):
    """Also where it is evaluated and stored once more."""
    path, manifest, _ = shared
    again = merge(
        copies(trained_entries), path, datasets, strategy="all", share_norm=True, tolerance=0.8, per_class=True
    )
    assert again["shared_layers"] == manifest["shared_layers"] and again["tensors"] == manifest["tensors"]
    assert again["run"]["shared_normalisation"] == manifest["run"]["shared_normalisation"]


@pytest.mark.exhaustive
def test_out_of_time_nothing_is_shared_and_the_same_command_goes_on(trained_entries, datasets, tmp_path, monkeypatch):
    options = {"strategy": "all", "share_norm": True, "tolerance": 0.8}
    original = JointTraining.train

    def late(self, *given):
        original(self, *given)
        raise TimeOver

    monkeypatch.setattr(JointTraining, "train", late)
    first = merge(copies(trained_entries), tmp_path / "results", datasets, **options)
    assert not first["run"]["finished"] and not norms_of(first) and first["normalisation"] == "private"
    assert first["memory"]["saved_bytes"] > 0 and all(task["met"] for task in first["tasks"].values())
    monkeypatch.setattr(JointTraining, "train", original)
    second = merge(copies(trained_entries), tmp_path / "results", datasets, **options)
    assert second["run"]["finished"] and norms_of(second)


@pytest.mark.exhaustive
def test_a_task_that_comes_later_finds_private_norms(trained_entries, datasets, tmp_path):
    options = {"strategy": "all", "share_norm": True, "tolerance": 0.8}
    few = {name: entry for name, entry in trained_entries.items() if name != "south_pico"}
    assert norms_of(merge(copies(few), tmp_path / "results", datasets, **options))
    manifest = merge(copies(trained_entries), tmp_path / "results", datasets, **options)
    assert manifest["run"]["finished"] and all(task["met"] for task in manifest["tasks"].values())
    assert not [check for check in verify(tmp_path / "results", {}) if check.status == FAIL]


def test_transforms_that_differ_share_nothing(trained_entries, datasets, tmp_path):
    entries = copies(trained_entries)
    del entries["east_pico"]
    own = entries["south_pico"]["transforms"]["val"]
    entries["south_pico"]["transforms"] = dict.fromkeys(("train", "val"), lambda image: own(image) * 0.5)
    model = PicoNet(4, extra=1)
    model.load_state_dict(entries["south_pico"]["model"].state_dict())
    model.conv1.weight.data *= 2
    entries["south_pico"] = classification_entry(model, 1.0, batch_size=6) | {
        "transforms": entries["south_pico"]["transforms"]
    }
    manifest = merge(entries, tmp_path / "results", datasets, strategy="stem", share_norm=True, max_epochs=0.5)
    assert manifest["run"]["shared_normalisation"] == {
        **dict.fromkeys(("trials", "steps", "tied_layers", "layers", "saved_bytes"), 0),
        "groups": [],
        "accuracy_of_target": {},
    }
