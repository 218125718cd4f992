"""Hooks are removed whatever happens, belong to one model alone, and can end a forward pass."""

import copy

import pytest
import torch
from pico import PicoNet
from torch import nn

from gemel.forward.hooks import EndForward, hooked, run_until_end

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_hook_gets_name_layer_inputs_and_output_in_the_order_of_the_calls():
    model, calls = PicoNet().eval(), []
    with hooked(model, ["fc", "conv1"], lambda *call: calls.append(call)):
        output = model(IMAGES)
    assert [call[0] for call in calls] == ["conv1", "fc"]
    name, layer, (images,), _ = calls[0]
    assert layer is model.conv1 and images is IMAGES and calls[1][3] is output
    assert num_hooks(model) == 0


def test_a_hook_before_a_layer_gets_its_inputs_and_the_empty_name_is_the_model():
    model, calls = PicoNet().eval(), []
    with hooked(model, ["", "conv2"], lambda name, layer, inputs: calls.append((name, len(inputs[0]))), before=True):
        model(IMAGES)
    assert calls == [("", 2), ("conv2", 2)]


def test_what_a_hook_returns_replaces_the_value():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with hooked(model, ["0"], lambda name, layer, inputs, output: output + 1):
        assert model(torch.zeros(1)).item() == 1
    with hooked(model, ["0"], lambda name, layer, inputs: (inputs[0] + 2,), before=True):
        assert model(torch.zeros(1)).item() == 2


def test_an_output_is_seen_before_a_relu_changes_it_in_place():
    model, least = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), []
    with hooked(model, ["0"], lambda name, layer, inputs, output: least.append(output.min().item())):
        model(IMAGES)
    assert least[0] < 0


def test_hooks_are_removed_after_an_error_and_after_a_wrong_name():
    model = PicoNet()
    with pytest.raises(RuntimeError, match="size"), hooked(model, ["conv1"], lambda *call: None):
        model(torch.rand(2, 5, 8, 8))
    with pytest.raises(AttributeError), hooked(model, ["conv1", "nothing"], lambda *call: None):
        pass
    assert num_hooks(model) == 0


def test_a_copy_of_the_model_is_not_watched():
    """As the average of a model's weights, which is a copy made while the hooks are there."""
    model, calls = PicoNet().eval(), []
    with hooked(model, ["conv1"], lambda *call: calls.append(call)):
        copy.deepcopy(model)(IMAGES)
        assert not calls
        model(IMAGES)
    assert len(calls) == 1


class Tolerant(nn.Module):
    """Catches whatever its layer raises."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, images):
        try:
            images = self.first(images)
        except Exception:
            images = images * 0
        return self.second(images)


def test_a_hook_ends_the_pass_although_the_model_catches_exceptions():
    model, called = Tolerant(), []

    def end(name, layer, inputs, output):
        raise EndForward

    with hooked(model, ["second"], lambda name, *_: called.append(name)):
        with hooked(model, ["first"], end):
            assert run_until_end(model, IMAGES) is None
        assert called == []
        assert run_until_end(model, IMAGES) is IMAGES and called == ["second"]
