import pytest
import torch
from pico import PicoNet
from torch import nn

from gemel.sharing.groups import find_groups
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.precision import as_stored, groups_as_stored, overflows, round_weights, rounded_weights, stored_bytes
from gemel.sharing.tying import tie

HALVES = [torch.float16, torch.bfloat16]


def names_of(model: nn.Module, parameters) -> list[str]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [name_of[id(parameter)] for parameter in parameters]


def test_weights_are_the_float32_parameters_outside_normalisation():
    model = PicoNet()
    model.conv2.double()
    own = [f"{layer}.{part}" for layer in ("conv1", "fc") for part in ("weight", "bias")]
    assert names_of(model, rounded_weights(model, torch.float16)) == own


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_are_rounded_in_place_and_stay_float32(dtype):
    model = PicoNet()
    model.bn1.weight.data.fill_(1 / 3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    round_weights([model], torch.float32)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    round_weights([model], dtype)
    for name, parameter in model.named_parameters():
        expected = before[name] if name.startswith("bn1") else before[name].to(dtype).float()
        assert parameter.dtype == torch.float32 and torch.equal(parameter, expected), name


def test_a_finite_weight_beyond_the_range_overflows():
    model = PicoNet()
    assert overflows(model, torch.float16) is False
    for value, expected in ((65504.0, False), (7e4, True), (-7e4, True), (float("inf"), False), (float("nan"), False)):
        model.fc.bias.data[0] = value
        assert overflows(model, torch.float16) is expected and not overflows(model, torch.bfloat16)
    model.fc.bias.data[0] = 0
    model.bn1.running_var[0] = model.bn1.weight.data[0] = 7e4
    assert not overflows(model, torch.float16), "normalisation is stored as it is"


@pytest.mark.parametrize("dtype", HALVES)
def test_a_model_as_it_is_loaded_is_a_copy_with_weights_of_that_type(dtype):
    model = PicoNet().eval()
    assert as_stored(model, torch.float32) is model
    stored = as_stored(model, dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the model itself stays"
    assert {name: p.dtype for name, p in stored.named_parameters()} == {
        name: torch.float32 if name.startswith("bn1") else dtype for name, _ in model.named_parameters()
    }
    images = torch.rand(2, 3, 8, 8)
    assert torch.allclose(stored(images).float(), model(images), atol=0.05), "and it runs"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_bytes_in_a_store_of_that_type(dtype):
    models = {"a_x": PicoNet(), "b_x": PicoNet()}
    private, groups = stored_bytes(models, dtype), find_groups(models)
    normalisation = sum(t.nbytes for model in models.values() for t in model.bn1.state_dict().values())
    weights = distinct_bytes(models) - normalisation
    assert private == normalisation + weights * dtype.itemsize // 4
    tie(models, groups)
    saved = sum(group.saved_bytes for group in groups_as_stored(groups, models, dtype))
    assert stored_bytes(models, dtype) == private - saved and saved == weights * dtype.itemsize // 8
