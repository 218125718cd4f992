"""Average precision as COCO computes it: from targets and detections to precision per class.

Computed by pycocotools, or by hotcoco if that is installed (pip install hotcoco): the same numbers in a fraction of the
time. tests/gemel/evaluation/test_coco.py compares the two.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

hotcoco: Any = import_module("hotcoco") if find_spec("hotcoco") else None

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
Thresholds = Sequence[float] | np.ndarray  # of the IoU
ALL_AREAS = [[0, 1e10]]  # objects of every size; precision of small, medium and large ones is not computed
MAX_DETECTIONS = [100]  # per image and class, as in COCO


class Precision(NamedTuple):
    """Precision of the classes that have an object other than crowds, ordered by label."""

    classes: list[int]
    objects: list[int]  # number of objects per class, without crowds
    values: np.ndarray  # [IoU thresholds, recalls, classes]

    def mean(self) -> float:
        """The mean over thresholds, recalls and classes: mAP."""
        return float(self.values.mean())


def detection_rows(output: dict[str, Tensor]) -> Tensor:
    """Rows (x, y, width, height, score, label) of one image, in float64 as pycocotools computes in Python floats.

    A box that is not finite becomes an empty box, which counts as a false positive; a score of NaN sorts last.
    """
    boxes = output["boxes"].double()
    boxes = torch.where(boxes.isfinite().all(1, keepdim=True), boxes, 0.0)
    labels, scores = output["labels"].double(), output["scores"].double()
    scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).min)
    return torch.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels])


def precision_of(
    targets: Sequence[dict],
    found: Sequence[Tensor],
    iou_thresholds: Thresholds,
    engine: Callable | None = None,
) -> Precision:
    """Precision of detections as COCO computes it; 0 for a class without detections.

    targets: per image {"boxes": XYXY [n, 4], "labels", optional "iscrowd", "area"}. found: detection_rows per image.
    engine: by_pycocotools or by_hotcoco; by default the faster one that is installed. Raises ValueError if there are no
    objects other than crowds.
    """
    truth = _ground_truth(targets)
    labels = [annotation["category_id"] for annotation in truth if _counts(annotation)]
    if not labels:
        raise ValueError("mAP: got no object in any image; allowed: at least one, else it is undefined")
    classes = sorted(set(labels))
    image_ids = np.repeat(np.arange(1, len(found) + 1), [len(rows) for rows in found])
    rows = np.column_stack([image_ids, torch.cat(list(found)).cpu().numpy()])  # the one transfer
    rows = rows[np.isin(rows[:, -1], classes)]  # classes without objects have no precision
    values = np.zeros((len(iou_thresholds), 1, len(classes)))
    if len(rows):
        engine = engine or (by_pycocotools if hotcoco is None else by_hotcoco)
        values = engine(_dataset(len(targets), truth, classes), rows, iou_thresholds)
    return Precision(classes, [labels.count(label) for label in classes], values)


def by_pycocotools(dataset: dict[str, Any], rows: np.ndarray, iou_thresholds: Thresholds) -> np.ndarray:
    """Precision [IoU thresholds, recalls, classes] by pycocotools.

    dataset: the content of a COCO annotation file. rows: (image id, x, y, width, height, score, label).
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        return _evaluated(COCOeval(truth, truth.loadRes(rows), "bbox"), iou_thresholds)


def by_hotcoco(dataset: dict[str, Any], rows: np.ndarray, iou_thresholds: Thresholds) -> np.ndarray:
    """The same as by_pycocotools, by hotcoco."""
    truth = hotcoco.COCO(dataset)
    return _evaluated(hotcoco.COCOeval(truth, truth.loadRes(rows), "bbox"), iou_thresholds)


def _evaluated(evaluation: Any, iou_thresholds: Thresholds) -> np.ndarray:
    """Runs a COCOeval of either library."""
    evaluation.params.areaRng, evaluation.params.areaRngLbl = ALL_AREAS, ["all"]
    evaluation.params.maxDets = MAX_DETECTIONS
    evaluation.params.iouThrs = np.asarray(iou_thresholds)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"]
    assert (precision > -1).all(), "every class has an object"
    return np.ascontiguousarray(precision[..., 0, 0])


def _dataset(num_images: int, truth: list[dict], classes: Sequence[int]) -> dict[str, Any]:
    """The content of a COCO annotation file."""
    return {
        "images": [{"id": image_id} for image_id in range(1, num_images + 1)],
        "annotations": [annotation for annotation in truth if annotation["category_id"] in classes],
        "categories": [{"id": label, "name": str(label)} for label in classes],
    }


def _ground_truth(targets: Sequence[dict]) -> list[dict]:
    """COCO annotations of the targets; image i has the id i + 1."""
    truth: list[dict] = []
    for image_id, target in enumerate(targets, start=1):
        boxes = target["boxes"].as_subclass(Tensor).reshape(-1, 4).double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        crowds = target["iscrowd"].tolist() if "iscrowd" in target else [0] * len(boxes)
        areas = target["area"].tolist() if "area" in target else [width * height for _, _, width, height in boxes]
        for box, label, crowd, area in zip(boxes, target["labels"].tolist(), crowds, areas, strict=True):
            values = {"category_id": int(label), "bbox": box, "iscrowd": int(crowd), "area": area}
            truth.append({"id": len(truth) + 1, "image_id": image_id, **values})  # pycocotools never matches id 0
    return truth


def _counts(annotation: dict) -> bool:
    """Whether an annotation is an object to be found: not a crowd, and within ALL_AREAS."""
    lowest, highest = ALL_AREAS[0]
    return not annotation["iscrowd"] and lowest <= annotation["area"] <= highest
