"""How much of an error in a layer's output arrives at the outputs of the model."""

import copy

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.fitting.importance import NUM_IMAGES, importance_of_layers


def generator():
    return torch.Generator().manual_seed(0)


def images(count: int = NUM_IMAGES, size: int = 16):
    return [torch.rand(8, 3, size, size, generator=generator()) for _ in range(count // 8)]


def importance(model, names, batches=None, repeats: int = 1):
    drawn = generator()
    found = [importance_of_layers(model.eval(), names, batches or images(), drawn) for _ in range(repeats)]
    return {name: sum(each[name] for each in found) / repeats for name in found[0]}


class Chain(nn.Module):
    """Linear layers alone, so that what arrives is known: all of an error, or the share of a scale."""

    def __init__(self, scale: float):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 8)
        self.scale = scale
        nn.init.eye_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, images):
        values = images.mean((2, 3))
        values = torch.cat([values, values[:, :1]], 1)
        return self.last(torch.cat([self.first(values), self.scale * self.second(values)], 1))


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_errors_of_a_layer_count_by_what_it_contributes_to_the_outputs(scale):
    torch.manual_seed(0)
    model = Chain(scale)
    found = importance(model, ["first", "second", "last"], repeats=200)
    inputs = torch.cat(images()).mean((2, 3))
    inputs = torch.cat([inputs, inputs[:, :1]], 1)
    with torch.no_grad():
        variances = [layer(inputs).var(0, correction=0).sum() for layer in (model.first, model.second)]
        total = variances[0] + scale**2 * variances[1]
    ratio = found["first"] / found["second"]
    assert ratio == pytest.approx(float(variances[0] / (scale**2 * variances[1])), rel=0.3)
    assert total > 0 and found["first"] + found["second"] == pytest.approx(found["last"], rel=0.3)


def test_what_is_predicted_is_what_noise_in_the_layer_does():
    torch.manual_seed(0)
    model = PicoNet(extra=1).eval()
    found = importance(model, ["conv1", "conv2", "fc"], repeats=100)
    batches = torch.cat(images())
    for name in ("conv1", "conv2"):
        errors = []
        for seed in range(50):
            noisy, drawn = copy.deepcopy(model), torch.Generator().manual_seed(seed)

            def disturb(module, inputs, output, drawn=drawn):
                deviation = output.var((0, 2, 3), correction=0, keepdim=True).sqrt()
                return output + 1e-3 * deviation * torch.randn(output.shape, generator=drawn)

            noisy.get_submodule(name).register_forward_hook(disturb)
            with torch.no_grad():
                before, after = model(batches), noisy(batches)
            errors.append(((after - before).square().sum() / (before - before.mean()).square().sum()) / 1e-6)
        assert found[name] == pytest.approx(float(torch.stack(errors).mean()), rel=0.4), name


def test_outputs_are_the_layers_on_which_no_other_depends():
    model = PicoDetector().eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    batch = [torch.rand(3, 16, 16, generator=generator()) for _ in range(4)]
    before = copy.deepcopy(model.state_dict())
    found = importance(model, names, [batch])
    assert set(found) == set(names) and all(value >= 0 for value in found.values())
    assert max(found.values()) > 0.1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_operations_in_place_and_layers_that_are_never_called():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(2, 2), nn.Linear(4, 2)

        def forward(self, images):
            return self.fc(torch.relu_(self.conv(images)).mean((2, 3)))

    found = importance(InPlace(), ["conv", "unused", "fc"])
    assert set(found) == {"conv", "fc"} and found["conv"] > 0
