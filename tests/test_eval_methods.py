"""The eval methods: accuracy per image, modes, what cannot be evaluated."""

from types import SimpleNamespace

import pytest
import torch
from eval_samples import Fixed, detector_loader, output, scenes, target
from pico import PicoNet
from torch import nn

from eval_methods import (
    classification_eval,
    classification_eval_per_class,
    frcnn_eval,
    yolo_eval,
)
from gemel.forward.modes import evaluation_mode


def test_map_does_not_depend_on_batches_or_image_ids():
    targets, outputs = scenes(20)
    whole = frcnn_eval(Fixed(outputs), detector_loader(targets, batch_size=20))
    assert whole == frcnn_eval(Fixed(outputs), detector_loader(targets, batch_size=3))
    renamed = [{**t, "image_id": i} for i, t in enumerate(targets)]  # above, all images had the same id
    assert whole == frcnn_eval(Fixed(outputs), detector_loader(renamed))


def test_map_is_class_aware():
    box = [[10, 10, 50, 60]]
    targets = [target(box, [1]), target(box, [2])]
    assert frcnn_eval(Fixed([output(box, [1], [0.9]), output(box, [2], [0.9])]), detector_loader(targets)) > 1 - 1e-9
    assert frcnn_eval(Fixed([output(box, [2], [0.9]), output(box, [1], [0.9])]), detector_loader(targets)) == 0.0


def test_detections_of_a_class_without_ground_truth_do_not_count():
    box = [[10, 10, 50, 60]]
    found = output(box * 2, [3, 1], [0.99, 0.5])
    assert frcnn_eval(Fixed([found]), detector_loader([target(box, [1])])) > 1 - 1e-9


def test_nothing_detected_is_zero():
    assert frcnn_eval(Fixed([output(), output()]), detector_loader([target([[1, 1, 9, 9]], [1]), target()])) == 0.0


@pytest.mark.parametrize(
    "targets",
    [
        [target(), target()],
        [target([[1, 1, 9, 9]], [1], iscrowd=torch.tensor([1]))],
    ],
    ids=["no boxes", "crowds only"],
)
def test_map_without_ground_truth_raises(targets):
    found = [output([[1, 1, 9, 9]], [1], [0.9])] * len(targets)
    with pytest.raises(ValueError, match="no object in any image; allowed: at least one"):
        frcnn_eval(Fixed(found), detector_loader(targets))


@pytest.mark.parametrize("method", [classification_eval, frcnn_eval, yolo_eval])
def test_an_empty_loader_raises(method):
    with pytest.raises(ValueError, match="without images"):
        method.per_class(Fixed([]), [])
    with pytest.raises(ValueError, match=f"{method.__name__}: got a loader without images"):
        method(Fixed([]), [])


def classifier_loader(labels, batch_size):
    labels = torch.tensor(labels)
    return [(torch.zeros(len(part), 3, 4, 4), part) for part in labels.split(batch_size)]


def test_top1_counts_images_not_batches():
    logits = [torch.nn.functional.one_hot(torch.tensor(c), 3).float() for c in (0, 1, 2, 1, 0)]
    loader = classifier_loader([0, 1, 2, 2, 2], batch_size=3)  # 3 of 3 and 0 of 2: the mean of batches would be 0.5
    assert classification_eval(Fixed(logits, batched=True), loader) == pytest.approx(0.6)


def test_top1_per_class():
    logits = [torch.nn.functional.one_hot(torch.tensor(c), 4).float() for c in (0, 1, 2, 3, 0)]
    logits[0] = logits[0] * float("nan")
    loader = classifier_loader([0, 1, 2, 2, 0], batch_size=3)
    expected = {0: {"top1": 0.5, "images": 2}, 1: {"top1": 1.0, "images": 1}, 2: {"top1": 0.5, "images": 2}}
    assert classification_eval_per_class(Fixed(logits, batched=True), loader) == expected
    assert classification_eval.per_class is classification_eval_per_class
    whole = classification_eval(Fixed(logits, batched=True), loader)
    assert whole == sum(v["top1"] * v["images"] for v in expected.values()) / 5


def test_top1_takes_logits_and_counts_nan_as_wrong():
    logits = torch.tensor([[5.0, 1.0], [float("nan"), 1.0]])

    class Wrapped(nn.Module):
        def forward(self, images):
            return SimpleNamespace(logits=logits)

    assert classification_eval(Wrapped(), classifier_loader([0, 0], 2)) == 0.5


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_restored_one_by_one(training):
    model = PicoNet().train(training)
    model.bn1.train(not training)
    before = [module.training for module in model.modules()]
    classification_eval(model, classifier_loader([0, 1], 2))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("kind", ["classification", "detection"])
def test_evaluation_is_in_eval_and_inference_mode(kind):
    if kind == "classification":
        model = Fixed([torch.tensor([1.0, 0.0])] * 2, batched=True).train()
        classification_eval(model, classifier_loader([0, 1], 1))
    else:
        model = Fixed([output()] * 2).train()
        frcnn_eval(model, detector_loader([target([[1, 1, 9, 9]], [1])] * 2, 1))
    assert model.calls == [(False, True, False)] * 2
    assert model.weight.grad is None and model.training


def test_a_detector_trains_after_it_was_evaluated(tiny_fcos):
    loader = detector_loader([target([[20, 20, 120, 120]], [1])] * 2, 2)
    frcnn_eval(tiny_fcos, loader)
    losses = tiny_fcos.train()(*loader[0])
    sum(losses.values()).backward()  # nothing that inference mode made is kept inside the model
    assert all(parameter.grad is not None for parameter in tiny_fcos.parameters())


@pytest.fixture
def tiny_fcos():
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU())
    backbone.out_channels = 32
    backbone.append(nn.Conv2d(8, 32, 1))
    anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    return FCOS(backbone, 3, anchor_generator=anchors, min_size=64, max_size=64)
