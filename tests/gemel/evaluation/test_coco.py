"""COCO average precision against a plain pycocotools run, with either engine."""

import contextlib
import io

import numpy as np
import pytest
import torch
from eval_samples import Fixed, detector_loader, output, random_boxes, scenes, target
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eval_methods import (
    detection_eval_per_class,
    frcnn_eval,
    yolo_eval,
)
from gemel.evaluation import coco as eval_coco


def plain_coco(targets, outputs):
    """The textbook run: lists of dictionaries, all area ranges, summarize; mAP, AP50 and per class both."""
    truth, found = [], []
    for image_id, (wanted, detected) in enumerate(zip(targets, outputs, strict=True), start=1):
        for i, (x0, y0, x1, y1) in enumerate(wanted["boxes"].tolist()):
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image_id,
                    "category_id": int(wanted["labels"][i]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(wanted["area"][i]),
                    "iscrowd": int(wanted["iscrowd"][i]),
                }
            )
        for i, (x0, y0, x1, y1) in enumerate(detected["boxes"].tolist()):
            label, score = int(detected["labels"][i]), float(detected["scores"][i])
            box = [x0, y0, x1 - x0, y1 - y0]
            found.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i + 1} for i in range(len(targets))],
        "annotations": truth,
        "categories": [{"id": i} for i in sorted({t["category_id"] for t in truth})],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, 2]  # of all areas, 100 detections: [thresholds, recalls, classes]
    names = [category["id"] for category in coco.dataset["categories"]]
    per_class = {
        name: (values.mean(), values[0].mean())
        for name, values in zip(names, np.moveaxis(precision, -1, 0), strict=True)
        if (values > -1).all()
    }
    return float(evaluation.stats[0]), float(evaluation.stats[1]), per_class


@pytest.fixture(params=["pycocotools", "hotcoco"])
def engine(request, monkeypatch):
    """Computes with this engine; hotcoco is skipped if it is not installed."""
    module = pytest.importorskip("hotcoco") if request.param == "hotcoco" else None
    monkeypatch.setattr(eval_coco, "hotcoco", module)
    return request.param


def compare_with_plain(num_images, seed):
    targets, outputs = scenes(num_images, seed)
    mean, at_50, per_class = plain_coco(targets, outputs)
    assert 0.2 < mean < at_50 < 0.95 and len(per_class) == 3  # a reference that is hit by accident proves nothing
    found = frcnn_eval(Fixed(outputs), detector_loader(targets))
    assert found == pytest.approx(mean, abs=1e-9)
    assert yolo_eval(Fixed(outputs), detector_loader(targets)) == pytest.approx(at_50, abs=1e-9)
    own = detection_eval_per_class(Fixed(outputs), detector_loader(targets))
    assert {label: (pytest.approx(v["ap"], abs=1e-9), v["ap50"]) for label, v in own.items()} == per_class
    assert sum(v["ap"] for v in own.values()) / len(own) == pytest.approx(mean, abs=1e-9)
    for label, values in own.items():
        assert values["objects"] == sum(int(((t["labels"] == label) & (t["iscrowd"] == 0)).sum()) for t in targets)
    return found, mean


@pytest.mark.parametrize("seed", [3, 4])
def test_precision_is_that_of_plain_pycocotools(seed, engine, capfd):
    compare_with_plain(60, seed)
    assert capfd.readouterr() == ("", "")


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(4))
def test_precision_of_many_images_is_that_of_plain_pycocotools(seed, engine):
    found, mean = compare_with_plain(500, seed)
    print(f"{engine}: {found!r}, pycocotools {mean!r}, difference {abs(found - mean):.1e}")


def test_the_two_engines_agree_on_hard_cases():
    """Equal scores, more than 100 detections of an image, crowds, labels far apart, boxes without an area."""
    pytest.importorskip("hotcoco")
    generator = torch.Generator().manual_seed(0)
    targets, rows = [], []
    for i in range(12):
        count = (0, 3, 40)[i % 3]
        truth = random_boxes(generator, count)
        labels = torch.randint(0, 3, (count,), generator=generator) * 10**6
        targets.append({"boxes": truth, "labels": labels, "iscrowd": (torch.arange(count) % 4 == 0).long()})
        found = torch.cat([truth, truth + torch.randn(count, 4, generator=generator) * 3, random_boxes(generator, 260)])
        found[::7, 2:] = found[::7, :2]
        names = torch.randint(0, 4, (len(found),), generator=generator) * 10**6
        scores = (torch.rand(len(found), generator=generator) * 8).round() / 8
        scores[::11] = float("nan")
        rows.append(eval_coco.detection_rows({"boxes": found, "labels": names, "scores": scores}))
    results = [
        eval_coco.precision_of(targets, rows, eval_coco.IOU_THRESHOLDS, engine)
        for engine in (eval_coco.by_pycocotools, eval_coco.by_hotcoco)
    ]
    assert results[0][:2] == results[1][:2] and results[0].values.shape == results[1].values.shape == (10, 101, 3)
    assert results[0].mean() > 0.005 and np.abs(results[0].values - results[1].values).max() <= 1e-6


def test_classes_without_a_detection_have_an_ap_of_zero(engine):
    box = [[10, 10, 50, 60]]
    targets = [target(box, [1]), target(box, [2]), target(box, [3], iscrowd=torch.tensor([1]))]
    outputs = [output(box, [1], [0.9]), output(), output(box, [3], [0.9])]
    found = detection_eval_per_class(Fixed(outputs), detector_loader(targets))
    one = pytest.approx(1.0)
    assert found == {1: {"ap": one, "ap50": one, "objects": 1}, 2: {"ap": 0.0, "ap50": 0.0, "objects": 1}}
    nothing = detection_eval_per_class(Fixed([output()] * 3), detector_loader(targets))
    assert nothing == {label: {"ap": 0.0, "ap50": 0.0, "objects": 1} for label in (1, 2)}


def test_values_that_are_not_finite_are_false_alarms(engine):
    nan, box = float("nan"), [10.0, 10.0, 50.0, 60.0]
    targets = [target([box], [1])]
    broken = output([[nan] * 4, box], [1, 1], [0.9, 0.5])  # the false alarm comes first: precision 1/2
    assert frcnn_eval(Fixed([broken]), detector_loader(targets)) == pytest.approx(0.5)
    no_score = output([box, [100.0, 100.0, 120.0, 120.0]], [1, 1], [nan, 0.5])  # the hit comes last
    assert frcnn_eval(Fixed([no_score]), detector_loader(targets)) == pytest.approx(0.5)
