"""Letterboxing and box coding."""

import math

import pytest
import torch

from model_architectures.yolo_boxes import CODINGS, decode, letterbox, to_image, to_network
from model_architectures.yolov3 import ANCHORS


@pytest.mark.parametrize("shape", [(64, 96), (30, 100), (200, 50), (1, 7), (480, 640), (96, 64), (333, 500)])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
def test_a_letterboxed_image_lies_where_its_frame_says(shape, size):
    height, width = shape
    batch, (frame,) = letterbox([torch.ones(3, *shape)], size)
    assert batch.shape == (1, 3, *size)
    x0, y0, x1, y1 = to_network(torch.tensor([[0.0, 0.0, width, height]]), frame)[0].round().int().tolist()
    white = batch.isclose(torch.ones(()))
    assert white[0, :, y0:y1, x0:x1].all() and white.sum() == 3 * (x1 - x0) * (y1 - y0)
    assert (batch[~white] == 0.5).all()
    assert x1 - x0 == size[1] or y1 - y0 == size[0], "as large as fits"
    assert abs(x0 - (size[1] - x1)) <= 1 and abs(y0 - (size[0] - y1)) <= 1, "in the middle"
    boxes = torch.rand(20, 4) * torch.tensor([width, height] * 2)
    torch.testing.assert_close(to_image(to_network(boxes, frame), frame), boxes, atol=1e-3, rtol=1e-5)
    outside = to_image(torch.tensor([[-1e3, -1e3, 1e4, 1e4]]), frame)
    assert outside.tolist() == [[0, 0, width, height]]


def test_images_of_one_size_and_of_several_come_out_alike():
    images = [torch.rand(3, 40, 80), torch.rand(3, 40, 80), torch.rand(3, 90, 30)]
    mixed, frames = letterbox(images, (64, 64))
    alike, same_frames = letterbox(images[:2], (64, 64))
    assert torch.equal(mixed[:2], alike) and frames[:2] == same_frames


@pytest.mark.parametrize("coding", CODINGS)
def test_boxes_are_decoded_as_published(coding):
    """One value at a time, by the formulas of the YOLOv3 paper and of ultralytics/yolov3."""
    output = torch.randn(2, 3 * 7, 4, 5)
    level = decode(output, ANCHORS[1], 16, coding)
    assert level.boxes.shape == (2, 3, 4, 5, 4) and level.classes.shape == (2, 3, 4, 5, 2)
    for anchor, row, column in ((0, 0, 0), (1, 2, 4), (2, 3, 1)):
        x, y, w, h, object_, *classes = output[1, 7 * anchor : 7 * anchor + 7, row, column].tolist()

        def sigmoid(value):
            return 1 / (1 + math.exp(-value))

        if coding == "exp":
            shifts, grown = (sigmoid(x), sigmoid(y)), (math.exp(w), math.exp(h))
        else:
            shifts = 2 * sigmoid(x) - 0.5, 2 * sigmoid(y) - 0.5
            grown = (2 * sigmoid(w)) ** 2, (2 * sigmoid(h)) ** 2
        centre = 16 * (column + shifts[0]), 16 * (row + shifts[1])
        half = ANCHORS[1][anchor][0] * grown[0] / 2, ANCHORS[1][anchor][1] * grown[1] / 2
        expected = [centre[0] - half[0], centre[1] - half[1], centre[0] + half[0], centre[1] + half[1]]
        assert level.boxes[1, anchor, row, column].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert level.objectness[1, anchor, row, column] == object_
        assert level.classes[1, anchor, row, column].tolist() == classes
