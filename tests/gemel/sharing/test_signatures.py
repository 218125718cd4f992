"""The layers of a model, and when two of them are interchangeable."""

import pytest
import torch
import torchvision
from pico import PicoNet
from torch import nn

from gemel.sharing.groups import find_groups
from gemel.sharing.signatures import find_layers, has_signature, is_normalisation, layer_signature, signature_of


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


class Scaled(nn.Module):
    """A layer of a user that prints none of its settings."""

    def __init__(self, factor, act=torch.relu):
        super().__init__()
        self.factor, self.act = factor, act
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return self.act(x @ self.weight * self.factor)


class Strided(nn.Conv2d):
    """A convolution of a user with a setting of its own."""

    def __init__(self, *args, pad):
        super().__init__(*args)
        self.pad = pad


def with_other_forward(layer):
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    "one, other",
    [
        (nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 4)),
        (Scaled(1.0), Scaled(5.0)),
        (Scaled(1.0), Scaled(1.0, torch.tanh)),
        (Strided(4, 4, 3, pad=0), Strided(4, 4, 3, pad=1)),
        (nn.Conv2d(4, 4, 3), with_other_forward(nn.Conv2d(4, 4, 3))),
    ],
)
def test_settings_that_are_not_printed_count(one, other):
    assert signature_of(one) != signature_of(other)


def test_a_function_that_a_program_hangs_on_a_layer_counts_only_where_it_replaces_a_method():
    plain, marked, replaced = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    marked.on_error, replaced.forward = print, print
    assert signature_of(marked) == signature_of(plain) != signature_of(replaced)


def test_marks_of_other_programs_do_not_count():
    marked, printed = nn.Linear(4, 4), signature_of(nn.Linear(4, 4))
    marked.i, marked._is_hf_initialized = 7, True
    assert (
        signature_of(marked)
        == printed
        == "Linear(in_features=4, out_features=4, bias=True): " + ("weight float32[4, 4], bias float32[4]")
    )
    assert signature_of(Scaled(1.0)) == signature_of(Scaled(1.0))


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_is_shared_by_layers_of_one_kind(norm):
    def model(stride):
        return nn.Sequential(norm(nn.Conv2d(4, 4, 3, stride=stride)))

    assert find_groups({"a_x": model(1), "b_x": model(2)}) == ()
    (*_, group) = find_groups({"a_x": model(1), "b_x": model(1)})
    assert has_signature(model(1), group.occurrences[0].layer, group.signature)
    assert not has_signature(model(2), group.occurrences[0].layer, group.signature)


def test_scripted_layers_are_left_out():
    assert find_layers(torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3)))) == []


def test_signatures_of_earlier_results_are_recognised():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    recorded, *_ = layer_signature(model, "0").split("; ")
    assert recorded != layer_signature(model, "0") and has_signature(model, "0", recorded)
