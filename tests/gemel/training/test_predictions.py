"""What detectors predict at every position, and its difference from what their unmerged models predict."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from pico import PicoDetector
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from gemel.training.distillation import Teacher
from gemel.training.options import TrainingOptions
from gemel.training.predictions import Predicted, difference, heads_of, learns_by_imitation
from gemel.workload import CLASSIFICATION, DETECTION
from model_architectures import build

SIZE = 32


class Backbone(nn.Module):
    """Two levels of 32 channels."""

    def __init__(self, out_channels: int | list[int] = 32):
        super().__init__()
        self.out_channels = out_channels
        self.first, self.second = nn.Conv2d(3, 32, 3, 4, 1), nn.Conv2d(32, 32, 3, 2, 1)

    def forward(self, images):
        near = F.relu(self.first(images))
        return OrderedDict([("0", near), ("1", F.relu(self.second(near)))])


def anchors(num: int = 1) -> AnchorGenerator:
    return AnchorGenerator(((8,), (16,)), ((0.5, 1.0)[:num],) * 2)


DETECTORS = {
    "fcos": lambda: FCOS(Backbone(), 3, min_size=SIZE, max_size=2 * SIZE, anchor_generator=anchors()),
    "retinanet": lambda: RetinaNet(Backbone(), 3, min_size=SIZE, max_size=2 * SIZE, anchor_generator=anchors(2)),
    "ssd": lambda: SSD(Backbone([32, 32]), DefaultBoxGenerator([[2], [2]]), (SIZE, SIZE), 3),
    "faster rcnn": lambda: FasterRCNN(
        Backbone(), 3, min_size=(SIZE, SIZE + 8, SIZE + 16), max_size=3 * SIZE, rpn_anchor_generator=anchors(2)
    ),
    "mask rcnn": lambda: MaskRCNN(Backbone(), 3, min_size=SIZE, max_size=2 * SIZE, rpn_anchor_generator=anchors(2)),
    "yolo": lambda: build("yolov3_tiny", num_classes=3, size=SIZE),
}
each_detector = pytest.mark.parametrize("name", DETECTORS)


def detector(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = DETECTORS[name]().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def batch() -> tuple[list, list]:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0], [10.0, 8.0, 30.0, 30.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": torch.ones(2, 32, 40)} for _ in range(2)]
    return [torch.rand(3, 32, 40, generator=generator) for _ in range(2)], targets


@each_detector
def test_a_detector_equal_to_its_unmerged_model_has_no_loss_also_on_proposals_that_it_draws(name):
    model = detector(name)
    both = Teacher(model, copy.deepcopy(model).eval(), [])
    images, targets = batch()
    for _ in range(2):
        torch.manual_seed(1)
        losses = both.losses(images, model(images, targets))
        assert losses["predictions"].item() == pytest.approx(0.0, abs=1e-5)
    both.close()


@each_detector
def test_steps_on_it_bring_what_is_predicted_nearer_and_every_trained_layer_has_a_gradient(name):
    model, teacher = detector(name), detector(name).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():  # a fresh RetinaNet is as sure that there is nothing as any other
            parameter.add_(0.1 * torch.randn(parameter.shape))
    both = Teacher(model, teacher, [])
    images, targets = batch()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    found = []
    for _ in range(12):
        loss = both.losses(images, model(images, targets))["predictions"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < found[0]
    untouched = {n for n, p in model.named_parameters() if p.grad is None and "mask" not in n}
    assert not untouched and all(p.grad is None for p in teacher.parameters())
    both.close()


def test_a_pass_of_the_unmerged_model_ends_behind_the_heads_and_leaves_no_hook():
    model = detector("fcos")
    teacher = copy.deepcopy(model).eval()
    both, called = Teacher(model, teacher, []), []
    teacher.postprocess_detections = lambda *given: called.append(given)
    images, targets = batch()
    both.losses(images, model(images, targets))
    assert not called and not both.predictions.own
    both.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for one in (model, teacher) for m in one.modules())


@pytest.mark.parametrize("sizes, num_passes", [((SIZE,), 1), ((2 * SIZE, SIZE), 2)])
def test_where_its_detections_serve_as_labels_it_runs_again_only_on_images_of_another_size(sizes, num_passes):
    model = detector("fcos")
    teacher, (images, targets) = copy.deepcopy(model).eval(), batch()
    model.transform.min_size, passes = sizes[:1], []  # of the last one the unmerged model takes its images
    both = Teacher(model, teacher, [])
    teacher.backbone.register_forward_hook(lambda *given: passes.append(1))
    assert {"boxes", "labels"} == set(both.detections(images)[0])
    losses = both.losses(images, model(images, targets))
    assert losses["predictions"].item() == pytest.approx(0.0, abs=1e-5) and len(passes) == num_passes
    both.close()


def test_what_it_predicts_for_proposals_of_its_own_is_not_compared():
    model = detector("faster rcnn")
    both = Teacher(model, copy.deepcopy(model).eval(), [])
    both.detections(batch()[0])
    assert set(both.predictions.taught) == {"rpn.head"}
    both.close()


def test_only_kinds_that_were_measured_learn_by_imitation_alone():
    assert [name for name in DETECTORS if learns_by_imitation(detector(name))] == ["fcos"]


def test_detectors_of_other_kinds_are_compared_by_their_features():
    assert heads_of(PicoDetector()) == {}
    model = PicoDetector().train()
    both = Teacher(model, copy.deepcopy(model).eval(), ["conv1"])
    images = [torch.rand(3, 16, 16) for _ in range(2)]
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    assert set(both.losses(images, model(images, targets))) == {"features"}


def test_scores_count_everywhere_and_boxes_where_an_object_is_expected():
    scores = torch.tensor([[8.0, -8.0], [-8.0, -8.0]])
    taught = Predicted(scores, torch.zeros(2, 4), torch.zeros(2, 1))
    certain = scores.sigmoid().max(1).values
    moved = taught._replace(boxes=torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0]]))
    assert difference(moved, taught).item() == pytest.approx(((certain * torch.tensor([1.0, 9.0])).sum()).item())
    assert difference(taught._replace(scores=-scores), taught).item() > 20
    assert difference(taught, taught).item() == pytest.approx(0, abs=1e-6)


def test_of_boxes_of_each_class_those_of_the_likeliest_object_count():
    scores = torch.tensor([[0.0, 0.0, 9.0]])
    taught = Predicted(scores, torch.zeros(1, 3, 4), is_softmax=True)
    others, likeliest = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    others[:, :2], likeliest[:, 2] = 5.0, 5.0
    assert difference(taught._replace(boxes=others), taught).item() == pytest.approx(0, abs=1e-6)
    assert difference(taught._replace(boxes=likeliest), taught).item() == pytest.approx(5.0, rel=1e-2)


def test_the_weights_of_an_imitation_leave_labels_and_features_out(tasks):
    options = TrainingOptions(label_weight=0.0, feature_weight=0.0, probability_weight=1.0)
    task = tasks["east_pico"]
    assert options.imitates and not TrainingOptions(probability_weight=1.0).imitates
    for labels in (True, False):
        task = replace(task, reading=replace(task.reading, labels=labels))
        assert [options.weight_of(loss, task) for loss in ("predictions", "loss_box", "features")] == [1.0, 0.0, 0.0]
    kinds = {task.kind: task for task in tasks.values()}
    assert options.private_rate([kinds[DETECTION]]) == options.private_learning_rate
    labelled = TrainingOptions()
    assert labelled.private_rate([kinds[DETECTION]]) == labelled.detection_private_learning_rate
    assert labelled.private_rate([kinds[CLASSIFICATION]]) == labelled.private_learning_rate
