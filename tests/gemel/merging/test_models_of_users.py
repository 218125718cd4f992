"""Models as people have them: other layouts, precisions and kinds of layers merge, reload and are handed back right."""

import copy
import threading
import types

import pytest
import torch
from pico import (
    CPU,
    PicoDetector,
    PicoNet,
    classification_entry,
    detection_entry,
    fit,
    same_state,
    thresholds,
    write_detection,
)
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from dataset_manager import open_task
from gemel.datasets.loaders import num_samples
from gemel.evaluation.eval_method import evaluate
from gemel.fitting.ridge import shares_of
from gemel.merging import layout
from gemel.merging.check import telling_samples, training_problems
from gemel.merging.layout import can_be_channels_last
from gemel.options import MergeOptions
from gemel.results_store.load import load_merged
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie
from gemel.training import precision
from gemel.training.options import TrainingOptions
from gemel.trials.initialisation import donate_weights
from gemel.trials.state import MergeState
from gemel.workload import WorkloadError, read_workload
from merge_workloads import merge_workload


class Flattened(nn.Module):
    """Looks at strides: `view` behind a convolution."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 14 * 14, num_classes)

    def forward(self, images):
        features = F.relu(self.conv(images))
        return self.fc(features.view(len(images), -1))


class Volume(nn.Module):
    """A convolution in three dimensions."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv3d(3, 8, (1, 3, 3)), nn.Linear(8, num_classes)

    def forward(self, images):
        return self.fc(F.relu(self.conv(images[:, :, None])).mean((2, 3, 4)))


class Token(nn.Module):
    """A parameter in the module that has all layers as children."""

    def __init__(self, num_classes, norm=lambda layer: layer):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.conv, self.fc = norm(nn.Conv2d(3, 8, 3)), nn.Linear(8, num_classes)

    def forward(self, images):
        return self.fc(F.relu(self.conv(images * self.scale)).mean((2, 3)))


