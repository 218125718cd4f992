"""Models of components that are not searched wait where memory is short."""

import pytest
import torch
from pico import CPU, PicoNet, same_state
from torch import nn

from gemel.forward.modes import deep_copy, state_on_cpu
from gemel.sharing import residence
from gemel.sharing.groups import find_groups, restrict
from gemel.sharing.residence import movable
from gemel.sharing.tying import is_tied, tie
from gemel.trials.waiting import Waiting

APART = (["a_x", "b_x"], ["c_x", "d_x"])


def is_in_file(tensor: torch.Tensor) -> bool:
    return "gemel-parked-" in str(tensor.untyped_storage().filename)


@pytest.fixture
def waiting(monkeypatch) -> Waiting:
    monkeypatch.setattr(residence, "LEAST_BYTES", 1)
    torch.manual_seed(0)
    models = nn.ModuleDict(
        {name: PicoNet(width=8 if name in APART[0] else 12) for name in ["a_x", "b_x", "c_x", "d_x"]}
    )
    models = models.to(memory_format=torch.channels_last)
    tie(models, restrict(find_groups(models), APART[0]))
    return Waiting(models, deep_copy(models), CPU)


def test_nothing_waits_unless_it_is_asked_for(waiting):
    waiting.all_but(["a_x"])
    assert waiting.bytes_away == 0 and not any(map(is_in_file, waiting.models.parameters()))


def test_all_but_one_component_wait_and_nothing_changes(waiting):
    models, before = waiting.models, state_on_cpu(waiting.models)
    held = {name: (id(p), p.stride()) for name, p in models.named_parameters(remove_duplicate=False)}
    groups = restrict(find_groups(models), APART[0])
    waiting.apart = APART
    for there, away in (APART, APART[::-1], APART):
        models["a_x"].fc.weight.grad = torch.zeros_like(models["a_x"].fc.weight)
        waiting.all_but(there[:1])
        for name in models:
            tensors = [*models[name].parameters(), *waiting.unmerged[name].parameters()]
            assert all(is_in_file(tensor) == (name in away) for tensor in tensors)
        assert (models["a_x"].fc.weight.grad is None) == ("a_x" in away)
        assert waiting.bytes_away > 0 and all(is_tied(models, group) for group in groups)
        assert {n: (id(p), p.stride()) for n, p in models.named_parameters(remove_duplicate=False)} == held
        assert same_state(state_on_cpu(models), before) and same_state(state_on_cpu(waiting.unmerged), before)
    waiting.bring_all()
    assert waiting.bytes_away == 0 and same_state(state_on_cpu(models), before)
    assert not any(is_in_file(tensor) for model in (models, waiting.unmerged) for tensor in model.parameters())


def test_once_it_has_ended_nothing_waits(waiting):
    waiting.apart = APART
    waiting.all_but(["a_x"])
    waiting.end()
    waiting.all_but(["a_x"])
    assert waiting.bytes_away == 0 and not any(map(is_in_file, waiting.models.parameters()))


def test_an_interrupted_move_is_taken_back(waiting, monkeypatch):
    waiting.apart = APART
    before, moved = state_on_cpu(waiting.models), []
    to_file = residence.to_file

    def fails(tensor):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(tensor)
        to_file(tensor)

    monkeypatch.setattr("gemel.trials.waiting.to_file", fails)
    with pytest.raises(KeyboardInterrupt):
        waiting.all_but(["a_x"])
    assert all(map(is_in_file, moved))
    waiting.end()
    assert not any(map(is_in_file, moved)) and same_state(state_on_cpu(waiting.models), before)


def test_a_tensor_that_another_is_a_view_of_stays():
    model = PicoNet()
    model.register_buffer("first", model.conv1.weight.detach()[:1])
    model.register_buffer("part", torch.zeros(9)[:4])
    found = {id(tensor) for tensor in movable({"a_x": model})}
    assert id(model.conv2.weight) in found
    assert not found & {id(model.conv1.weight), id(model.first), id(model.part)}


def test_files_take_at_most_half_of_the_free_disk(waiting, monkeypatch):
    tensors = movable({"c_x": waiting.models["c_x"]})
    largest = max(tensor.nbytes for tensor in tensors)
    free = residence.shutil.disk_usage(".")._replace(free=2 * largest)
    monkeypatch.setattr(residence.shutil, "disk_usage", lambda path: free)
    found = residence.for_files(tensors)
    assert found[0].nbytes == largest == sum(tensor.nbytes for tensor in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_they_wait_in_the_memory_of_the_machine(waiting):
    device = torch.device("cuda")
    before = state_on_cpu(waiting.models)
    on_device = Waiting(waiting.models.to(device), waiting.unmerged.to(device), device)
    on_device.apart = APART
    on_device.all_but(APART[1])
    for name, model in on_device.models.items():
        assert {tensor.device.type for tensor in model.parameters()} == {"cpu" if name in APART[0] else "cuda"}
    on_device.end()
    assert {tensor.device.type for tensor in on_device.models.parameters()} == {"cuda"}
    assert same_state(state_on_cpu(on_device.models), before)
