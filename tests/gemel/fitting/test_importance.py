"""How much of an error in a layer's output arrives at the outputs of the model."""

import copy

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.fitting.importance import MAX_IMAGES, PIXELS, output_metrics


def generator():
    return torch.Generator().manual_seed(0)


def images(count: int = MAX_IMAGES, size: int = 16):
    return [torch.rand(8, 3, size, size, generator=generator()) for _ in range(count // 8)]


def metrics(model, batches=None, repeats: int = 1):
    """Layer -> mean of its metric, mean of its importance, over random vectors."""
    drawn = generator()
    found = [output_metrics(model.eval(), batches or images(), drawn) for _ in range(repeats)]
    return {
        name: (
            sum(each[name].matrix for each in found) / repeats,
            sum(each[name].importance for each in found) / repeats,
        )
        for name in found[0]
    }


def importance(model, batches=None, repeats: int = 1):
    return {name: value for name, (_, value) in metrics(model, batches, repeats).items()}


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
    found = importance(model, repeats=200)
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
    found = importance(model, repeats=100)
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
    found = importance(model, [batch])
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

    found = importance(InPlace())
    assert set(found) == {"conv", "fc"} and found["conv"] > 0


def test_the_metric_says_what_an_error_does_to_the_outputs():
    torch.manual_seed(0)
    model = Chain(0.1)
    nn.init.normal_(model.last.weight)
    matrix = metrics(model, repeats=400)["first"][0][0]
    jacobian = model.last.weight.detach()[:, :4]
    expected = jacobian.T @ jacobian
    assert torch.allclose(matrix / matrix.trace(), expected / expected.trace(), atol=0.05)


def test_a_metric_is_of_all_calls_and_positions_and_by_the_groups_of_a_convolution():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(6, 2)

        def forward(self, images):
            images = torch.cat([images, images[:, :1]], 1)
            return self.fc(self.conv(images).mean((2, 3)) + self.conv(images.flip(3)).mean((2, 3)))

    found = output_metrics(Twice().eval(), images(8), generator())
    assert found["conv"].matrix.shape == (2, 3, 3) and found["fc"].matrix.shape == (1, 2, 2)
    values = torch.linalg.eigvalsh(found["conv"].matrix)
    assert (values[:, 0].abs() < 1e-4 * values[:, -1]).all(), "as many directions as there are outputs"


def test_a_few_images_are_enough_and_fewer_where_they_are_large():
    seen = []
    model = PicoNet()
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    output_metrics(model.eval(), images(128), generator())
    assert sum(seen) == MAX_IMAGES
    seen.clear()
    size = int((PIXELS / 6) ** 0.5)
    output_metrics(model.eval(), [torch.rand(8, 3, size, size)] * 2, generator(), 3)
    assert seen == [3, 3]


def test_layers_with_gradients_that_are_not_finite_are_left_out():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, images):
            values = self.conv(images).mean((2, 3))
            return self.fc(values + values.mul(0).sqrt())

    found = output_metrics(Broken().eval(), images(8), generator())
    assert set(found) == {"fc"}
