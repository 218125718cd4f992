import copy
import io

import pytest
import torch
from pico import CPU, PicoNet, same_state
from rank_processes import on_ranks
from torch import nn

from gemel.environment import ranks
from gemel.sharing import residence
from gemel.sharing.groups import find_groups
from gemel.sharing.holders import held_by, own_models, park, synchronise
from gemel.sharing.tying import tie


def models_of_ranks() -> nn.ModuleDict:
    torch.manual_seed(0)
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet(extra=1), "c_x": PicoNet()})
    ranks.assign({"a_x": 0, "b_x": 1, "c_x": 1})
    return models.to(memory_format=torch.channels_last)


def changed() -> dict:
    """Every rank adds its number, and 1, to all that its models hold."""
    models = models_of_ranks()
    tie(models, find_groups({name: models[name] for name in ("a_x", "b_x")}))
    with torch.no_grad():
        for tensor in {*own_models(models).parameters()}:
            tensor.add_(ranks.rank() + 1)
    before = sum(map(len, held_by(models).values()))
    synchronise(models)
    return {"states": {name: model.state_dict() for name, model in models.items()}, "held": before}


def test_all_ranks_get_the_values_of_the_first_task_that_holds_a_tensor():
    first, second = on_ranks(2, changed)
    expected = models_of_ranks()
    for name, state in first["states"].items():
        assert same_state(state, second["states"][name])
    assert torch.equal(first["states"]["c_x"]["fc.weight"], expected["c_x"].fc.weight + 2)
    assert torch.equal(first["states"]["b_x"]["conv2.weight"], first["states"]["a_x"]["conv2.weight"])
    assert torch.equal(first["states"]["a_x"]["bn1.weight"], expected["a_x"].bn1.weight + 1)


def parked() -> dict:
    models = models_of_ranks()
    before = copy.deepcopy(models)
    residence.LEAST_BYTES = 1  # pico models have no large tensors
    park(models)
    torch.save(models.state_dict(), io.BytesIO())
    assert same_state(models.state_dict(), before.state_dict())
    pairs = zip(models.parameters(), before.parameters(), strict=True)
    assert all(own.stride() == other.stride() for own, other in pairs)
    with torch.no_grad():
        models["b_x"].fc.bias.add_(1)
    return {name: in_a_file(model.conv2.weight) for name, model in models.items()}


def in_a_file(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is a file's, by what the system says."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if "gemel-parked-" in line]
    return any(int(begin, 16) <= tensor.data_ptr() < int(end, 16) for begin, end in ranges)


def test_the_weights_of_other_ranks_tasks_lie_in_a_file():
    first, second = on_ranks(2, parked)
    assert first == {"a_x": False, "b_x": True, "c_x": True}
    assert second == {"a_x": True, "b_x": False, "c_x": False}


def test_one_process_parks_nothing():
    models = models_of_ranks()
    park(models)
    assert not in_a_file(models["a_x"].conv2.weight) and models["a_x"].conv2.weight.device == CPU


# ---- in one process, as on the first of two ranks ---------------------------------------------------------


@pytest.fixture
def first_of_two(monkeypatch):
    """Of the tasks a_x and b_x the first rank has the first; broadcasts are recorded as (root, tensors)."""
    owners, sent = {"a_x": 0, "b_x": 1, "c_x": 1}, []
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "owner_of", owners.__getitem__)
    monkeypatch.setattr(ranks, "is_mine", lambda name: owners[name] == 0)
    monkeypatch.setattr(ranks, "broadcast", lambda tensors, root: sent.append((root, list(map(id, tensors)))))
    return sent


def tied_models() -> nn.ModuleDict:
    models = nn.ModuleDict({name: PicoNet() for name in ("b_x", "a_x", "c_x")})
    tie(models, [group.restricted_to({"a_x", "b_x"}) for group in find_groups(models)])
    return models


def test_who_holds_a_parameter(first_of_two):
    models = tied_models()
    held = held_by(models)
    assert set(held) == {*models.parameters()}
    assert held[models["a_x"].conv1.weight] == {0, 1}, "it is tied"
    assert held[models["a_x"].bn1.weight] == {0} and held[models["c_x"].conv1.weight] == {1}
    assert list(own_models(models)) == ["a_x"]


def test_each_tensor_is_sent_once_by_the_rank_of_the_first_task_that_holds_it(first_of_two):
    models = tied_models()
    synchronise(models)
    of_b_and_c = {id(t) for name in ("b_x", "c_x") for t in models[name].state_dict(keep_vars=True).values()}
    of_a_alone = {id(t) for t in models["a_x"].state_dict(keep_vars=True).values()} - of_b_and_c
    (first, by_first), (second, by_second) = first_of_two
    assert (first, second) == (0, 1)
    assert set(by_first) == of_a_alone and set(by_second) == of_b_and_c
    assert len(by_first) == len(of_a_alone) and len(by_second) == len(of_b_and_c)


def test_one_process_sends_nothing(first_of_two, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 1)
    synchronise(tied_models())
    assert first_of_two == []


def test_only_large_tensors_that_no_task_of_this_rank_holds_are_parked(first_of_two, monkeypatch):
    models = tied_models()
    weight, conv1, bias = models["c_x"].conv2.weight, models["c_x"].conv1.weight, models["c_x"].conv2.bias
    models["c_x"].conv2.weight.data = weight.data.to(memory_format=torch.channels_last)
    monkeypatch.setattr(residence, "LEAST_BYTES", conv1.nbytes)
    tensors = dict(models.state_dict(keep_vars=True))
    before = {name: (tensor.data_ptr(), tensor.detach().clone(), tensor.stride()) for name, tensor in tensors.items()}
    park(models)
    assert models.state_dict(keep_vars=True).keys() == before.keys()
    moved = {name for name, tensor in tensors.items() if tensor.data_ptr() != before[name][0]}
    assert moved == {"c_x.conv1.weight", "c_x.conv2.weight"} and bias.nbytes < conv1.nbytes
    for name, (_, values, stride) in before.items():
        assert torch.equal(tensors[name], values) and tensors[name].stride() == stride
    for name in moved:
        assert tensors[name].untyped_storage().nbytes() == tensors[name].nbytes and tensors[name].storage_offset() == 0


def test_the_largest_are_parked_where_there_are_too_many(first_of_two, monkeypatch):
    models = tied_models()
    monkeypatch.setattr(residence, "LEAST_BYTES", 1)
    monkeypatch.setattr(residence, "MAX_FILES", 1)
    largest = max(models["c_x"].parameters(), key=lambda parameter: parameter.nbytes)
    before = {name: tensor.data_ptr() for name, tensor in models.state_dict(keep_vars=True).items()}
    park(models)
    after = models.state_dict(keep_vars=True)
    assert [after[name] is largest for name in before if after[name].data_ptr() != before[name]] == [True]
