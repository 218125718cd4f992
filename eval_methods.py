"""Eval methods for the task dictionary: (model, loader) -> float in [0, 1]."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gemel.evaluation.coco import IOU_THRESHOLDS, Precision, detection_rows, precision_of
from gemel.forward.modes import device_of, evaluation_mode, logits_of


def classification_eval(model: nn.Module, loader: Iterable) -> float:
    """Top-1 accuracy: the share of images whose highest output is that of their class.

    loader: yields (Tensor[N, 3, H, W], int64 Tensor[N]). An output with a NaN is wrong, whatever its highest value.
    Raises ValueError if the loader yields no image.
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
    """{class: {"top1": share of its images that are right, "images": their number}} for the classes in the loader.

    loader and errors: as for classification_eval; its accuracy is the mean of "top1", weighted by "images".
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
    """COCO mAP@[.5:.95] of any torchvision detector or YOLOv3, as pycocotools computes it; 0.0 if nothing is detected.

    loader: yields (list of Tensor[3, H, W], list of {"boxes": XYXY pixels, "labels", optional "iscrowd", "area"}).
    Images are numbered as they come; "image_id" is not read. Raises ValueError if the loader yields no image or no
    object that counts (one that is not a crowd): the mAP would be undefined.
    """
    return _precision("frcnn_eval", model, loader, IOU_THRESHOLDS).mean()


def yolo_eval(model: nn.Module, loader: Iterable) -> float:
    """AP at IoU 0.5, mean over the classes present: what is reported for YOLO; COCO's AP50. As frcnn_eval otherwise."""
    return _precision("yolo_eval", model, loader, IOU_THRESHOLDS[:1]).mean()


def detection_eval_per_class(model: nn.Module, loader: Iterable) -> dict[int, dict[str, float]]:
    """{class: {"ap": AP@[.5:.95], "ap50": AP at IoU 0.5, "objects": their number}} for the classes with objects.

    Classes are the labels that the loader yields; those with crowds alone have no AP and are left out. The mean of "ap"
    is frcnn_eval, that of "ap50" yolo_eval; loader and errors as there.
    """
    found = _precision("detection_eval_per_class", model, loader, IOU_THRESHOLDS)
    return {
        label: {"ap": values.mean().item(), "ap50": values[0].mean().item(), "objects": count}
        for label, count, values in zip(found.classes, found.objects, np.moveaxis(found.values, -1, 0), strict=True)
    }


# What an eval method can say class by class, for whoever reports it: `eval_method.per_class(model, loader)`.
classification_eval.per_class = classification_eval_per_class
frcnn_eval.per_class = detection_eval_per_class
yolo_eval.per_class = detection_eval_per_class


def _precision(name: str, model: nn.Module, loader: Iterable, iou_thresholds: Sequence[float]) -> Precision:
    """What the detector finds in all batches, judged at once; `name` of the eval method for what it raises."""
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
