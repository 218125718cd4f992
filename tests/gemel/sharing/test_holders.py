import copy
import io

import torch
from pico import CPU, PicoNet, same_state
from rank_processes import on_ranks
from torch import nn

from gemel.environment import ranks
from gemel.sharing import holders
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
    holders.LEAST_BYTES = 1  # pico models have no large tensors
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
