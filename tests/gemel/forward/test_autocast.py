"""Parts of float32 models in bfloat16: what they hand on is float32, and nothing of it stays behind."""

import copy

import pytest
import torch
from pico import PicoNet
from torchvision.models.detection._utils import BoxLinearCoder

from gemel.forward.autocast import IN_FLOAT32, WHOLE, Autocast
from gemel.forward.hooks import EndForward, hooked, run_until_end
from model_architectures import build

IN_BFLOAT16 = Autocast(torch.bfloat16, (WHOLE,))


def types_within(model, autocast, images, layer="conv2") -> list[torch.dtype]:
    found = []
    with autocast.within(model), hooked(model, [layer], lambda name, module, i, output: found.append(output.dtype)):
        found.append(model(images).dtype)
    return found


def test_a_classifier_computes_in_bfloat16_and_answers_in_float32():
    model, images = PicoNet(), torch.rand(2, 3, 16, 16)
    assert types_within(model, IN_FLOAT32, images) == [torch.float32] * 2
    assert types_within(model, IN_BFLOAT16, images) == [torch.bfloat16, torch.float32]
    with IN_BFLOAT16.within(model):
        copied = copy.deepcopy(model)  # such as the average of weights: it is validated in float32
        assert types_within(copied, IN_FLOAT32, images) == [torch.float32] * 2
        model(images).sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert not model._forward_hooks and not model._forward_pre_hooks and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("error", [EndForward, RuntimeError])
def test_a_pass_that_ends_in_the_middle_leaves_nothing_behind(error):
    def stop(*arguments):
        raise error

    model, images = PicoNet(), torch.rand(2, 3, 16, 16)
    try:
        with IN_BFLOAT16.within(model), hooked(model, ["conv2"], stop):
            run_until_end(model, images)
    except RuntimeError:
        pass
    assert not torch.is_autocast_enabled("cpu") and model(images).dtype == torch.float32


def test_boxes_of_a_detector_are_decoded_in_float32(monkeypatch):
    """Also its losses; what its heads compute comes from bfloat16."""
    torch.manual_seed(0)
    kwargs = {"backbone": "slim_resnet", "layers": (1, 1, 1, 1), "width": 8, "head_convs": 1, "min_size": 64}
    model = build("fcos_model", 3, **kwargs).train()
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])} for _ in images]
    seen = {}

    def note(name, module, inputs, output):
        values = output.values() if isinstance(output, dict) else [output]
        seen[name] = {value.dtype for value in values}

    inner = "head.classification_head.cls_logits"
    decoded, decode = [], BoxLinearCoder.decode

    def watched(coder, codes, boxes):
        decoded.append((codes.dtype, boxes.dtype))
        return decode(coder, codes, boxes)

    monkeypatch.setattr(BoxLinearCoder, "decode", watched)
    expected = model(images, targets)
    decoded.clear()
    with hooked(model, [inner], note), Autocast(torch.bfloat16, ("backbone", "head")).within(model):
        losses = model(images, targets)
    assert seen[inner] == {torch.bfloat16} and decoded and set(decoded) == {(torch.float32, torch.float32)}
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected[name].item(), rel=0.02), name
