"""In which precision steps compute: what is measured decides, once per architecture, and is remembered."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pico import CPU, PicoNet, same_state
from rank_processes import on_ranks
from torch import nn

from gemel.environment import ranks
from gemel.environment.device import has_tf32
from gemel.forward.autocast import IN_FLOAT32, IN_TF32, Autocast
from gemel.merging.records import RunRecord
from gemel.results_store.manifest import read_manifest
from gemel.thresholds import THRESHOLDS
from gemel.training import precision
from gemel.training.context import RoundContext
from gemel.training.early_stopping import Progress
from gemel.training.options import TrainingOptions
from gemel.training.precision import autocast_of, decide, first_batch, measured, parts_of
from gemel.training.schedule import Schedule
from gemel.training.step import JointStep, Member
from gemel.workload import WorkloadError
from merge_workloads import merge_workload
from model_architectures import build
from trainer import Round

BFLOAT16 = {"precision": "bfloat16"}
WAYS = {"bfloat16": Autocast(torch.bfloat16, ("",)), "tf32": IN_TF32}
OPTIONS = TrainingOptions(learning_rate=0.01, max_epochs=8, precision="auto")


class FakeStep:
    """Takes seconds and has losses and gradients as given, of WAYS; counts what was asked for."""

    def __init__(self, seconds, losses=(1.0, 1.0), gradients=((1.0, 0.0), (1.0, 0.0)), device=CPU):
        self.of, self.device, self.num_steps = (seconds, losses, gradients), device, 0

    def seconds(self, autocast):
        self.number, self.num_steps = [IN_FLOAT32, *WAYS.values()].index(autocast), self.num_steps + 1
        self.loss = torch.tensor(self.of[1][self.number])
        return self.of[0][self.number]

    def gradients(self):
        return [torch.tensor(self.of[2][self.number])]


@pytest.mark.parametrize(
    "step, expected, num_steps",
    [
        (FakeStep((1.5, 1.0)), "bfloat16", 6),
        (FakeStep((1.1, 1.0)), "float32", 6),
        (FakeStep((1.0, 1.5)), "float32", 2),  # clearly slower: no more steps than that
        (FakeStep((0.05, 0.01)), "float32", 1),  # too short to be measured
        (FakeStep((0.05, 0.01), device=torch.device("meta")), "bfloat16", 6),  # on another device it is not
        (FakeStep((1.5, 1.0), losses=(1.0, 1.03)), "float32", 2),
        (FakeStep((1.5, 1.0), losses=(0.001, 0.0015)), "bfloat16", 6),
        (FakeStep((1.5, 1.0), losses=(1.0, torch.nan)), "float32", 2),
        (FakeStep((1.5, 1.0), gradients=((1.0, 0.0), (0.5, 0.5))), "float32", 2),
    ],
)
def test_what_is_faster_and_agrees_is_taken(step, expected, num_steps):
    found = precision._compared(step, {"bfloat16": WAYS["bfloat16"]})
    assert (found["precision"], step.num_steps) == (expected, num_steps)


@pytest.mark.parametrize(
    "seconds, losses, expected, speedup",
    [
        ((1.5, 1.0, 1.1), (1.0, 1.0, 1.0), "bfloat16", 1.5),
        ((1.5, 1.1, 1.0), (1.0, 1.0, 1.0), "tf32", 1.5),
        ((1.5, 1.0, 1.25), (1.0, 1.5, 1.0), "tf32", 1.2),
        ((1.5, 1.0, 1.4), (1.0, 1.5, 1.0), "float32", 1.5),
        ((1.5, 1.0, 1.0), (1.0, 1.5, 1.5), "float32", 1.5),
    ],
)
def test_of_several_ways_the_fastest_that_agrees_is_taken(seconds, losses, expected, speedup):
    found = precision._compared(FakeStep(seconds, losses, [(1.0, 0.0)] * 3, torch.device("meta")), WAYS)
    assert found["precision"] == expected and found["speedup"] == speedup and "agrees" not in found


def test_tf32_holds_in_forward_and_backward_passes_of_a_step_and_no_longer(tasks, data):
    def now() -> str:
        return torch.backends.cuda.matmul.fp32_precision

    task, seen = tasks["north_pico"], []
    before = now()
    member = Member.of(task, data["north_pico"])
    models = nn.ModuleDict({"north_pico": task.model})
    training = JointStep(models, OPTIONS, Schedule(OPTIONS, 9, False), CPU, {})
    hooks = [
        task.model.register_forward_hook(lambda *_: seen.append(now())),
        task.model.fc.weight.register_hook(lambda _: seen.append(now())),
    ]
    for autocasts in ({}, {"north_pico": autocast_of(task, {"north_pico": {"precision": "tf32"}})}):
        training.autocasts = autocasts
        training.begin_stage([member])
        assert training.step([member]) is None and now() == before
    for hook in hooks:
        hook.remove()
    assert seen == [before, before, "tf32", "tf32"] and before != "tf32"


def test_a_cpu_has_no_tf32():
    assert not has_tf32(CPU)


def test_measuring_leaves_the_model_and_the_random_numbers_as_they_are(tasks, data, monkeypatch):
    monkeypatch.setattr(
        precision, "THRESHOLDS", replace(THRESHOLDS, precision=replace(THRESHOLDS.precision, least_seconds=0.0))
    )
    task = tasks["north_pico"]
    task.model.train()
    before, drawn = copy.deepcopy(task.model.state_dict()), torch.get_rng_state()
    found = measured(task, first_batch(data["north_pico"].train), CPU, None, 0)
    assert found["speedup"] > 0 and found["loss_difference"] < 0.02 and found["precision"] in ("float32", "bfloat16")
    assert same_state(before, task.model.state_dict()) and torch.equal(drawn, torch.get_rng_state())
    assert task.model.training and all(p.grad is None for p in task.model.parameters())


def test_an_architecture_is_measured_once_and_what_is_known_never(tasks, data, caplog):
    asked = []

    def measure(task, batch):
        asked.append(task.name)
        return dict(BFLOAT16)

    def batch_of(name):
        return first_batch(data[name].train)

    three = {name: tasks["north_pico"] for name in ("a", "b")} | {"c": tasks["south_pico"], "d": tasks["south_pico"]}
    three = {name: replace(task, name=name) for name, task in three.items()}
    found = {"d": {"precision": "float32"}}
    batches = dict.fromkeys(three, batch_of("north_pico"))
    decide("auto", found, three, batches.__getitem__, measure)
    assert asked == ["a", "c"] and found["a"] == found["b"] and found["d"] == {"precision": "float32"}
    decide("auto", found, three, batches.__getitem__, None)

    found = {}
    decide("bfloat16", found, tasks, None, None)
    assert {name: one["precision"] for name, one in found.items()} == {
        "north_pico": "bfloat16",
        "south_pico": "bfloat16",
        "east_pico": "float32",
    }
    assert "east_pico: trains in float32: it is not known which parts" in caplog.text and "south" not in caplog.text


def test_known_parts_of_detectors(tasks):
    with torch.device("meta"):
        frcnn = build("frcnn_model", 3, backbone="resnet18")
    assert parts_of(replace(tasks["east_pico"], model=frcnn)) == precision.PARTS[:4]
    assert parts_of(tasks["east_pico"]) == () and parts_of(tasks["north_pico"]) == ("",)


def test_all_ranks_take_what_the_first_one_measured(tasks, data):
    def decided():
        ranks.assign({"a": 1, "b": 0})
        both = {name: replace(tasks["north_pico"], name=name) for name in ("a", "b")}
        found = {}
        measure = lambda task, batch: {"precision": ["bfloat16", "float32"][ranks.rank()]}  # noqa: E731
        decide("auto", found, both, lambda name: first_batch(data["north_pico"].train), measure)
        return {name: one["precision"] for name, one in found.items()}

    assert on_ranks(2, decided) == [{"a": "bfloat16", "b": "bfloat16"}] * 2


def test_a_round_of_few_steps_measures_nothing_and_takes_what_is_known(tasks, data, monkeypatch):
    monkeypatch.setattr(precision, "measured", lambda *more: pytest.fail("measured"))
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    context = RoundContext(CPU, 0, precision={"north_pico": BFLOAT16})
    members = {name: Member.of(task, data[name]) for name, task in tasks.items()}
    session = Round(models, members, replace(OPTIONS, max_epochs=1.0), context)
    session.schedule.next_validation = 1
    session.train()
    assert {n: a.dtype for n, a in session.training.autocasts.items()} == {
        "north_pico": torch.bfloat16,
        "south_pico": torch.float32,
        "east_pico": torch.float32,
    }
    assert session._state()["precision"] == {"north_pico": BFLOAT16} and list(context.precision) == ["north_pico"]


def test_a_round_that_goes_on_takes_the_choice_that_was_saved(tasks, data, monkeypatch):
    def session_of(context):
        members = {name: Member.of(task, data[name]) for name, task in tasks.items()}
        return Round(nn.ModuleDict({name: task.model for name, task in tasks.items()}), members, OPTIONS, context)

    monkeypatch.setattr(precision, "measured", lambda *more: dict(BFLOAT16))
    first = session_of(RoundContext(CPU, 0))
    first.schedule.next_validation = 2
    first.train()
    monkeypatch.setattr(precision, "measured", lambda *more: pytest.fail("measured again"))
    other = session_of(RoundContext(CPU, 0, saved=copy.deepcopy(first._state())))
    other._begin()
    other.schedule.next_validation = 3
    other.train()
    assert other.training.autocasts == first.training.autocasts and other.schedule.step == 3
    assert other.training.autocasts["north_pico"].dtype == torch.bfloat16


def test_a_merge_records_the_precision_and_judges_in_float32(entries, datasets, tmp_path):
    seen = set()

    class Watched(PicoNet):
        def forward(self, images):
            seen.add((self.training, torch.is_autocast_enabled("cpu")))
            return super().forward(images)

    for name in ("north_pico", "south_pico"):
        entries[name]["model"].__class__ = Watched
    options = {"datasets": datasets, "device": "cpu", "strategy": "all", "max_epochs": 3.0, "learning_rate": 0.01}
    manifest = merge_workload(entries, tmp_path / "r", precision="bfloat16", **options)
    recorded = read_manifest(tmp_path / "r")["run"]
    assert manifest["run"]["rounds"][0]["steps"] and recorded["flags"]["precision"] == "bfloat16"
    assert recorded["training_precision"]["north_pico"] == BFLOAT16 and recorded["channels_last"] is True
    assert seen >= {(True, True), (False, False)} and (False, True) not in seen
    with pytest.raises(WorkloadError, match="precision"):
        merge_workload(entries, tmp_path / "r", **options)
    with pytest.raises(WorkloadError, match=r"precision: got 'int4'; allowed: auto, float32, bfloat16"):
        merge_workload(entries, tmp_path / "r", precision="int4", **options)


@pytest.mark.parametrize("device, expected", [("cpu", {"north_pico": BFLOAT16}), ("cuda", {})])
def test_what_was_chosen_on_another_device_is_not_taken(device, expected):
    record = RunRecord({"flags": {"device": device}}, {}, ())
    chosen = {"training_precision": {"north_pico": BFLOAT16}}
    record.load_rounds({"flags": {"device": "cpu"}, "rounds": [], "history": [], **chosen})
    assert record.precision == expected
    record.load_rounds({"rounds": [], "history": []})  # of an earlier version
    assert record.precision == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_step_in_bfloat16_does_not_wait(tasks):
    """And its losses are those of float32, nearly."""
    device = torch.device("cuda")
    model = build("resnet18", 3).to(device, memory_format=torch.channels_last).train()
    task = replace(tasks["north_pico"], model=model)
    batch = torch.rand(16, 3, 224, 224, device=device), torch.randint(3, (16,), device=device)
    found = measured(task, batch, device, None, 0)
    print(found)
    assert found["loss_difference"] <= THRESHOLDS.precision.loss_difference
    assert found["precision"] in ("float32", "bfloat16", "tf32")
    nothing = SimpleNamespace(next=lambda: batch)
    member = Member(task, None, nothing, Progress(1.0, accuracy=1.0))
    options = TrainingOptions()
    training = JointStep(nn.ModuleDict({"north_pico": model}), options, Schedule(options, 9, False), device, {})
    training.autocasts = {"north_pico": precision.Autocast(torch.bfloat16, ("",))}
    training.begin_stage([member])
    training.step([member])  # the first step makes the state of the optimizer
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert training.step([member]) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.why_failed() is None
