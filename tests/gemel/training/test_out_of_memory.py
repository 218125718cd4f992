"""Memory that runs out within a round of training: smaller batches, and the same gradients."""

import copy

import torch
from long_rounds import merge, round_of, same, state_of
from torch import nn

from gemel.evaluation.eval_method import evaluate
from gemel.training import step as step_module
from gemel.training.step import Taken


def test_out_of_memory_halves_the_batch_of_that_task_and_goes_on(entries, tasks, data, monkeypatch, caplog):
    honest = step_module.task_losses

    def crowded(task, batch, *more):
        if task.name == "south_pico" and len(batch[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(task, batch, *more)

    monkeypatch.setattr(step_module, "task_losses", crowded)
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    session = round_of(models, tasks, data)
    for member in session.members.values():
        member.task.model.train()
    assert session.training.step(session.validation.active) is None and session.schedule.step == 1
    assert {name: m.num_parts for name, m in session.members.items()} == {
        "north_pico": 1,
        "south_pico": 4,
        "east_pico": 1,
    }
    assert "south_pico: out of memory; continues with 2 images at a time" in caplog.text


def test_a_round_is_given_up_when_one_sample_does_not_fit(entries, trained_entries, datasets, tmp_path, monkeypatch):
    def crowded(*more):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 1 bytes")

    monkeypatch.setattr(step_module, "task_losses", crowded)
    manifest = merge(entries, tmp_path / "results", datasets)
    assert {row["reason"] for row in manifest["run"]["rounds"]} == {"out of memory"}
    assert manifest["shared_layers"] == [] and same(state_of(entries), state_of(trained_entries))


def test_gradients_of_a_split_batch_are_those_of_the_whole(tasks, data):
    models = nn.ModuleDict({"east_pico": tasks["east_pico"].model})
    one = {"east_pico": tasks["east_pico"]}
    session = round_of(models, one, data)
    member = session.members["east_pico"]
    member.task.model.train()
    member.task.model.bn1.eval()
    batch = member.batches.next()
    gradients = []
    for member.num_parts in (1, 2):
        session.training._backward([Taken(member, batch, len(batch[0]))])
        gradients.append(member.task.model.offsets.weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().sum() > 0


def test_out_of_memory_in_evaluation_halves_the_batch(tasks, data, monkeypatch):
    sizes = []

    def crowded(model, loader):
        sizes.append(loader.batch_size)
        if loader.batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.5

    task = copy.copy(tasks["north_pico"])
    object.__setattr__(task, "eval_method", crowded)
    assert evaluate(task, data["north_pico"].val) == 0.5
    assert sizes == [12, 6, 3]
