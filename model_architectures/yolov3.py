"""YOLOv3 and YOLOv3-tiny as detectors with the inputs and outputs of torchvision's (see detectors.py).

Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018. Images of any size are letterboxed inside the model.
Its submodule `network` maps a tensor to tensors without control flow, so that its channels can be traced and aligned.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from model_architectures.darknet import ACTIVATIONS, ConvUnit, Network, full_network, tiny_network
from model_architectures.registry import register
from model_architectures.yolo_boxes import CODINGS, Frame, Level, decode, letterbox, to_image, to_network
from model_architectures.yolo_loss import yolo_losses

# (width, height) in pixels of the network's input, per head, the finest first; from the published cfg files.
ANCHORS = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326)))
TINY_ANCHORS = (((10, 14), (23, 27), (37, 58)), ((81, 82), (135, 169), (344, 319)))
COARSEST_STRIDE = 32
OBJECT_PRIOR = 0.01  # initial objectness: Lin et al., "Focal Loss", ICCV 2017, section 4.1


class Settings(NamedTuple):
    """How a detector decodes and filters the outputs of its network."""

    size: tuple[int, int]  # height and width of the network's input
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    box_coding: str
    score_thresh: float
    nms_thresh: float
    detections_per_img: int
    topk_candidates: int


class YOLOv3(nn.Module):
    """A detector with the interface of torchvision's; built by yolov3() and yolov3_tiny()."""

    def __init__(self, network: Network, num_classes: int, settings: Settings):
        super().__init__()
        self.network = network
        self.num_classes = num_classes  # with the background, as in torchvision; the network has no output for it
        self.settings = settings

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict] | None = None) -> Any:
        """Losses by name in training mode, else one {"boxes", "labels", "scores"} per image, in pixels of the image."""
        batch, frames = letterbox(images, self.settings.size)
        if not self.training:
            levels = self._levels(batch)
            return [self._detections(levels, index, frame) for index, frame in enumerate(frames)]
        boxes, labels = self._checked(targets, len(frames))
        boxes = [to_network(own, frame) for own, frame in zip(boxes, frames, strict=True)]
        return yolo_losses(self._levels(batch), boxes, [own - 1 for own in labels])

    def _levels(self, batch: Tensor) -> list[Level]:
        """The decoded outputs of every head, the finest first."""
        height = batch.shape[-2]
        return [
            decode(output, anchors, height // output.shape[-2], self.settings.box_coding)
            for output, anchors in zip(self.network(batch), self.settings.anchors, strict=True)
        ]

    def _checked(self, targets: Sequence[dict] | None, num_images: int) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes and labels per image. Raises ValueError on wrong targets, boxes without an area among them."""
        if targets is None or len(targets) != num_images:
            got = "none" if targets is None else len(targets)
            raise ValueError(f"YOLOv3: targets: got {got} for {num_images} images in training; allowed: one per image")
        boxes = [target["boxes"].as_subclass(Tensor).reshape(-1, 4).float() for target in targets]
        labels = [target["labels"].reshape(-1) for target in targets]
        every, numbers = torch.cat(boxes), torch.cat(labels)
        if not bool((every[:, 2:] > every[:, :2]).all()):
            raise ValueError("YOLOv3: targets: got a box without width or height; allowed: XYXY with x0 < x1, y0 < y1")
        if len(wrong := numbers[(numbers < 1) | (numbers >= self.num_classes)]):
            allowed = f"1 to {self.num_classes - 1}; 0 is the background, so 'background_class' must be True"
            raise ValueError(f"YOLOv3: targets: got the label {int(wrong[0])}; allowed: {allowed}")
        return boxes, labels

    def _detections(self, levels: Sequence[Level], index: int, frame: Frame) -> dict[str, Tensor]:
        """The (box, class) pairs above the score threshold after suppression per class, the highest score first."""
        settings = self.settings
        boxes = torch.cat([level.boxes[index].flatten(0, 2) for level in levels]).float()
        objectness = torch.cat([level.objectness[index].flatten() for level in levels]).float().sigmoid()
        classes = torch.cat([level.classes[index].flatten(0, 2) for level in levels]).float().sigmoid()
        scores = (objectness[:, None] * classes).flatten()
        candidates = (scores > settings.score_thresh).nonzero()[:, 0]
        scores, best = scores[candidates].topk(min(len(candidates), settings.topk_candidates))
        places, labels = candidates[best] // classes.shape[1], candidates[best] % classes.shape[1] + 1
        boxes = to_image(boxes[places], frame)
        keep = batched_nms(boxes, scores, labels, settings.nms_thresh)[: settings.detections_per_img]
        return {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}


# ---- builders ----------------------------------------------------------------------------------------------


@register("yolov3")
def yolov3(num_classes: int, size: int | Sequence[int] = 416, anchors: Sequence = ANCHORS, **kwargs: Any) -> YOLOv3:
    """YOLOv3: Darknet-53 and heads of strides 8, 16 and 32.

    num_classes: with the background as class 0, as for every detector here, although the network has no output for it:
    81 for the published weights (80 classes); labels begin at 1.
    size: height and width of the network's input in pixels, or one number for both; multiples of 32.
    anchors: per head, the finest first, (width, height) pairs in pixels of the network's input.
    kwargs: `width` scales the channels of all layers (default 1.0). `activation` ("leaky_relu", "silu"), `norm_eps`
    (1e-5) and `box_coding` ("exp", "sigmoid") must be those that the weights were trained with; for ultralytics/yolov3
    from version 9.1 on "silu", 1e-3, "sigmoid". `score_thresh` (0.01); `nms_thresh` (0.45) of the suppression, which is
    done per class; at most `topk_candidates` (1000) boxes before and `detections_per_img` (100) after it.
    Raises ValueError naming every argument that is wrong.
    """
    return _detector("yolov3", full_network, num_classes, size, anchors, kwargs)


@register("yolov3_tiny")
def yolov3_tiny(
    num_classes: int, size: int | Sequence[int] = 416, anchors: Sequence = TINY_ANCHORS, **kwargs: Any
) -> YOLOv3:
    """YOLOv3-tiny: seven convolutions and heads of strides 16 and 32; arguments as for yolov3().

    The published yolov3-tiny.weights were trained with other anchors for the finer head than the cfg file states now:
    (23, 27), (37, 58), (81, 82).
    """
    return _detector("yolov3_tiny", tiny_network, num_classes, size, anchors, kwargs)


class _Options(NamedTuple):
    width: float = 1.0
    activation: str = "leaky_relu"
    norm_eps: float = 1e-5
    box_coding: str = "exp"
    score_thresh: float = 0.01
    nms_thresh: float = 0.45
    detections_per_img: int = 100
    topk_candidates: int = 1000


def _detector(
    name: str, network: Callable[..., Network], num_classes: int, size: Any, anchors: Any, kwargs: dict[str, Any]
) -> YOLOv3:
    """Checks the arguments of a builder and builds the detector."""
    size = [size, size] if isinstance(size, int) else size
    problems = _problems(num_classes, size, anchors, 3 if network is full_network else 2, kwargs)
    if problems:
        raise ValueError("\n".join(f"{name}: {problem}" for problem in problems))
    options = _Options(**kwargs)
    anchors = tuple(tuple((float(width), float(height)) for width, height in level) for level in anchors)
    unit = partial(ConvUnit, activation=options.activation, eps=options.norm_eps)
    num_outputs = [len(level) * (5 + num_classes - 1) for level in anchors]
    made = network(unit, lambda channels: max(1, round(options.width * channels)), num_outputs)
    heads: list[Any] = list(made.heads)
    for head, level in zip(heads, reversed(anchors), strict=True):
        _expect_few_objects(head.output[-1], len(level))
    return YOLOv3(made, num_classes, Settings(tuple(size), anchors, *options[3:]))


@torch.no_grad()
def _expect_few_objects(output: nn.Conv2d, num_anchors: int) -> None:
    """Sets the biases of an output convolution so that the initial objectness is OBJECT_PRIOR."""
    assert output.bias is not None
    bias = output.bias.view(num_anchors, -1)
    bias.zero_()
    bias[:, 4].fill_(-math.log((1 - OBJECT_PRIOR) / OBJECT_PRIOR))


def _problems(num_classes: int, size: Any, anchors: Any, num_heads: int, kwargs: dict[str, Any]) -> list[str]:
    """Every problem of a builder's arguments, which may come from an untrusted file."""
    count = _is_count, "an integer from 1 on"
    share = partial(_within, high=1), "a number in (0, 1]"
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "width": (partial(_within, high=16), "a number in (0, 16]"),
        "activation": (partial(_one_of, ACTIVATIONS), ", ".join(ACTIVATIONS)),
        "norm_eps": share,
        "box_coding": (partial(_one_of, CODINGS), ", ".join(CODINGS)),
        "score_thresh": (lambda value: value == 0 or _within(value, 1), "a number in [0, 1]"),
        "nms_thresh": share,
        "detections_per_img": count,
        "topk_candidates": count,
    }
    known = ", ".join(rules)
    sizes = f"one or two multiples of {COARSEST_STRIDE}"
    pairs = f"{num_heads} lists, the finest head first, of pairs of width and height above 0"
    checks = [
        ("num_classes", num_classes, num_classes >= 2, "an integer from 2 on: the background counts"),
        ("size", size, _is_size(size), sizes),
        ("anchors", anchors, _are_anchors(anchors, num_heads), pairs),
        *((key, kwargs[key], fine(kwargs[key]), allowed) for key, (fine, allowed) in rules.items() if key in kwargs),
        *((key, kwargs[key], False, f"no such argument, only {known}") for key in kwargs if key not in rules),
    ]
    return [f"{key}: got {got!r}; allowed: {allowed}" for key, got, fine, allowed in checks if not fine]


def _is_size(size: Any) -> bool:
    return (
        _is_list(size)
        and len(size) == 2
        and all(isinstance(side, int) and side >= COARSEST_STRIDE and side % COARSEST_STRIDE == 0 for side in size)
    )


def _are_anchors(anchors: Any, num_heads: int) -> bool:
    if not _is_list(anchors) or len(anchors) != num_heads or not all(_is_list(level) and level for level in anchors):
        return False
    pairs = [pair for level in anchors for pair in level]
    return all(_is_list(pair) and len(pair) == 2 and all(_within(side, 1e6) for side in pair) for pair in pairs)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _within(value: Any, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= high


def _one_of(allowed: Any, value: Any) -> bool:
    return isinstance(value, str) and value in allowed
