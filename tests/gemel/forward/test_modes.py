"""Modes and layouts of models, and where their batches go."""

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.forward.batches import run, to_device
from gemel.forward.modes import device_of, evaluating, evaluation_mode, logits_of, to_channels_last

CPU = torch.device("cpu")


@pytest.fixture
def model():
    """Its first normalisation is in eval mode, the rest in train mode."""
    model = PicoNet().train()
    model.bn1.eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("enter", [evaluating, evaluation_mode])
def test_every_module_gets_its_own_mode_back(model, enter):
    before = modes(model)
    with enter(model):
        assert not any(modes(model))
        assert torch.is_inference_mode_enabled() == (enter is evaluation_mode)
    assert modes(model) == before and len(set(before)) == 2
    with pytest.raises(ValueError), enter(model):
        raise ValueError
    assert modes(model) == before and not torch.is_inference_mode_enabled()


def test_a_batch_runs_in_eval_mode_without_gradients(model):
    before, statistics = modes(model), model.bn1.running_mean.clone()
    output = run(model, torch.rand(2, 3, 16, 16))
    assert not output.requires_grad and torch.is_grad_enabled()
    assert modes(model) == before and torch.equal(model.bn1.running_mean, statistics)
    assert len(run(PicoDetector(), (torch.rand(3, 16, 16), torch.rand(3, 16, 16)))) == 2


def test_images_of_a_detector_come_as_a_list():
    images = torch.rand(2, 3, 4, 4)
    assert torch.is_tensor(to_device(images, CPU))
    moved = to_device(tuple(images), CPU)
    assert isinstance(moved, list) and all(torch.equal(a, b) for a, b in zip(moved, images, strict=True))
    assert to_device(images, torch.device("meta")).is_meta


def test_the_device_of_a_model():
    assert device_of(PicoNet()) == CPU == device_of(nn.ReLU())
    with torch.device("meta"):
        assert device_of(PicoNet()).type == "meta"


def test_channels_last_is_for_cpus():
    model = PicoNet()
    assert to_channels_last(model, torch.device("meta")) is model and model.conv2.weight.is_contiguous()
    assert to_channels_last(model, CPU) is model
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_logits_are_the_output_or_a_part_of_it():
    class Output:
        logits = torch.ones(1)

    assert logits_of(Output()) is Output.logits
    assert logits_of(Output.logits) is Output.logits and logits_of(None) is None
