"""Eval methods for the task dictionary: (model, loader) -> float in [0, 1]."""

import contextlib
import io
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

ALL_AREAS = [[0, 1e10]]  # mAP is taken over objects of every size; the small/medium/large splits are not computed
MAX_DETECTIONS = [100]  # per image and class, as COCO counts

log = logging.getLogger(__name__)


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


def frcnn_eval(model: nn.Module, loader: Iterable) -> float:
    """COCO mAP@[.5:.95] of any torchvision detector, by pycocotools; 0.0 when nothing is detected.

    loader: yields (list of Tensor[3, H, W], list of {"boxes": XYXY pixels, "labels", optional "iscrowd", "area"}).
    Images are numbered as they come; "image_id" is not read. Raises ValueError if the loader yields no image or no
    object that counts (one that is not a crowd): the mAP would be undefined.
    """
    device = device_of(model)
    targets_seen: list[dict] = []
    found: list[Tensor] = []
    with evaluation_mode(model):
        for images, targets in loader:
            outputs = model([image.to(device, non_blocking=True) for image in images])
            found += [_detections(output) for output in outputs]
            targets_seen += targets
    if not targets_seen:
        raise ValueError("frcnn_eval: got a loader without images; allowed: at least one image")
    truth = _ground_truth(targets_seen)
    if not any(_counts(annotation) for annotation in truth):
        raise ValueError("frcnn_eval: got no object in any image; allowed: at least one, else the mAP is undefined")
    image_ids = np.repeat(np.arange(1, len(found) + 1), [len(rows) for rows in found])
    rows = torch.cat(found).cpu().numpy()  # the one transfer
    return _coco_map(len(found), truth, np.column_stack([image_ids, rows]))


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters; the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def logits_of(output: Any) -> Tensor:
    """The tensor [N, K] of a classifier's output: the output itself, or its `logits`."""
    return getattr(output, "logits", output)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inference mode, with the model in eval mode; afterwards every submodule has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:  # not model.train(): users may keep a BatchNorm in eval while the rest trains
            module.training = training


def _detections(output: dict[str, Tensor]) -> Tensor:
    """Rows x, y, width, height, score, label of one image, in float64: pycocotools subtracts in Python floats.

    A box that is not finite becomes an empty one, so a false alarm; a score that is NaN sorts behind all others.
    """
    boxes = output["boxes"].double()
    boxes = torch.where(boxes.isfinite().all(1, keepdim=True), boxes, 0.0)
    labels, scores = output["labels"].double(), output["scores"].double()
    return torch.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels])


def _ground_truth(targets: list[dict]) -> list[dict]:
    """COCO annotations of the targets; image i has the id i + 1."""
    truth: list[dict] = []
    for image_id, target in enumerate(targets, start=1):
        boxes = target["boxes"].as_subclass(Tensor).reshape(-1, 4).double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        crowds = target["iscrowd"].tolist() if "iscrowd" in target else [0] * len(boxes)
        areas = target["area"].tolist() if "area" in target else [width * height for _, _, width, height in boxes]
        for box, label, crowd, area in zip(boxes, target["labels"].tolist(), crowds, areas, strict=True):
            values = {"category_id": int(label), "bbox": box, "iscrowd": int(crowd), "area": area}
            truth.append({"id": len(truth) + 1, "image_id": image_id, **values})  # id 0 would never be matched
    return truth


def _counts(annotation: dict) -> bool:
    lowest, highest = ALL_AREAS[0]
    return not annotation["iscrowd"] and lowest <= annotation["area"] <= highest


def _coco_map(num_images: int, truth: list[dict], found: np.ndarray) -> float:
    """mAP of `found`, rows (image id, x, y, width, height, score, label); at least one of `truth` counts."""
    if len(found) == 0:
        return 0.0
    coco = COCO()
    categories = sorted({annotation["category_id"] for annotation in truth})
    coco.dataset = {
        "images": [{"id": image_id} for image_id in range(1, num_images + 1)],
        "annotations": truth,
        "categories": [{"id": category} for category in categories],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = ALL_AREAS, ["all"]
        evaluation.params.maxDets = MAX_DETECTIONS
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # -1 marks a class all of whose objects are crowds: it has no precision
    return float(precision[precision > -1].mean())


def evaluate(task, loader: Iterable, model: nn.Module | None = None) -> float:
    """The accuracy of a workload.Task by its own eval method, whose prints go to the debug log.

    model: instead of the task's own. Raises ValueError when the eval method returns no number in [0, 1].
    """
    printed = io.StringIO()  # pycocotools, for one, prints pages
    with contextlib.redirect_stdout(printed):
        value = task.eval_method(task.model if model is None else model, loader)
    if printed.getvalue():
        log.debug("%s: eval_method printed:\n%s", task.name, printed.getvalue())
    try:
        accuracy = float(value)
    except (TypeError, ValueError):
        accuracy = math.nan
    if not 0 <= accuracy <= 1:
        raise ValueError(f"{task.name}: eval_method: got {value!r}; allowed: a number in [0, 1]")
    return accuracy
