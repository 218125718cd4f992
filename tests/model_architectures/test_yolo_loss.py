"""The assignment of anchors, and the losses written out."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from model_architectures import build
from model_architectures.yolo_boxes import Level
from model_architectures.yolo_loss import IGNORE_IOU, MATCH_IOU, match, yolo_losses
from model_architectures.yolov3 import ANCHORS

SMALL = {"width": 1 / 16, "size": 64, "score_thresh": 0.0}
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def small(name="yolov3_tiny", num_classes=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build(name, num_classes, **{**SMALL, **kwargs})


def iou_of_shapes(box, anchor):
    width, height = box[2] - box[0], box[3] - box[1]
    common = min(width, anchor[0]) * min(height, anchor[1])
    return common / (width * height + anchor[0] * anchor[1] - common)


def test_the_best_anchor_answers_and_others_of_a_good_shape():
    corner = torch.rand(60, 2) * 200
    boxes = torch.cat([corner, corner + 2 + torch.rand(60, 2) ** 2 * 300], 1)
    anchors = [anchor for level in ANCHORS for anchor in level]
    expected = set()
    for i, box in enumerate(boxes.tolist()):
        ious = [iou_of_shapes(box, anchor) for anchor in anchors]
        expected |= {(i, k) for k, iou in enumerate(ious) if iou > MATCH_IOU or iou == max(ious)}
    found = match(boxes, torch.tensor(anchors, dtype=torch.float32))
    assert set(zip(*(part.tolist() for part in found), strict=True)) == expected
    assert {i for i, _ in expected} == set(range(60)) and len(expected) > 60


def one_level(rows=4, columns=6, classes=2, images=1):
    """A head that says nothing: every box is tiny and far away, every logit 0."""
    boxes = torch.tensor([900.0, 900.0, 901.0, 901.0]).repeat(images, 2, rows, columns, 1)
    objectness, names = torch.zeros(images, 2, rows, columns), torch.zeros(images, 2, rows, columns, classes)
    return Level(boxes, objectness, names, torch.tensor([[16.0, 16.0], [200.0, 200.0]]), 16)


def test_perfect_outputs_have_no_loss():
    level, box = one_level(), torch.tensor([[34.0, 18.0, 50.0, 34.0]])  # its centre is in row 1, column 2
    level.boxes[0, 0, 1, 2] = box[0]
    level.objectness.fill_(-30.0)[0, 0, 1, 2] = 30.0
    level.classes[0, 0, 1, 2] = torch.tensor([-30.0, 30.0])
    losses = yolo_losses([level], [box], [torch.tensor([1])])
    assert all(float(value) < 1e-5 for value in losses.values())
    wrong = yolo_losses([level], [box], [torch.tensor([0])])
    assert wrong["loss_classifier"] == pytest.approx(60, rel=1e-3) and float(wrong["loss_objectness"]) < 1e-5
    elsewhere = yolo_losses([level], [box + 16], [torch.tensor([1])])
    assert float(elsewhere["loss_box_reg"]) > 1 and float(elsewhere["loss_objectness"]) > 29


def test_losses_are_those_of_the_paper_written_out():
    """Objectness: every anchor counts but those that see an object well enough; one that answers always counts."""
    level, box = one_level(), torch.tensor([[34.0, 18.0, 50.0, 34.0]])
    near = box[0] + torch.tensor([0.0, 0.0, 3.0, 0.0])
    level.boxes[0, 1, 3, 5] = near  # another anchor, another cell
    level.boxes[0, 0, 0, 0] = box[0] + torch.tensor([0.0, 0.0, 30.0, 0.0])  # not near enough
    assert box_iou(near[None], box) > IGNORE_IOU > box_iou(level.boxes[0, 0, 0, 0][None], box)
    losses = yolo_losses([level], [box], [torch.tensor([0])])
    assert losses["loss_objectness"] == pytest.approx((48 - 1) * math.log(2), rel=1e-5)
    assert losses["loss_classifier"] == pytest.approx(2 * math.log(2), rel=1e-5)
    again = yolo_losses([level], [box.repeat(2, 1)], [torch.tensor([0, 0])])  # a mean over anchors that answer
    assert again["loss_classifier"] == pytest.approx(2 * math.log(2), rel=1e-5)


def test_images_do_not_see_each_others_objects():
    level = one_level(images=2)
    box = torch.tensor([[34.0, 18.0, 50.0, 34.0]])
    level.boxes[:, 1, 3, 5] = box[0]  # only in the second image it is right to see an object there
    level.objectness.requires_grad_()
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    yolo_losses([level], [none[0], box], [none[1], torch.tensor([0])])["loss_objectness"].backward()
    grad = level.objectness.grad
    assert grad[0, 1, 3, 5] > 0 and grad[1, 1, 3, 5] == 0
    assert grad[0, 0, 1, 2] > 0 and grad[1, 0, 1, 2] < 0


def test_a_batch_without_objects_trains():
    model = small()
    losses = model([torch.rand(3, 64, 64)] * 2, [NOTHING] * 2)
    assert losses["loss_box_reg"] == losses["loss_classifier"] == 0 < losses["loss_objectness"]
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.network.heads[0].output[-1].bias.grad.any()
