"""Models whose weights have 16 bits: on a CPU they compute what float32 models with the same values compute."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

from gemel.forward import arithmetic
from gemel.forward.arithmetic import arithmetic_on, run_with_weights_of
from gemel.sharing.precision import as_stored, round_weights, weights_of


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

    def forward(self, images):
        return self.norm(self.lstm(images.mean(1))[0][:, -1])


BUILDERS = {
    "resnet": lambda: torchvision.models.resnet18(num_classes=3),
    "transformer": lambda: torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3),
    "recurrent": Recurrent,
    "detector": lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ),
}


@pytest.mark.parametrize("name", list(BUILDERS))
def test_on_a_cpu_answers_are_those_of_float32_with_the_rounded_weights(name):
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    images = [torch.rand(3, 16, 16)] if name == "detector" else torch.rand(2, 3, 16, 16)
    stored = as_stored(model, torch.float16)
    assert {p.dtype for p in weights_of(stored)} == {torch.float16}
    round_weights([model], torch.float16)
    with torch.inference_mode():
        expected, got = tree_leaves(model(images)), tree_leaves(stored(images))
    assert len(expected) == len(got) and all(map(torch.equal, expected, got))


def test_a_failure_within_the_model_leaves_nothing_behind():
    model = as_stored(nn.Sequential(nn.Linear(4, 4)), torch.float16)
    with pytest.raises(RuntimeError):
        model(torch.rand(2, 5))
    plain = torch.rand(2, dtype=torch.float16)
    assert (plain + plain).dtype == torch.float16 and not arithmetic._entered()
    assert model(torch.rand(2, 4)).dtype == torch.float32


def test_copies_run_as_well_and_float32_takes_the_hooks_off():
    model = as_stored(nn.Sequential(nn.Linear(4, 4)), torch.bfloat16)
    copied = copy.deepcopy(model)
    images = torch.rand(2, 4)
    assert torch.equal(copied(images), model(images))
    run_with_weights_of(copied.float(), torch.float32)
    assert not copied._forward_pre_hooks and not copied._forward_hooks
    assert torch.equal(copied(images), model(images))


def test_under_autocast_answers_are_float32_and_near(monkeypatch):
    """What runs on a CUDA device, here on the CPU, which has autocast as well."""
    monkeypatch.setattr(arithmetic, "computes_in_16_bits", lambda device_type: True)
    assert arithmetic_on("cpu", "bfloat16") == "bfloat16"
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    stored = as_stored(model, torch.bfloat16)
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected, got = model(images), stored(images)
    assert got.dtype == torch.float32 and not torch.equal(expected, got)
    assert (expected - got).abs().max() < 0.1 * expected.abs().max()
