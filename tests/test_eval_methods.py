"""The eval methods against plain counting and a plain pycocotools run, with either engine."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pico import PicoNet
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from eval_methods import (
    classification_eval,
    classification_eval_per_class,
    detection_eval_per_class,
    frcnn_eval,
    yolo_eval,
)
from gemel.evaluation import coco as eval_coco
from gemel.evaluation.eval_method import evaluate
from gemel.forward.modes import evaluation_mode
from model_architectures import build

SIZE = 200  # pixels of the synthetic scenes


class Fixed(nn.Module):
    """Returns prepared outputs, one per image in the order of the loader, and records how it was called."""

    def __init__(self, outputs, batched=False):
        super().__init__()
        self.outputs, self.batched, self.position, self.calls = outputs, batched, 0, []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        self.calls.append((self.training, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        part = self.outputs[self.position : self.position + len(images)]
        self.position += len(images)
        return torch.stack(part) if self.batched else part


def detector_loader(targets, batch_size=4):
    images = [torch.zeros(3, SIZE, SIZE)] * len(targets)
    return [(images[i : i + batch_size], targets[i : i + batch_size]) for i in range(0, len(targets), batch_size)]


def target(boxes=(), labels=(), **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "image_id": 7, **more}


def output(boxes=(), labels=(), scores=()):
    return {**target(boxes, labels), "scores": torch.tensor(scores, dtype=torch.float32)}


def random_boxes(generator, count):
    corner = torch.rand(count, 2, generator=generator) * 150
    return torch.cat([corner, corner + 3 + torch.rand(count, 2, generator=generator) * 47], 1)


def scenes(num_images=60, seed=3):
    """Targets and outputs: images without objects or detections, classes 1-5 of which 5 is never annotated,

    class 4 annotated only as crowd, detections of the wrong class, duplicates, noise, equal scores.
    """
    generator = torch.Generator().manual_seed(seed)
    targets, outputs = [], []
    for i in range(num_images):
        count = 0 if i % 7 == 0 else int(torch.randint(1, 6, (1,), generator=generator))
        boxes = random_boxes(generator, count)
        labels = torch.randint(1, 5, (count,), generator=generator)
        crowd = ((labels == 4) | (torch.rand(count, generator=generator) < 0.15)).long()
        size = boxes[:, 2:] - boxes[:, :2]
        targets.append({"boxes": boxes, "labels": labels, "iscrowd": crowd, "area": size.prod(1), "image_id": 0})
        jitter = torch.randn(count, 4, generator=generator)
        wrong = torch.rand(count, generator=generator) < 0.2
        noise = random_boxes(generator, 3)
        found = torch.cat([boxes + jitter, boxes[:1] + 1, noise]) if i % 5 else torch.zeros(0, 4)
        names = torch.cat([torch.where(wrong, 5, labels), labels[:1], torch.tensor([1, 5, 2])])[: len(found)]
        scores = (torch.rand(len(found), generator=generator) * 20).round() / 20
        outputs.append({"boxes": found, "labels": names, "scores": scores})
    return targets, outputs


def plain_coco(targets, outputs):
    """The textbook run: lists of dictionaries, all area ranges, summarize; mAP, AP50 and per class both."""
    truth, found = [], []
    for image_id, (target, output) in enumerate(zip(targets, outputs, strict=True), start=1):
        for i, (x0, y0, x1, y1) in enumerate(target["boxes"].tolist()):
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image_id,
                    "category_id": int(target["labels"][i]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(target["area"][i]),
                    "iscrowd": int(target["iscrowd"][i]),
                }
            )
        for i, (x0, y0, x1, y1) in enumerate(output["boxes"].tolist()):
            label, score = int(output["labels"][i]), float(output["scores"][i])
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
    """Computes with this engine, whatever is installed; hotcoco is skipped where it is not."""
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


def test_map_does_not_depend_on_batches_or_image_ids():
    targets, outputs = scenes(20)
    whole = frcnn_eval(Fixed(outputs), detector_loader(targets, batch_size=20))
    assert whole == frcnn_eval(Fixed(outputs), detector_loader(targets, batch_size=3))
    renamed = [{**t, "image_id": i} for i, t in enumerate(targets)]  # above, all images had the same id
    assert whole == frcnn_eval(Fixed(outputs), detector_loader(renamed))


def test_map_is_class_aware():
    box = [[10, 10, 50, 60]]
    targets = [target(box, [1]), target(box, [2])]
    assert frcnn_eval(Fixed([output(box, [1], [0.9]), output(box, [2], [0.9])]), detector_loader(targets)) > 1 - 1e-9
    assert frcnn_eval(Fixed([output(box, [2], [0.9]), output(box, [1], [0.9])]), detector_loader(targets)) == 0.0


def test_detections_of_a_class_without_ground_truth_do_not_count():
    box = [[10, 10, 50, 60]]
    found = output(box * 2, [3, 1], [0.99, 0.5])
    assert frcnn_eval(Fixed([found]), detector_loader([target(box, [1])])) > 1 - 1e-9


def test_nothing_detected_is_zero():
    assert frcnn_eval(Fixed([output(), output()]), detector_loader([target([[1, 1, 9, 9]], [1]), target()])) == 0.0


@pytest.mark.parametrize(
    "targets",
    [
        [target(), target()],
        [target([[1, 1, 9, 9]], [1], iscrowd=torch.tensor([1]))],
    ],
    ids=["no boxes", "crowds only"],
)
def test_map_without_ground_truth_raises(targets):
    found = [output([[1, 1, 9, 9]], [1], [0.9])] * len(targets)
    with pytest.raises(ValueError, match="no object in any image; allowed: at least one"):
        frcnn_eval(Fixed(found), detector_loader(targets))


@pytest.mark.parametrize("method", [classification_eval, frcnn_eval, yolo_eval])
def test_an_empty_loader_raises(method):
    with pytest.raises(ValueError, match="without images"):
        method.per_class(Fixed([]), [])
    with pytest.raises(ValueError, match=f"{method.__name__}: got a loader without images"):
        method(Fixed([]), [])


def test_values_that_are_not_finite_are_false_alarms(engine):
    nan, box = float("nan"), [10.0, 10.0, 50.0, 60.0]
    targets = [target([box], [1])]
    broken = output([[nan] * 4, box], [1, 1], [0.9, 0.5])  # the false alarm comes first: precision 1/2
    assert frcnn_eval(Fixed([broken]), detector_loader(targets)) == pytest.approx(0.5)
    no_score = output([box, [100.0, 100.0, 120.0, 120.0]], [1, 1], [nan, 0.5])  # the hit comes last
    assert frcnn_eval(Fixed([no_score]), detector_loader(targets)) == pytest.approx(0.5)


def classifier_loader(labels, batch_size):
    labels = torch.tensor(labels)
    return [(torch.zeros(len(part), 3, 4, 4), part) for part in labels.split(batch_size)]


def test_top1_counts_images_not_batches():
    logits = [torch.nn.functional.one_hot(torch.tensor(c), 3).float() for c in (0, 1, 2, 1, 0)]
    loader = classifier_loader([0, 1, 2, 2, 2], batch_size=3)  # 3 of 3 and 0 of 2: the mean of batches would be 0.5
    assert classification_eval(Fixed(logits, batched=True), loader) == pytest.approx(0.6)


def test_top1_per_class():
    logits = [torch.nn.functional.one_hot(torch.tensor(c), 4).float() for c in (0, 1, 2, 3, 0)]
    logits[0] = logits[0] * float("nan")
    loader = classifier_loader([0, 1, 2, 2, 0], batch_size=3)
    expected = {0: {"top1": 0.5, "images": 2}, 1: {"top1": 1.0, "images": 1}, 2: {"top1": 0.5, "images": 2}}
    assert classification_eval_per_class(Fixed(logits, batched=True), loader) == expected
    assert classification_eval.per_class is classification_eval_per_class
    whole = classification_eval(Fixed(logits, batched=True), loader)
    assert whole == sum(v["top1"] * v["images"] for v in expected.values()) / 5


def test_top1_takes_logits_and_counts_nan_as_wrong():
    logits = torch.tensor([[5.0, 1.0], [float("nan"), 1.0]])

    class Wrapped(nn.Module):
        def forward(self, images):
            return SimpleNamespace(logits=logits)

    assert classification_eval(Wrapped(), classifier_loader([0, 0], 2)) == 0.5


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_restored_one_by_one(training):
    model = PicoNet().train(training)
    model.bn1.train(not training)
    before = [module.training for module in model.modules()]
    classification_eval(model, classifier_loader([0, 1], 2))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("kind", ["classification", "detection"])
def test_evaluation_is_in_eval_and_inference_mode(kind):
    if kind == "classification":
        model = Fixed([torch.tensor([1.0, 0.0])] * 2, batched=True).train()
        classification_eval(model, classifier_loader([0, 1], 1))
    else:
        model = Fixed([output()] * 2).train()
        frcnn_eval(model, detector_loader([target([[1, 1, 9, 9]], [1])] * 2, 1))
    assert model.calls == [(False, True, False)] * 2
    assert model.weight.grad is None and model.training


def test_a_detector_trains_after_it_was_evaluated(tiny_fcos):
    loader = detector_loader([target([[20, 20, 120, 120]], [1])] * 2, 2)
    frcnn_eval(tiny_fcos, loader)
    losses = tiny_fcos.train()(*loader[0])
    sum(losses.values()).backward()  # nothing that inference mode made is kept inside the model
    assert all(parameter.grad is not None for parameter in tiny_fcos.parameters())


@pytest.fixture
def tiny_fcos():
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU())
    backbone.out_channels = 32
    backbone.append(nn.Conv2d(8, 32, 1))
    anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    return FCOS(backbone, 3, anchor_generator=anchors, min_size=64, max_size=64)


def test_overlapping_objects_of_two_classes_both_survive():
    """Published fault: suppression ignores classes, so a person on a motorcycle hides one of the two."""
    model = build("fcos_model", 4, width=8, layers=[1, 1, 1, 1], out_channels=32, min_size=64).eval()
    outputs, sides = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
    for layer in (outputs, sides):
        torch.nn.init.zeros_(layer.weight)
    with torch.no_grad():
        outputs.bias.copy_(torch.tensor([-9.0, 4.0, 3.0, -9.0]))
        sides.bias.fill_(2.0)  # strides to each side: boxes of no area, as those at random, suppress nothing
        (output,) = model([torch.rand(3, 64, 64)])
    by_class = [{tuple(box) for box in output["boxes"][output["labels"] == label].tolist()} for label in (1, 2)]
    assert by_class[0] & by_class[1], "the same box is reported for both classes"
    assert set(output["labels"].tolist()) == {1, 2}


@pytest.mark.parametrize("value, got", [(1.5, "1.5"), (-1, "-1"), (None, "None"), (float("nan"), "nan")])
def test_what_an_eval_method_returns_is_checked(value, got):
    """Published fault: -1 (no ground truth) flows on as an accuracy."""
    task = SimpleNamespace(name="a_x", model=None, eval_method=lambda model, loader: value)
    with pytest.raises(ValueError, match=f"a_x: eval_method: got {got}; allowed: a number in"):
        evaluate(task, [])


def test_an_eval_method_may_print(capsys):
    task = SimpleNamespace(name="a_x", model="own", eval_method=lambda model, loader: print("pages") or len(model) / 10)
    assert evaluate(task, []) == 0.3 and evaluate(task, [], "other") == 0.5 and capsys.readouterr().out == ""
