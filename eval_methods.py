"""Eval methods for the task dictionary: (model, loader) -> accuracy in [0, 1]."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemel.evaluation.coco import IOU_THRESHOLDS, Precision, Thresholds, detection_rows, precision_of
from gemel.forward.modes import device_of, evaluation_mode, logits_of


def classification_eval(model: nn.Module, loader: Iterable) -> float:
    """Top-1 accuracy: the share of images for which the output of the right class is the highest.

    loader: yields (Tensor[N, 3, H, W], int64 Tensor[N]). Outputs with a NaN count as wrong. Raises ValueError if the
    loader yields no image.
    """
    device = device_of(model)
    correct, total = torch.zeros((), dtype=torch.int64, device=device), 0
    with evaluation_mode(model):
        for images, labels in loader:
            scores = logits_of(model(images.to(device, non_blocking=True)))
            right = scores.argmax(1) == labels.to(device, non_blocking=True)
            correct += (right & ~scores.isnan().any(1)).sum()
            total += len(labels)
    if total == 0:
        raise ValueError("classification_eval: got a loader without images; allowed: at least one image")
    return correct.item() / total


def classification_eval_per_class(model: nn.Module, loader: Iterable) -> dict[int, dict[str, float]]:
    """{class: {"top1": accuracy on its images, "images": their number}} for the classes in the loader.

    Loader and errors as for classification_eval, whose result is the mean of "top1" weighted by "images".
    """
    device = device_of(model)
    seen: list[Tensor] = []
    with evaluation_mode(model):
        for images, labels in loader:
            scores = logits_of(model(images.to(device, non_blocking=True)))
            labels = labels.to(device, non_blocking=True)
            seen.append(torch.stack([labels, (scores.argmax(1) == labels) & ~scores.isnan().any(1)]))
    if not seen:
        raise ValueError("classification_eval: got a loader without images; allowed: at least one image")
    labels, right = torch.cat(seen, 1).cpu()  # the one transfer
    return {
        label: {"top1": right[labels == label].double().mean().item(), "images": int((labels == label).sum())}
        for label in labels.unique().tolist()
    }


def frcnn_eval(model: nn.Module, loader: Iterable) -> float:
    """COCO mAP@[.5:.95] of a torchvision detector or YOLOv3, as pycocotools computes it; 0.0 without detections.

    loader: yields (list of Tensor[3, H, W], list of {"boxes": XYXY pixels, "labels", optional "iscrowd", "area"}).
    Images are numbered in the order of the loader; "image_id" is not read. Raises ValueError if the loader yields no
    image, or no object other than crowds: the mAP is then undefined.
    """
    return _precision("frcnn_eval", model, loader, IOU_THRESHOLDS).mean()


def yolo_eval(model: nn.Module, loader: Iterable) -> float:
    """COCO AP50, the usual metric for YOLO: AP at IoU 0.5, mean over the classes. Otherwise as frcnn_eval."""
    return _precision("yolo_eval", model, loader, IOU_THRESHOLDS[:1]).mean()


def detection_eval_per_class(model: nn.Module, loader: Iterable) -> dict[int, dict[str, float]]:
    """{class: {"ap": AP@[.5:.95], "ap50": AP at IoU 0.5, "objects": their number}} for the classes with objects.

    Classes are the labels that the loader yields; a class with crowds only has no AP and is left out. The mean of "ap"
    is the result of frcnn_eval, that of "ap50" of yolo_eval; loader and errors as there.
    """
    found = _precision("detection_eval_per_class", model, loader, IOU_THRESHOLDS)
    return {
        label: {"ap": values.mean().item(), "ap50": values[0].mean().item(), "objects": count}
        for label, count, values in zip(found.classes, found.objects, np.moveaxis(found.values, -1, 0), strict=True)
    }


# `eval_method.per_class(model, loader)` gives the accuracy class by class, for reports.
_PER_CLASS: dict[Any, Callable[[nn.Module, Iterable], dict[int, dict[str, float]]]] = {
    classification_eval: classification_eval_per_class,
    frcnn_eval: detection_eval_per_class,
    yolo_eval: detection_eval_per_class,
}
for _eval_method, _per_class in _PER_CLASS.items():
    _eval_method.per_class = _per_class


def _precision(name: str, model: nn.Module, loader: Iterable, iou_thresholds: Thresholds) -> Precision:
    """Runs the detector on all batches and computes precision once; name: of the eval method, for errors."""
    device = device_of(model)
    targets_seen: list[dict] = []
    found: list[Tensor] = []
    with evaluation_mode(model):
        for images, targets in loader:
            outputs = model([image.to(device, non_blocking=True) for image in images])
            found += [detection_rows(output) for output in outputs]
            targets_seen += targets
    if not targets_seen:
        raise ValueError(f"{name}: got a loader without images; allowed: at least one image")
    return precision_of(targets_seen, found, iou_thresholds)
