"""Letterboxing of images for a YOLO network, the way back for boxes, and the decoding of the network's outputs.

Network coordinates are pixels of the network's input. Box coding "exp" is that of Darknet (Redmon and Farhadi,
"YOLOv3", 2018, section 2.1), "sigmoid" that of later PyTorch implementations (ultralytics/yolov5, and yolov3 from
version 9 on).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = 0.5  # the border of a letterboxed image, as in Darknet
MAX_EXPONENT = math.log(1000)  # a side of a box is at most 1000 times that of its anchor


class Frame(NamedTuple):
    """Where an image lies in the network's input."""

    height: int  # of the image
    width: int
    scale: tuple[float, float]  # pixels of the input per pixel of the image, along x and y
    offset: tuple[int, int]  # of the image's top left corner in the input, along x and y


class Level(NamedTuple):
    """The decoded outputs of one head for a batch."""

    boxes: Tensor  # [N, anchors, rows, columns, 4], XYXY
    objectness: Tensor  # [N, anchors, rows, columns], logits
    classes: Tensor  # [N, anchors, rows, columns, classes], logits
    anchors: Tensor  # [anchors, 2], width and height
    stride: int


# ---- letterbox ---------------------------------------------------------------------------------------------


def letterbox(images: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, list[Frame]]:
    """Images [3, H, W] of any sizes as one batch [N, 3, *size]: scaled to fit, centred, with a grey border."""
    if len({image.shape for image in images}) == 1:  # the usual case: scaled as one batch
        frame = _frame(images[0], size)
        return _framed(torch.stack(list(images)), frame, size), [frame] * len(images)
    frames = [_frame(image, size) for image in images]
    return torch.cat([_framed(image[None], frame, size) for image, frame in zip(images, frames, strict=True)]), frames


def _frame(image: Tensor, size: tuple[int, int]) -> Frame:
    height, width = image.shape[-2:]
    scale = min(size[0] / height, size[1] / width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    offset = (size[1] - columns) // 2, (size[0] - rows) // 2
    return Frame(height, width, (columns / width, rows / height), offset)


def _framed(images: Tensor, frame: Frame, size: tuple[int, int]) -> Tensor:
    shape = round(frame.height * frame.scale[1]), round(frame.width * frame.scale[0])
    if shape != tuple(images.shape[-2:]):
        images = F.interpolate(images, size=shape, mode="bilinear", align_corners=False)
    if shape == tuple(size):
        return images
    left, top = frame.offset
    return F.pad(images, (left, size[1] - shape[1] - left, top, size[0] - shape[0] - top), value=GREY)


def to_network(boxes: Tensor, frame: Frame) -> Tensor:
    """XYXY boxes [n, 4] in pixels of the image -> in pixels of the network's input."""
    return boxes * boxes.new_tensor(frame.scale * 2) + boxes.new_tensor(frame.offset * 2)


def to_image(boxes: Tensor, frame: Frame) -> Tensor:
    """XYXY boxes [n, 4] in pixels of the network's input -> in pixels of the image, clipped to it."""
    boxes = (boxes - boxes.new_tensor(frame.offset * 2)) / boxes.new_tensor(frame.scale * 2)
    return boxes.clamp_min(0).minimum(boxes.new_tensor((frame.width, frame.height) * 2))


# ---- coding ------------------------------------------------------------------------------------------------


def decode(output: Tensor, anchors: Sequence[tuple[float, float]], stride: int, coding: str) -> Level:
    """Decodes the output [N, anchors x (5 + classes), rows, columns] of a head.

    Its channels are, per anchor: x, y, width, height, objectness, classes. anchors: (width, height) in pixels of the
    network's input. coding: one of CODINGS.
    """
    sizes = output.new_tensor(anchors)
    values = output.unflatten(1, (len(sizes), -1)).permute(0, 1, 3, 4, 2)
    rows, columns = values.shape[2:4]
    cells = torch.stack(
        torch.meshgrid(
            torch.arange(columns, device=output.device), torch.arange(rows, device=output.device), indexing="xy"
        ),
        -1,
    ).to(output.dtype)
    shift, grown = CODINGS[coding](values[..., :4])
    centre, half = (cells + shift) * stride, sizes[:, None, None] * grown / 2
    return Level(torch.cat([centre - half, centre + half], -1), values[..., 4], values[..., 5:], sizes, stride)


def _exp(values: Tensor) -> tuple[Tensor, Tensor]:
    return values[..., :2].sigmoid(), values[..., 2:].clamp(max=MAX_EXPONENT).exp()


def _sigmoid(values: Tensor) -> tuple[Tensor, Tensor]:
    values = 2 * values.sigmoid()
    return values[..., :2] - 0.5, values[..., 2:].square()


# values [..., 4] -> (position of the centre within its cell, size as a multiple of the anchor)
CODINGS = {"exp": _exp, "sigmoid": _sigmoid}
