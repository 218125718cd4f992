"""Rounding on the inputs of a layer: less error at its outputs; shared layers on the inputs of all tasks."""

import copy

import pytest
import torch
from rank_processes import on_ranks
from torch import nn

from gemel.environment import ranks
from gemel.fitting.rounding import best_scales, round_to_inputs, rounded_matrix
from gemel.sharing.precision import round_weights
from gemel.sharing.quantisation import is_rounded, quantise, quantised_weights

LAYERS = {
    "linear": lambda: nn.Linear(24, 10),
    "convolution": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "without bias": lambda: nn.Conv2d(3, 8, 3, stride=2, bias=False),
    "depthwise": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "blocks": lambda: nn.Linear(300, 20),
}


def images_for(layer: nn.Module, seed: int) -> list[torch.Tensor]:
    """Inputs that are correlated, and have a mean."""
    drawn = torch.Generator().manual_seed(seed)
    width = layer.in_features if isinstance(layer, nn.Linear) else 0
    if not width:
        return [torch.nn.functional.avg_pool2d(torch.rand(8, 3, 18, 18, generator=drawn), 3, 1) for _ in range(4)]
    mix = torch.randn(6, width, generator=torch.Generator().manual_seed(7))
    noise = [0.1 * torch.randn(64, width, generator=drawn) + 1 for _ in range(4)]
    return [torch.randn(64, 6, generator=drawn) @ mix + part for part in noise]


def error(layer: nn.Module, other: nn.Module, images: list[torch.Tensor]) -> float:
    with torch.inference_mode():
        return float(sum((layer(x) - other(x)).square().sum() for x in images))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_outputs_differ_less_than_with_the_nearest_numbers(make):
    torch.manual_seed(0)
    model = nn.Sequential(make())
    nearest, fitted = copy.deepcopy(model), copy.deepcopy(model)
    round_weights([nearest], torch.int8)
    round_to_inputs({"a": fitted}, {"a": images_for(model[0], 1)}, seed=0)
    held_out = images_for(model[0], 2)
    assert error(model, fitted, held_out) < 0.7 * error(model, nearest, held_out)
    assert all(map(is_rounded, quantised_weights(fitted)))
    before = copy.deepcopy(fitted.state_dict())
    round_to_inputs({"a": fitted}, {"a": held_out}, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in fitted.state_dict().items()), "rounded once for all"


def test_a_shared_layer_is_rounded_on_the_inputs_of_all_its_tasks():
    """The inputs of one task use half of the weights each."""
    torch.manual_seed(0)
    shared, halves = nn.Linear(24, 10), torch.arange(24) < 12
    models = {"a": nn.Sequential(shared), "b": nn.Sequential(copy.deepcopy(shared))}
    models["b"][0].weight, models["b"][0].bias = shared.weight, shared.bias
    images = {"a": [x * halves for x in images_for(shared, 1)], "b": [x * ~halves for x in images_for(shared, 1)]}
    came, nearest = copy.deepcopy(shared), copy.deepcopy(shared)
    round_weights([nearest], torch.int8)
    round_to_inputs(models, images, seed=0)
    assert models["a"][0].weight is models["b"][0].weight and is_rounded(shared.weight)
    for task in models:
        assert error(came, shared, images[task]) < 0.7 * error(came, nearest, images[task])


def test_several_ranks_round_a_shared_layer_as_one_process_does():
    """Inputs of few bits, whose sums of products are exact in any order."""
    torch.manual_seed(0)
    shared = nn.Linear(24, 10)
    images = {task: [(x * 8).round() / 8 for x in images_for(shared, seed)] for task, seed in (("a", 1), ("b", 2))}

    def rounded() -> list[torch.Tensor]:
        own = copy.deepcopy(shared)
        models = {"a": nn.Sequential(own), "b": nn.Sequential(nn.Linear(24, 10))}
        models["b"][0].weight, models["b"][0].bias = own.weight, own.bias
        ranks.assign({"a": 0, "b": ranks.size() - 1})
        round_to_inputs(models, {task: images[task] for task in ranks.mine(models)}, seed=0)
        return [own.weight.detach(), own.bias.detach()]

    expected = rounded()
    for found in on_ranks(2, rounded):
        assert all(map(torch.equal, found, expected))


def test_what_no_inputs_are_seen_of_gets_the_nearest_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    expected = [quantise(model[0].weight).dequantised(), quantise(model[1].weight).dequantised()]
    round_to_inputs({"a": model}, {"a": []}, seed=0)
    assert torch.equal(model[0].weight, expected[0]) and torch.equal(model[1].weight, expected[1])


def test_a_frozen_bias_stays_and_values_that_are_not_finite_are_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 10), nn.Linear(10, 9))
    model[0].bias.requires_grad_(False)
    bias = model[0].bias.clone()
    model[1].weight.data[0, 0] = torch.inf
    wide = model[1].weight.clone()
    round_to_inputs({"a": model}, {"a": images_for(model[0], 1)}, seed=0)
    assert torch.equal(model[0].bias, bias) and torch.equal(model[1].weight, wide) and is_rounded(model[0].weight)


def test_scales_clip_a_value_that_meets_no_input_and_dead_inputs_are_no_matter():
    matrix = torch.rand(1, 12, 1, generator=torch.Generator().manual_seed(0)) - 0.5
    matrix[0, 0] = 1.0
    inputs = torch.ones(1, 12)
    whole = best_scales(matrix, inputs)
    inputs[0, 0] = 0
    assert best_scales(matrix, inputs) < whole
    gram = torch.diag_embed(inputs)
    found = rounded_matrix(matrix, gram)
    assert bool(found.isfinite().all()) and is_rounded(found[0].T.contiguous())
