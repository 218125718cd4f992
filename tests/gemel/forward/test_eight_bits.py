"""Models with weights in 8 bits answer, bit by bit, as with the same weights in float32."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from gemel.forward.arithmetic import run_with_weights_of
from gemel.forward.eight_bits import SCALE, with_scale
from gemel.sharing.precision import round_weights
from gemel.sharing.quantisation import quantise, quantised_weights


class Reads(nn.Module):
    """Reads the weight of its layer by itself, in several ways."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        assert self.layer.weight.dtype == torch.float32 and self.layer.weight.shape == (12, 12)
        return x @ self.layer.weight.T + torch.stack([self.layer.weight, self.layer.weight])[0].mean() + self.layer(x)


def vit() -> nn.Module:

    return VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=4)


def swin() -> nn.Module:

    return SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=4)


CASES = {
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)), 3),
    "attention": (vit, 3),
    "windows": (swin, 3),
    "encoder": (lambda: nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 0),
    "reads": (Reads, 0),
}


@pytest.mark.parametrize(("make", "channels"), CASES.values(), ids=CASES)
def test_answers_are_those_of_float32(make, channels):
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    round_weights([model], torch.int8)
    small, weights = copy.deepcopy(model), []
    for module in small.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and any(parameter is w for w in quantised_weights(small)):
                weights.append((module, name, parameter))
    for module, name, parameter in weights:
        module._parameters[name] = with_scale(*quantise(parameter))
    assert weights and all(hasattr(p, SCALE) == (p.dtype == torch.int8) for p in small.parameters())
    run_with_weights_of(small, torch.int8)
    images = torch.randn(2, channels, 32, 32) if channels else torch.randn(2, 4, 12)
    with torch.inference_mode():
        assert torch.equal(small(images), model(images))
        assert torch.equal(small(images), model(images)), "and again"
    assert {p.dtype for p in (m._parameters[n] for m, n, _ in weights)} == {torch.int8}


def test_a_pass_that_fails_leaves_nothing_behind():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    attention.in_proj_weight = with_scale(*quantise(attention.in_proj_weight))
    run_with_weights_of(attention, torch.int8)
    for _ in range(2):
        with pytest.raises((RuntimeError, AssertionError)):
            attention(*[torch.rand(2, 3, 5)] * 3)
    assert attention.in_proj_weight.dtype == torch.int8
    with torch.inference_mode():
        answer, _ = attention(*[torch.rand(2, 3, 16)] * 3)
    assert answer.shape == (2, 3, 16) and torch.rand(2, dtype=torch.float64).float().dtype == torch.float32
