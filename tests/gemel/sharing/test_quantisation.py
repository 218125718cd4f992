"""Weights in 8 bits: what is found again in rounded values, and which weights they are."""

import copy

import pytest
import torch
from torch import nn

from gemel.sharing.groups import find_groups
from gemel.sharing.precision import groups_as_stored, overflows, round_weights, stored_bytes
from gemel.sharing.quantisation import LEVELS, is_rounded, quantise, quantised_bytes, quantised_weights

SHAPES = [(5, 9), (4, 3, 3, 3), (16, 1, 3, 3), (1, 40), (3, 2, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 3e4])
def test_rounded_values_are_found_again_exactly(shape, size):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    once = quantise(weight)
    again = quantise(once.dequantised())
    assert torch.equal(once.values, again.values) and torch.equal(once.scale, again.scale)
    assert torch.equal(once.dequantised(), again.dequantised()) and is_rounded(once.dequantised())
    assert not is_rounded(weight) and once.values.abs().flatten(1).amax(1).tolist() == [LEVELS] * shape[0]
    steps = once.scale.view(-1, *[1] * (len(shape) - 1))
    assert bool(((weight - once.dequantised()).abs() <= 0.501 * steps).all())
    assert once.nbytes == quantised_bytes(weight) == weight.numel() + 4 * shape[0]


def test_rows_of_zeros_of_minus_zeros_and_of_almost_nothing_become_zero():
    weight = torch.tensor([[0.0] * 8, [-0.0] * 8, [1e-40] * 8, [2.0] * 7 + [-0.0]])
    found = quantise(weight)
    assert found.values[:3].abs().sum() == 0 and found.scale[:3].tolist() == [1.0] * 3
    assert not bool(torch.signbit(found.dequantised()).any()) and is_rounded(found.dequantised())


def test_normalisation_biases_and_short_rows_stay():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 3), nn.LayerNorm(3)
    )
    before = copy.deepcopy(model.state_dict())
    assert [id(p) for p in quantised_weights(model)] == [id(model[0].weight), id(model[4].weight)]
    round_weights([model], torch.int8)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"0.weight", "4.weight"}


def test_attention_is_stored_in_8_bits_and_a_weight_in_two_places_is_counted_once():
    attention = nn.MultiheadAttention(16, 2)
    assert {tuple(p.shape) for p in quantised_weights(attention)} == {(48, 16), (16, 16)}
    model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False))
    model[1].weight = model[0].weight
    assert len(quantised_weights(model)) == 1 and stored_bytes({"a": model}, torch.int8) == 9 * 9 + 4 * 9


def test_groups_have_the_bytes_of_the_store():
    models = {name: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)) for name in "ab"}
    sizes = {g.signature.split("(")[0]: g.bytes for g in groups_as_stored(find_groups(models), models, torch.int8)}
    assert sizes == {"Conv2d": 4 * 27 + 4 * 4 + 4 * 4, "Linear": 4 * (2 * 4 + 2)}
    group = next(g for g in groups_as_stored(find_groups(models), models, torch.int8) if "Conv2d" in g.signature)
    assert group.as_counted(models["a"][0], 12) == 12, "beside weights in 8 bits, additions stay float32"


def test_what_is_not_finite_has_no_8_bits():
    model = nn.Linear(9, 2)
    assert not overflows(model, torch.int8)
    model.weight.data[0, 0] = torch.nan
    assert overflows(model, torch.int8)
