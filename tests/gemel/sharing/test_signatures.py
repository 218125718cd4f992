"""The layers of a model, and when two of them are interchangeable."""

import pytest
import torch
import torchvision
from pico import PicoNet
from torch import nn

from gemel.sharing.signatures import find_layers, is_normalisation, signature_of


def names_of(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(model)]


def test_layers_leave_normalisation_out():
    assert names_of(PicoNet(extra=1)) == ["conv1", "conv2", "more.0", "fc"]
    for module in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), torchvision.ops.FrozenBatchNorm2d(4)):
        assert is_normalisation(module)
    assert is_normalisation(type("MyChannelNorm2d", (nn.Module,), {})())
    assert not is_normalisation(torchvision.ops.Conv2dNormActivation(3, 4))


def test_layer_bytes_are_those_of_its_own_parameters():
    (layer,) = find_layers(nn.Sequential(nn.Conv2d(3, 8, 5)))
    assert layer.bytes == (3 * 8 * 25 + 8) * 4


@pytest.mark.parametrize(
    "one, other",
    [
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, bias=False)),
        (nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3).half()),
        (nn.Linear(4, 4), nn.Linear(4, 5)),
    ],
)
def test_signatures_that_differ(one, other):
    assert signature_of(one) != signature_of(other)


def test_signatures_that_agree():
    assert signature_of(nn.Conv2d(4, 4, 3)) == signature_of(nn.Conv2d(4, 4, (3, 3)))
    with torch.device("meta"):
        on_meta = nn.ConvTranspose2d(4, 2, 3)
    assert signature_of(nn.ConvTranspose2d(4, 2, 3)) == signature_of(on_meta)


def test_a_parameter_used_twice_in_a_model_is_one_layer():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert names_of(model) == ["0"]
