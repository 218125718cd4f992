"""A step of training when memory runs out, when nothing of a model is to be trained, and when loader processes die."""

import pytest
import torch
from pico import CPU
from torch import nn

from gemel.datasets.loaders import restarted
from gemel.training import step as step_module
from gemel.training.batches import Batches
from gemel.training.options import TrainingOptions
from gemel.training.outcome import OUT_OF_MEMORY
from gemel.training.schedule import Schedule
from gemel.training.step import JointStep, Member

NAMES = ("north_pico", "south_pico")


@pytest.fixture
def members(tasks, data):
    return [Member.of(tasks[name], data[name]) for name in NAMES]


def step_of(members, options=None) -> JointStep:
    options = options or TrainingOptions()
    models = nn.ModuleDict({member.task.name: member.task.model for member in members})
    training = JointStep(models, options, Schedule(options, 10, True), CPU, {})
    training.begin_stage(members)
    return training


@pytest.fixture
def crowded(monkeypatch):
    """Memory for batches of `limit` images of one task; the sizes that were tried."""
    honest, sizes, limit = step_module.task_losses, [], [1]

    def losses(task, batch, *more):
        if task.name == "south_pico":
            sizes.append(len(batch[0]))
            if len(batch[0]) > limit[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(task, batch, *more)

    monkeypatch.setattr(step_module, "task_losses", losses)
    return sizes, limit


def test_a_batch_that_is_no_power_of_two_comes_down_to_single_images(members, crowded):
    """And batch normalisation, which is left alone for single images, trains again with the next whole batch."""
    sizes, limit = crowded
    training = step_of(members)
    assert training.step(members) is None and sizes[:3] == [6, 3, 2] and sizes[3:] == [1] * 6
    assert all(module.training for member in members for module in member.task.model.modules())
    members[1].num_parts, limit[0] = 1, 6
    before = members[1].task.model.bn1.running_mean.clone()
    assert training.step(members) is None and not torch.equal(before, members[1].task.model.bn1.running_mean)


def test_one_image_that_does_not_fit_ends_the_round(members, crowded):
    crowded[1][0] = 0
    assert step_of(members).step(members) == OUT_OF_MEMORY and crowded[0] == [6, 3, 2, 1]


def test_a_stage_that_trains_nothing_of_a_model_leaves_it_out(members):
    """At first only what is private is trained, and of one model all of that is frozen."""
    members[0].task.model.requires_grad_(False)
    before = {key: value.clone() for key, value in members[0].task.model.state_dict().items() if "bn" not in key}
    training = step_of(members)
    other = members[1].task.model.fc.weight.clone()
    assert training.step(members) is None
    assert not torch.equal(other, members[1].task.model.fc.weight)
    assert all(torch.equal(value, members[0].task.model.state_dict()[key]) for key, value in before.items())
    for member in members:
        member.task.model.requires_grad_(False)
    assert step_of(members).step(members) is None


def test_loader_processes_that_die_twice_at_a_batch_are_done_without(data, monkeypatch, caplog):
    batches, expected = Batches(data["north_pico"]), Batches(data["north_pico"])
    honest, started = batches._take, []
    batches.loader = restarted(batches.loader)
    batches.loader.num_workers = 2  # it is never iterated over

    def restart(loader, **changes):
        started.append(changes)
        loader = restarted(data["north_pico"].train)
        loader.num_workers = changes.get("num_workers", 2)
        return loader

    def take():
        if len(started) < 2:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
        batches.loader.num_workers = 0
        return honest()

    monkeypatch.setattr("gemel.training.batches.restarted", restart)
    monkeypatch.setattr(batches, "load_state", lambda state: None)
    monkeypatch.setattr(batches, "_take", take)
    assert len(batches.next()[0]) == len(expected.next()[0]) == 6
    assert started == [{}, {"num_workers": 0}] and "loaded in the main process" in caplog.text
