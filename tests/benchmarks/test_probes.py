import copy
import sys

import pytest
import torch
from torch import nn

from benchmarks import detectors, frozen_prefix, harm, initial_weights, reading
from benchmarks.probes import Probe, load_split, ranks, spearman, take
from gemel.datasets.folders import find_dataset, open_split
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import is_tied

CPU = torch.device("cpu")


@pytest.fixture
def probe(tasks, datasets):
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    splits = {(s, n): load_split(t, [datasets], s, 0) for s in ("train", "val") for n, t in tasks.items()}
    images = {n: [images for images, _ in take(t, splits["train", n], 6)] for n, t in tasks.items()}
    val = {n: take(t, splits["val", n], None) for n, t in tasks.items()}
    return Probe(tasks, models, {n: copy.deepcopy(m) for n, m in models.items()}, images, val, CPU)


def test_rank_correlation():
    assert ranks([3.0, 1.0, 3.0, 9.0]).tolist() == [1.5, 0, 1.5, 3]
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 1001]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)  # scipy.stats.spearmanr


def test_samples_are_taken_in_a_random_order_by_the_seed_and_of_the_size_asked_for(probe, tasks, datasets):
    assert {n: sum(map(len, batches)) for n, batches in probe.images.items()} == dict.fromkeys(probe.models, 6)
    again = take(tasks["north_pico"], load_split(tasks["north_pico"], [datasets], "train", 0), 6)[0][0]
    other = take(tasks["north_pico"], load_split(tasks["north_pico"], [datasets], "train", 1), 6)[0][0]
    assert torch.equal(again, probe.images["north_pico"][0]) and not torch.equal(again, other)


@pytest.mark.parametrize("name", initial_weights.METHODS)
def test_every_way_ties_everything_with_finite_weights(probe, name):
    groups = find_groups(probe.models)
    initial_weights.METHODS[name](probe, groups, 6)
    assert all(is_tied(probe.models, group) for group in groups)
    assert all(torch.isfinite(value).all() for value in probe.models.state_dict().values())


def test_harm_is_measured_without_changing_the_models(probe):
    states = copy.deepcopy(probe.models.state_dict())
    classifiers = Probe(
        probe.tasks,
        nn.ModuleDict({n: probe.models[n] for n in ("north_pico", "south_pico")}),
        probe.teachers,
        probe.images,
        probe.val,
        CPU,
    )
    groups = harm.sample_groups(find_groups(classifiers.models), 2, 0)
    seen = harm.measured_sensitivity(classifiers, groups, 6)
    pairs = {(group, task) for group in groups for task in group.tasks}
    assert (
        all(set(sensitivity_of) == pairs for sensitivity_of in seen.values())
        and len(set(seen["cross-entropy"].values())) == 4
    )
    found = harm.predictions(classifiers, groups, 6, 0)
    assert all(set(scores) == pairs for scores, _ in found.values())
    assert all(torch.equal(states[key], value) for key, value in probe.models.state_dict().items())


def test_a_detector_is_built_tied_fitted_and_trained():
    cells, good = detectors.row_of("fcos_model")
    assert good and len(cells) == len(detectors.HEADER), cells
    assert "99." in cells[4] and "100 % of bytes fitted" in cells[5]


def test_what_a_detector_cannot_do_is_said(monkeypatch, capsys):
    monkeypatch.setattr(detectors, "frcnn_eval", lambda model, loader: 1.5)
    monkeypatch.setattr(detectors, "LEARNING_RATE", 0.0)
    assert detectors.main(["fcos_model"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: AssertionError: 1.5" in printed and "the losses rose" in printed


def test_a_detector_that_cannot_be_built_is_a_row_too(monkeypatch, capsys):
    def build(name, num_classes, **arguments):
        raise ValueError("no such part")

    monkeypatch.setattr(detectors, "build", build)
    assert detectors.main(["fcos_model", "yolov3"]) == 1
    assert capsys.readouterr().out.count("FAILED: ValueError: no such part") == 4, "when it is done, and in the table"


def test_a_detector_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        detectors.main(["resnet50"])
    assert "got resnet50; allowed: " in capsys.readouterr().err


def test_reading_is_measured_for_classifiers_and_detectors(tasks, datasets):
    for task in tasks.values():
        cells = reading.row_of(task, [datasets], 4)
        assert len(cells) == len(reading.HEADER) and cells[0] == task.name
        image = open_split(task, find_dataset(task, [datasets]), "val")[0][0]
        assert cells[2] == f"{image.shape[2]} x {image.shape[1]}"
        decode, transform, memory, forward = (float(cell.removesuffix(" ms")) for cell in cells[3:7])
        assert decode > 0 and forward > 0 and transform >= 0 and memory >= 0


def test_a_broken_workload_is_listed_instead_of_measured(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def create_model_dict():\n    return {'a b': {}}\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "mine", None)  # what is loaded is forgotten again
    assert reading.main(["--workload", str(tmp_path / "mine.py"), "--datasets", str(tmp_path)]) == 2
    assert "a b" in capsys.readouterr().err


def test_a_frozen_prefix_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(frozen_prefix, "REPEATS", 3)
    given = ["squeezenet1_0:features.12.squeeze", "resnet18:conv1", "--size", "64"]
    assert frozen_prefix.main(given) == 0
    squeezenet, resnet = (line.split() for line in capsys.readouterr().out.splitlines()[2:])
    assert squeezenet[2] == "features.11" and resnet[2] == "-", "the first layer is tied"
    whole, frozen, kept = (float(squeezenet[i]) for i in (7, 9, 11))
    assert kept < whole and frozen < whole
    for wrong in (["resnet18"], ["resnet17:fc"], ["resnet18:fc2"]):
        with pytest.raises(SystemExit):
            frozen_prefix.main(wrong)
        assert "allowed: " in capsys.readouterr().err
