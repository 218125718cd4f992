"""Training steps are compiled where that is faster and computes the same, and only if it is asked for."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from pico import PicoNet
from safetensors.torch import load_file
from torch import nn

from gemel.environment.device import pick_device
from gemel.forward import compiled as forward_compiled
from gemel.results_store.manifest import read_manifest
from gemel.thresholds import THRESHOLDS
from gemel.training import compiled, precision
from gemel.training.compiled import part_of
from gemel.training.context import RoundContext
from gemel.training.options import TrainingOptions
from gemel.training.step import Member
from gemel.workload import WorkloadError
from merge_workloads import merge_workload
from model_architectures import build
from trainer import Round

CPU, CLASSIFIERS = pick_device("cpu"), {"north_pico", "south_pico"}
OPTIONS = TrainingOptions(learning_rate=0.01, max_epochs=8, compile=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Graphs are run as they are."""
    monkeypatch.setattr(forward_compiled, "BACKEND", "eager")


def trained(tasks, data, context, options=OPTIONS, steps=3) -> Round:
    members = {name: Member.of(task, data[name]) for name, task in tasks.items()}
    session = Round(nn.ModuleDict({name: task.model for name, task in tasks.items()}), members, options, context)
    session.schedule.next_validation = steps
    session.train()
    return session


def faster(monkeypatch, is_faster: bool = True) -> list[bool]:
    """Makes compiled steps seem faster; returns whether each measured step was compiled."""
    seen: list[bool] = []
    seconds = precision.Step.seconds

    def measured(self, autocast):
        seconds(self, autocast)
        seen.append(part_of(self.task)._compiled_call_impl is not None)
        return 1.0 if seen[-1] == is_faster else 2.0

    monkeypatch.setattr(precision.Step, "seconds", measured)
    return seen


def test_what_is_compiled_of_a_model(tasks):
    assert part_of(tasks["north_pico"]) is tasks["north_pico"].model
    assert part_of(tasks["east_pico"]) is None, "a detector whose parts are not known"
    fcos = build("fcos_model", 3, backbone="slim_resnet", layers=(1, 1, 1, 1), width=4, head_convs=1, min_size=32)
    assert part_of(replace(tasks["east_pico"], model=fcos)) is fcos.backbone


def test_steps_are_compiled_where_that_is_faster_and_the_choice_is_kept(tasks, data, monkeypatch):
    seen = faster(monkeypatch)
    context = RoundContext(CPU, 0)
    session = trained(tasks, data, context)
    assert seen.count(True) == seen.count(False) == 6, "three of each, for two classifiers"
    assert set(session.training.compiled) == CLASSIFIERS
    assert context.precision["north_pico"] == {"precision": "float32", "compiled": True}
    assert all(task.model._compiled_call_impl is None for task in tasks.values()), "outside of steps nothing is"
    monkeypatch.setattr(compiled, "pays", lambda *more: pytest.fail("measured again"))
    again = trained(tasks, data, RoundContext(CPU, 0, precision=context.precision))
    assert set(again.training.compiled) == CLASSIFIERS


@pytest.mark.parametrize("why", ["slower", "other losses", "fails"])
def test_what_is_slower_or_differs_or_fails_is_not_compiled(tasks, data, monkeypatch, caplog, why):
    faster(monkeypatch, is_faster=why != "slower")
    if why == "other losses":
        monkeypatch.setattr(forward_compiled, "BACKEND", lambda graph, inputs: _doubled(graph))
    if why == "fails":
        monkeypatch.setattr(forward_compiled, "BACKEND", lambda graph, inputs: 1 / 0)
    context = RoundContext(CPU, 0)
    one = {"north_pico": tasks["north_pico"]}
    with caplog.at_level(logging.WARNING):
        session = trained(one, data, context)
    assert session.training.compiled == {} and context.precision["north_pico"]["compiled"] is False
    said = {"slower": ": 2.00 x as long", "other losses": ": their losses or gradients", "fails": ", which fails: "}[
        why
    ]
    assert f"north_pico: training steps are not compiled{said}" in caplog.text


def _doubled(graph):
    return lambda *inputs: tuple(2 * y if torch.is_tensor(y) else y for y in graph.forward(*inputs))


def test_a_round_of_few_steps_compiles_nothing(tasks, data, monkeypatch):
    monkeypatch.setattr(compiled, "pays", lambda *more: pytest.fail("measured"))
    assert trained(tasks, data, RoundContext(CPU, 0), replace(OPTIONS, max_epochs=1.0), steps=1).training.compiled == {}


def test_a_merge_records_it_and_is_resumed_only_with_it(entries, datasets, tmp_path, monkeypatch):
    faster(monkeypatch)
    seen = set()

    class Watched(PicoNet):
        def forward(self, images):
            seen.add((self.training, torch.compiler.is_compiling()))
            return super().forward(images)

    for name in ("north_pico", "south_pico"):
        entries[name]["model"].__class__ = Watched
    options = {"datasets": datasets, "device": "cpu", "strategy": "all", "max_epochs": 8.0, "learning_rate": 0.01}
    before = copy.deepcopy(entries)
    manifest = merge_workload(entries, tmp_path / "r", compile=True, **options)
    recorded = read_manifest(tmp_path / "r")["run"]
    assert manifest["run"]["rounds"][0]["steps"] and recorded["flags"]["compile"] is True
    assert recorded["training_precision"]["north_pico"]["compiled"] is True
    assert seen >= {(True, True), (False, False)}, "training is compiled"
    assert (False, True) not in seen, "evaluations are not"
    usual = merge_workload(copy.deepcopy(before), tmp_path / "usual", **options)
    assert [row["steps"] for row in usual["run"]["rounds"]] == [row["steps"] for row in manifest["run"]["rounds"]]
    found, expected = (
        load_file(tmp_path / name / m["store"]["file"]) for name, m in (("r", manifest), ("usual", usual))
    )
    assert found and all(torch.allclose(found[key], expected[key], rtol=1e-3, atol=1e-5) for key in expected)
    with pytest.raises(WorkloadError, match="compile"):
        merge_workload(entries, tmp_path / "r", **options)


@pytest.mark.exhaustive
def test_torch_compiles_a_step_that_computes_the_same(tasks, data, monkeypatch):
    monkeypatch.setattr(forward_compiled, "BACKEND", "inductor")
    faster(monkeypatch)
    assert THRESHOLDS.precision.compiled_difference <= 0.001
    one = {"north_pico": tasks["north_pico"]}
    assert set(trained(one, data, RoundContext(CPU, 0)).training.compiled) == {"north_pico"}
