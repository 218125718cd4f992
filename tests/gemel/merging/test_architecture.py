"""What ships is what was judged: an architecture is recorded only for a model that it builds."""

import logging

import pytest
import torch
from pico import CPU, classification_entry, fit
from torch import nn

from dataset_manager import open_task
from gemel.evaluation.eval_method import evaluate
from gemel.merging import architecture
from gemel.merging.architecture import NOT_BUILT, output_difference, recorded_architecture
from gemel.results_store.files import ResultsError
from gemel.results_store.load import load_merged
from gemel.workload import read_workload
from merge_workloads import merge_workload
from model_architectures import build

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DETECTOR = {"backbone": "slim_resnet", "layers": (1, 1, 1, 1), "width": 8, "head_convs": 1, "min_size": 32}


def slim(num_classes=3) -> nn.Module:
    torch.manual_seed(0)
    return build("slim_resnet", num_classes, layers=(1, 1, 1, 1), width=8).eval()


def conv_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def norm_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def forward_of(model: nn.Module) -> None:
    norm = norm_of(model)
    norm.forward = lambda x: x


CHANGES = {
    "stride": lambda model: setattr(conv_of(model), "stride", (1, 1)),
    "eps": lambda model: setattr(norm_of(model), "eps", 0.1),
    "is built as": lambda model: setattr(model, "fc", nn.Sequential(model.fc)),
    "forward": forward_of,
    "hooks": lambda model: norm_of(model).register_forward_hook(lambda module, inputs, output: 2 * output),
}


def test_a_model_as_it_was_built_is_recorded():
    assert recorded_architecture(slim(), IMAGES) == (slim().architecture, None)
    detector = build("fcos_model", 3, **DETECTOR).eval()
    assert recorded_architecture(detector, [*IMAGES]).architecture == detector.architecture


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_model_is_not(what):
    model = slim()
    CHANGES[what](model)
    found = recorded_architecture(model, IMAGES)
    assert found.architecture is None and (what in found.note or found.note == NOT_BUILT)


def test_a_detector_with_another_threshold_is_not(caplog):
    model = build("fcos_model", 3, **DETECTOR).eval()
    model.score_thresh = 0.9
    with caplog.at_level(logging.WARNING):
        note = recorded_architecture(model, [*IMAGES]).note
    assert "score_thresh is 0.9" in note and note in caplog.text
    model = build("fcos_model", 3, **DETECTOR).eval()
    model.transform.min_size = (48,)
    assert "min_size" in recorded_architecture(model, [*IMAGES]).note


def test_a_model_built_elsewhere_has_none():
    assert recorded_architecture(nn.Linear(2, 2), IMAGES) == (None, NOT_BUILT)


def test_outputs_are_compared():
    """A function that no setting shows: what is computed decides."""
    model, other = slim(), slim()
    assert output_difference(model, other, IMAGES) is None
    other.fc.weight.data += 1e-2
    assert "outputs differ" in output_difference(model, other, IMAGES)


@pytest.fixture
def built(datasets):
    """Two trained tasks of `build`; the second one had its classifier's input doubled by a hook after that."""
    entries = {n: classification_entry(slim(k), batch_size=6) for n, k in (("north_slim", 3), ("south_slim", 4))}
    entries["south_slim"]["model"].fc.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    for name, task in read_workload(entries)[0].items():
        data = open_task(task, [datasets], device=CPU, seed=0, batch_size=6)
        fit(task.model, data.train, 40)
        entries[name]["unmerged_acc"] = evaluate(task, data.val)
    return entries


def test_a_result_loads_as_what_was_judged(built, datasets, tmp_path):
    manifest = merge_workload(built, tmp_path / "r", datasets=datasets, device="cpu", tolerance=0.5)
    north, south = (manifest["tasks"][name] for name in ("north_slim", "south_slim"))
    assert north["architecture"] == slim(3).architecture and north["architecture_note"] is None
    assert south["architecture"] is None and "hooks" in south["architecture_note"]
    loaded = load_merged(tmp_path / "r", tasks=["north_slim"])["north_slim"]
    assert output_difference(built["north_slim"]["model"].eval(), loaded, IMAGES) is None
    with pytest.raises(
        ResultsError, match="south_slim, and the manifest holds no architecture .fc .Linear. has another"
    ):
        load_merged(tmp_path / "r")


def test_what_loads_as_something_else_is_recorded_no_more(built, datasets, tmp_path, monkeypatch):
    """The rebuilt model computes the same at first, and not when the result is loaded: the confirmation sees it."""
    honest, made = architecture.load_merged, []

    def changed(path, models, *args, **kwargs):
        loaded = honest(path, models, *args, **kwargs)
        made.append(set(loaded) - set(models))
        if "north_slim" in made[-1]:
            norm_of(loaded["north_slim"]).eps = 10.0
        return loaded

    monkeypatch.setattr(architecture, "load_merged", changed)
    manifest = merge_workload(built, tmp_path / "r", datasets=datasets, device="cpu", tolerance=0.5)
    assert made[:2] == [{"north_slim"}, set()] and not any(made[2:])  # one task at a time
    north = manifest["tasks"]["north_slim"]
    assert north["architecture"] is None and "loaded, its outputs differ" in north["architecture_note"]
