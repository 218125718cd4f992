"""A step of training when memory runs out, when nothing of a model is to be trained, and when loader processes die."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from pico import CPU
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemel.datasets.loaders import restarted
from gemel.training import step as step_module
from gemel.training.batches import Batches
from gemel.training.distillation import Teacher
from gemel.training.options import TrainingOptions
from gemel.training.outcome import NOT_FINITE, OUT_OF_MEMORY
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


@pytest.mark.parametrize(
    "names, rate", [(["north_pico"], 0.05), (["north_pico", "east_pico"], 0.01), (["east_pico"], 0.01)]
)
def test_private_parameters_of_detectors_are_trained_more_slowly(names, rate, tasks):
    options = TrainingOptions(private_learning_rate=0.05, detection_private_learning_rate=0.01, private_epochs=1.0)
    schedule = Schedule(options, 10, True, options.private_rate(tasks[name] for name in names))
    schedule.step = options.warmup_steps - 1
    assert schedule.private_only and schedule.rate() == rate
    schedule.step = 10 + options.warmup_steps
    assert not schedule.private_only and schedule.rate() == options.learning_rate


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


class NeverWaits(TorchDispatchMode):
    """Fails where a value is looked at, for which a CUDA device would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_a_step_with_the_fused_optimizer_looks_at_no_value(members):
    """As on CUDA; a loss that is not finite leaves the step out, and is found later."""
    training = step_of(members, TrainingOptions(feature_weight=1.0, probability_weight=1.0))
    training.optimizer, training.looks_later = torch.optim.AdamW(training.trained, lr=0.1, fused=True), True
    for member in members:
        model = member.task.model
        training.teachers = {**training.teachers, member.task.name: Teacher(model, _frozen_copy(model), ["conv2"])}
        batch = member.batches.next()  # loaders draw on the CPU
        member.batches = SimpleNamespace(next=lambda batch=batch: batch)
    with NeverWaits():
        assert [training.step(members) for _ in range(2)] == [None, None]
    assert training.why_failed() is None
    members[0].task.model.fc.bias.data.fill_(torch.nan)
    before = members[1].task.model.fc.weight.clone()
    with NeverWaits():
        assert training.step(members) is None
    assert training.why_failed() == NOT_FINITE and torch.equal(before, members[1].task.model.fc.weight)


def _frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


class Kept:
    """A tensor that is kept for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_activations_of_one_task_are_held_at_a_time_and_none_of_frozen_layers(members):
    kept, at_begin, in_frozen = weakref.WeakSet(), [], []

    def pack(tensor):
        kept.add(found := Kept(tensor))
        return found

    for member in members:
        model = member.task.model
        for layer in (model.conv1, model.bn1):
            layer.requires_grad_(False)
        model.register_forward_pre_hook(lambda *_: at_begin.append(len(kept)))
        model.bn1.register_forward_hook(lambda *_: in_frozen.append(len(kept)))
    training = step_of(members)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        assert training.step(members) is None and training.step(members) is None
    assert at_begin == in_frozen == [0] * 4