class Half(PicoNet):
    """In half precision inside."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.bfloat16()

    def forward(self, images):
        return super().forward(images.bfloat16()).float()


def vit(num_classes):
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return VisionTransformer(**sizes, num_classes=num_classes)


KINDS = {
    "view": Flattened,
    "Conv3d": Volume,
    "vision transformer": vit,
    "weight_norm": lambda k: Token(k, nn.utils.parametrizations.weight_norm),
    "weight_norm by a hook": lambda k: Token(k, nn.utils.weight_norm),
    "bfloat16": Half,
    "frozen": lambda k: PicoNet(k).requires_grad_(False),
}


def entries_of(make, datasets, steps=40) -> dict:
    torch.manual_seed(0)
    entries = {name: classification_entry(make(k), batch_size=6) for name, k in (("north_x", 3), ("south_x", 4))}
    for name, task in read_workload(entries)[0].items():
        data = open_task(task, [datasets], device=CPU, seed=0, batch_size=6)
        if any(p.requires_grad and p.dtype == torch.float32 for p in task.model.parameters()):
            fit(task.model, data.train, steps)
        entries[name]["unmerged_acc"] = max(0.05, evaluate(task, data.val))
    return entries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_of_many_kinds_merge(kind, datasets, tmp_path):
    make = KINDS[kind]
    entries = entries_of(make, datasets)
    manifest = merge_workload(
        entries, tmp_path / "r", datasets=datasets, device="cpu", tolerance=0.5, max_epochs=1.0, screening_images=0
    )
    assert manifest["run"]["finished"] and all(task["met"] for task in manifest["tasks"].values())
    loaded = load_merged(tmp_path / "r", {"north_x": make(3), "south_x": make(4)})
    images = torch.rand(2, 3, 16, 16)
    for name, entry in entries.items():
        assert torch.allclose(loaded[name](images), entry["model"].eval()(images), atol=1e-4), name
        assert manifest["tasks"][name]["architecture_note"].startswith("it was not built")
    if kind == "frozen":
        assert not any(p.requires_grad for entry in entries.values() for p in entry["model"].parameters())


@pytest.mark.parametrize("make, works", [(Flattened, False), (PicoNet, True), (Volume, True)])
def test_channels_last_is_tried_first(make, works, datasets):
    """And the layout of the models, tried or refused, is then the one that they came with."""
    entries = entries_of(make, datasets, steps=1)
    tasks, _ = read_workload(entries)
    data = {name: open_task(t, [datasets], device=CPU, seed=0, batch_size=6) for name, t in tasks.items()}
    assert can_be_channels_last(tasks, data, seed=0) is works
    assert all(p.is_contiguous() for task in tasks.values() for p in task.model.parameters())


class TrainedByStrides(PicoNet):
    """A model that looks at strides when it is trained, or one that cannot be trained in any layout."""

    def __init__(self, num_classes, ever=True):
        super().__init__(num_classes)
        self.ever = ever

    def forward(self, images):
        if self.training:
            assert self.ever, "never trained"
            self.conv1(images).view(-1)
        return super().forward(images)


@pytest.mark.parametrize("ever", [True, False])
def test_models_that_cannot_be_trained_channels_last_get_the_usual_layout(ever, datasets):
    tasks, _ = read_workload(entries_of(lambda k: TrainedByStrides(k, ever), datasets, steps=0))
    data = {name: open_task(t, [datasets], device=CPU, seed=0, batch_size=6) for name, t in tasks.items()}
    state = MergeState(tasks, CPU)
    state.use_layout(can_be_channels_last(tasks, data, seed=0))
    assert state.channels_last
    problems = training_problems(tasks, data, state, MergeOptions())
    assert not state.channels_last and bool(problems) is not ever
    assert all("never trained" in problem.got for problem in problems)


@pytest.mark.parametrize("seconds, expected", [((2.0, 1.0), True), ((1.0, 1.0), False), ((0.0, 0.0), False)])
def test_on_another_device_the_quicker_layout_is_taken_and_recorded(seconds, expected, datasets, monkeypatch):
    entries = entries_of(PicoNet, datasets, steps=1)
    tasks, _ = read_workload(entries)
    data = {name: open_task(t, [datasets], device=CPU, seed=0, batch_size=6) for name, t in tasks.items()}
    state, steps = MergeState(tasks, CPU), []

    def taken(step, autocast):
        is_last = step.task.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
        steps.append((step.task.name, is_last, autocast.dtype))
        return seconds[is_last]

    monkeypatch.setattr(layout.Step, "seconds", taken)
    assert layout.is_quicker(tasks, data, state, 0, "auto") is expected
    assert steps == [(n, last, torch.bfloat16) for n in tasks for last in (False,) * 3 + (True,) * 3]
    assert all(p.is_contiguous() for task in tasks.values() for p in task.model.parameters())
    state.use_layout(True)
    weights = [state.models["north_x"].conv2.weight, state.unmerged["south_x"].conv2.weight]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    state.use_layout(False)
    assert all(weight.is_contiguous() for weight in weights)


def by_features(model, loader):
    """An eval method that looks at strides of what a layer of the model puts out."""
    model.eval()
    with torch.no_grad():
        found = [(model.fc(model.conv1(x).view(len(x), -1).reshape(len(x), 8, -1).mean(2)), y) for x, y in loader]
    return sum(int((out.argmax(1) == y).sum()) for out, y in found) / sum(len(y) for _, y in found)


def in_double(model, loader):
    """An eval method that changes the model."""
    model.double()
    return 0.5


def fails(model, loader):
    raise KeyError("no such metric")


@pytest.mark.parametrize("method, works", [(by_features, False), (in_double, True), (fails, True)])
def test_channels_last_is_tried_with_the_eval_method(method, works, datasets):
    """What fails in both layouts is reported later, of the right cause; the tried model stays as it is."""
    entries = entries_of(PicoNet, datasets, steps=1)
    entries["south_x"]["eval_method"] = method
    tasks, _ = read_workload(entries)
    data = {name: open_task(t, [datasets], device=CPU, seed=0, batch_size=6) for name, t in tasks.items()}
    before = {name: copy.deepcopy(task.model.state_dict()) for name, task in tasks.items()}
    assert can_be_channels_last(tasks, data, seed=0) is works
    assert all(same_state(task.model.state_dict(), before[name]) for name, task in tasks.items())
    assert all(p.is_contiguous() and p.dtype == torch.float32 for t in tasks.values() for p in t.model.parameters())


def test_an_eval_method_that_looks_at_strides_is_not_blamed(datasets, tmp_path):
    entries = entries_of(PicoNet, datasets, steps=1)
    for entry in entries.values():
        entry |= {"eval_method": by_features, "unmerged_acc": 0.01}
    manifest = merge_workload(entries, tmp_path / "r", datasets=datasets, device="cpu", strategy="stem", max_epochs=1.0)
    assert manifest["run"]["finished"]


@pytest.mark.parametrize("call", [1, 2])  # to try the memory layout; to measure the unmerged models
def test_models_are_handed_back_when_a_merge_is_interrupted_before_it_begins(call, datasets, tmp_path):
    entries, calls = entries_of(PicoNet, datasets, steps=1), []

    def interrupted(model, loader):
        calls.append(num_samples(loader))
        if len(calls) == call:
            raise KeyboardInterrupt
        return 0.5

    north = entries["north_x"] | {
        "eval_method": interrupted,
        "model": entries["north_x"]["model"].requires_grad_(False),
    }
    with pytest.raises(KeyboardInterrupt):
        merge_workload({**entries, "north_x": north}, tmp_path / "r", datasets=datasets, device="cpu", tolerance=0.5)
    assert calls == [2, 24][:call] and not any(p.requires_grad for p in north["model"].parameters())


def test_models_that_cannot_be_copied_are_listed_before_anything_is_written(datasets, tmp_path):
    entries = entries_of(PicoNet, datasets, steps=1)
    entries["north_x"]["model"].lock = threading.Lock()
    with pytest.raises(WorkloadError, match="north_x: model: got a model that cannot be copied: TypeError"):
        merge_workload(entries, tmp_path / "r", datasets=datasets, device="cpu", tolerance=0.5)
    assert not (tmp_path / "r").exists()
    entries["north_x"]["model"] = torch.jit.script(PicoNet(3))
    _, problems = read_workload(entries)
    assert "TorchScript" in problems[0].got and problems[0].task == "north_x"


def test_a_training_pass_that_does_not_fit_the_memory_is_no_problem_of_the_model(tasks, data, monkeypatch, caplog):
    """Training comes down to single images; the check goes down to two, as batch normalisation needs them."""
    sizes = []

    def crowded(task, batch, *more):
        sizes.append(len(batch[0]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("gemel.merging.check.task_losses", crowded)
    monkeypatch.setattr("gemel.merging.check.FEWEST", 6)
    only = {"north_pico": tasks["north_pico"]}
    assert training_problems(only, data, MergeState(only, CPU), MergeOptions()) == [] and sizes == [6, 3]
    assert "north_pico: out of memory in a training pass" in caplog.text


class Raises(PicoNet):
    """A model whose backward pass, or whose loss for the last class, fails."""

    def __init__(self, num_classes, at):
        super().__init__(num_classes)
        self.at = at

    def forward(self, images):
        out = super().forward(images)
        if self.at == "gradient":
            out.register_hook(self.fail)
        if self.at == "no gradient":
            return out.detach()
        return out[:, :-1] if self.training and self.at == "last class" else out

    def fail(self, gradient):
        raise RuntimeError("no gradient here")


@pytest.mark.parametrize(
    "at, message",
    [
        ("gradient", "no gradient here"),
        ("no gradient", "no parameter that is trained"),
        ("last class", "out of bounds. (the highest label in train is 2)"),
    ],
)
def test_the_dry_run_is_a_step_of_training(at, message, datasets):
    """Of the 24 images of train the first batch holds one class alone; the last class is tried as well."""
    entries = {"north_x": classification_entry(Raises(3, at), batch_size=6)}
    tasks, _ = read_workload(entries)
    data = {name: open_task(t, [datasets], device=CPU, seed=0, batch_size=6) for name, t in tasks.items()}
    state = MergeState(tasks, CPU)
    before = {key: value.clone() for key, value in tasks["north_x"].model.state_dict().items()}
    (problem,) = training_problems(tasks, data, state, MergeOptions())
    assert problem.task == "north_x" and message in problem.got
    assert all(torch.equal(value, before[key]) for key, value in tasks["north_x"].model.state_dict().items())


class NumPy(PicoNet):
    """A model that reads its features as an array, which there is none of in bfloat16."""

    def forward(self, images):
        features = torch.relu(self.bn1(self.conv1(images)))
        assert torch.relu(self.conv2(features)).detach().numpy().size
        return super().forward(images)


def test_a_model_that_cannot_run_in_bfloat16_is_a_problem_of_the_option(datasets):
    tasks, _ = read_workload({"north_x": classification_entry(NumPy(3), batch_size=6)})
    data = {"north_x": open_task(tasks["north_x"], [datasets], device=CPU, seed=0, batch_size=6)}
    state = MergeState(tasks, CPU)
    for other in ("float32", "auto"):
        options = MergeOptions(training=TrainingOptions(precision=other))
        assert training_problems(tasks, data, state, options) == []
    options = MergeOptions(training=TrainingOptions(precision="bfloat16"))
    (problem,) = training_problems(tasks, data, state, options)
    assert (problem.task, problem.key) == ("north_x", "precision")
    assert "bfloat16, in which training fails: TypeError" in problem.got and "float32 or auto" in problem.allowed


def test_a_model_that_cannot_run_in_bfloat16_is_trained_in_float32_by_auto(datasets, monkeypatch, caplog):
    monkeypatch.setattr(precision, "THRESHOLDS", thresholds(least_seconds=0.0))
    tasks, _ = read_workload({"north_x": classification_entry(NumPy(3), batch_size=6)})
    data = open_task(tasks["north_x"], [datasets], device=CPU, seed=0, batch_size=6)
    batch = precision.first_batch(data.train)
    assert precision.measured(tasks["north_x"], batch, CPU, None, 0) == {"precision": "float32"}
    assert "north_x: no training step in bfloat16, which fails: " in caplog.text


def test_a_label_beyond_the_outputs_of_a_detector_is_named(tmp_path):
    write_detection(tmp_path, "two_OD")
    entry = detection_entry(PicoDetector(num_classes=2), dataset="two_OD")
    del entry["model"].num_classes  # outputs that cannot be seen
    tasks, _ = read_workload({"x_pico": entry})
    data = {"x_pico": open_task(tasks["x_pico"], [tmp_path], device=CPU, seed=0, batch_size=6)}
    (problem,) = training_problems(tasks, data, MergeState(tasks, CPU), MergeOptions())
    assert "IndexError" in problem.got and "the highest label in train is 2; state num_classes" in problem.got


def test_the_samples_that_are_tried_cover_sizes_and_classes(tasks, data):
    train = data["north_pico"].train
    chosen = telling_samples(tasks["north_pico"], train)
    assert {train.dataset.samples[i][1] for i in chosen} >= {0, 2} and num_samples(train) - 1 in chosen
    assert len(chosen) < 12


def test_a_screening_subset_on_which_the_unmerged_model_is_always_wrong(entries, datasets, tmp_path):
    """All of val is then evaluated instead of it."""

    def rare(model, loader):
        return 0.0 if len(loader.dataset) <= 4 else 0.5

    entries = {name: entry for name, entry in entries.items() if name != "east_pico"}
    entries["north_pico"] |= {"eval_method": rare, "unmerged_acc": 0.5}
    manifest = merge_workload(
        entries, tmp_path / "r", datasets=datasets, device="cpu", tolerance=0.5, screening_images=4
    )
    assert manifest["memory"]["saved_bytes"] > 0 and manifest["tasks"]["north_pico"]["merged_acc"] == 0.5


def test_a_donor_gives_the_parameters_of_the_layer_alone():
    """A layer that has other layers as children: these are not taken with it."""
    torch.manual_seed(0)
    unmerged = nn.ModuleDict({"a_x": Token(3), "b_x": Token(3)})
    for number, model in enumerate(unmerged.values()):
        nn.init.constant_(model.scale, float(number))
    models, groups = copy.deepcopy(unmerged), find_groups(unmerged)
    token = next(group for group in groups if group.occurrences[0].layer == "")
    tie(models, groups)
    before = models["a_x"].fc.weight.clone()
    fitted = donate_weights(models, unmerged, groups, lambda group: "b_x" if group == token else None)
    assert set(fitted) == set(groups) - {token}
    assert torch.equal(models["a_x"].scale, unmerged["b_x"].scale) and torch.equal(models["a_x"].fc.weight, before)


def test_a_layer_before_a_gain_of_zero_is_fitted():
    """As in residual blocks at the start of training: no channel of the layer counts, so all count alike."""
    weights = shares_of(torch.zeros(2, 1, 4))
    assert torch.equal(weights, torch.full((2, 1, 4), 0.5))


def test_the_script_is_not_merged_again_in_a_loader_process(monkeypatch):
    """Without a main guard, a new process runs the script from its beginning and comes to merge_workload."""
    process = types.SimpleNamespace(_inheriting=True)
    monkeypatch.setattr("gemel.environment.processes.multiprocessing.current_process", lambda: process)
    with pytest.raises(RuntimeError, match="if __name__ == '__main__'"):
        merge_workload({})
    process._inheriting = False
    with pytest.raises(WorkloadError):
        merge_workload({})
