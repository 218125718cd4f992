"""YOLOv3 as a detector: letterbox, box coding, losses, suppression, and its place in the rest of the house."""

import json
import math

import pytest
import torch
from pico import detection_entry, write_detection
from results_samples import write
from torch import nn
from torchvision.ops import box_iou

from dataset_manager import check
from eval_methods import yolo_eval
from gemel.alignment.align import align
from gemel.alignment.permutation import find_channel_spaces, permute
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.results_store.load import load_merged
from gemel.sharing.groups import find_groups
from gemel.sharing.signatures import find_layers
from gemel.sharing.tying import tie
from gemel.training.distillation import Taps
from gemel.workload import read_workload
from model_architectures import architecture_of, build, num_classes_of, rebuild, yolov3_tiny_model
from model_architectures.yolo_boxes import CODINGS, Level, decode, letterbox, to_image, to_network
from model_architectures.yolo_loss import IGNORE_IOU, MATCH_IOU, match, yolo_losses
from model_architectures.yolov3 import ANCHORS, TINY_ANCHORS

SMALL = {"width": 1 / 16, "size": 64, "score_thresh": 0.0}
SQUARE = {"boxes": torch.tensor([[8.0, 10.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def small(name="yolov3_tiny", num_classes=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build(name, num_classes, **{**SMALL, **kwargs})


def prepared(model):
    """The model with normalisation that is not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.05, 0.2)
    return model.eval()


# ---- geometry ----------------------------------------------------------------------------------------------


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


# ---- losses ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "targets: got none for 1 images"),
        ([SQUARE, SQUARE], "targets: got 2 for 1 images"),
        (
            [{**SQUARE, "labels": torch.tensor([0])}],
            "got the label 0; allowed: 1 to 2; 0 is the background, so 'background",
        ),
        ([{**SQUARE, "labels": torch.tensor([3])}], "got the label 3; allowed: 1 to 2"),
        ([{**SQUARE, "boxes": torch.tensor([[8.0, 10, 8, 50]])}], "a box without width or height"),
        ([{**SQUARE, "boxes": torch.tensor([[8.0, 10, math.nan, 50]])}], "a box without width or height"),
    ],
)
def test_targets_that_cannot_be_learnt(targets, message):
    with pytest.raises(ValueError, match=message):
        small()([torch.rand(3, 64, 64)], targets)


# ---- detections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["yolov3", "yolov3_tiny"])
def test_detections_lie_in_images_of_any_size(name):
    model = prepared(small(name, size=[64, 96]))
    images = [torch.rand(3, 50, 200), torch.rand(3, 300, 40), torch.rand(3, 64, 96)]
    with torch.inference_mode():
        together, alone = model(images), [model([image])[0] for image in images]
    for found, same, image in zip(together, alone, images, strict=True):
        height, width = image.shape[-2:]
        assert 0 < len(found["boxes"]) <= 100 and set(found["labels"].tolist()) <= {1, 2}
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert (found["boxes"][:, 2:] >= found["boxes"][:, :2]).all()
        assert torch.equal(found["scores"], found["scores"].sort(descending=True).values)
        torch.testing.assert_close(found["scores"], same["scores"], atol=1e-4, rtol=1e-3)


def test_suppression_is_per_class():
    """Published fault: suppression ignores classes, so a person on a motorcycle hides one of the two."""
    model = small(score_thresh=0.05).eval()
    for head in model.network.heads:
        nn.init.zeros_(head.output[-1].weight)
        nn.init.constant_(head.output[-1].bias, 2.0)  # boxes larger than their anchors, and sure of both classes
    (found,) = model([torch.rand(3, 64, 64)])
    for label in (1, 2):
        boxes = found["boxes"][found["labels"] == label]
        assert len(boxes) and (box_iou(boxes, boxes).fill_diagonal_(0) <= 0.45).all()
    first, second = (found["boxes"][found["labels"] == label] for label in (1, 2))
    assert (box_iou(first, second) > 0.45).any(), "of two classes, boxes that overlap are kept"


def test_nothing_above_the_threshold():
    (found,) = small(score_thresh=0.99).eval()([torch.rand(3, 64, 64)])
    assert found["boxes"].shape == (0, 4) and found["labels"].shape == found["scores"].shape == (0,)
    assert found["labels"].dtype == torch.int64


def test_thresholds_keep_what_they_say():
    model, image = prepared(small(detections_per_img=5, nms_thresh=1.0)), torch.rand(3, 64, 64)
    every = prepared(small(detections_per_img=5000, nms_thresh=1.0, topk_candidates=5000))
    every.load_state_dict(model.state_dict())
    (few,), (all_,) = model([image]), every([image])
    assert len(all_["scores"]) == 2 * 3 * (4 * 4 + 2 * 2)  # classes, anchors, cells of both heads
    assert torch.equal(few["scores"], all_["scores"][:5])


def test_it_learns_two_coloured_rectangles():
    torch.manual_seed(0)
    images, targets = [], []
    for i in range(12):
        image, label = torch.rand(3, 48, 64) * 0.2 + 0.4, i % 2
        left, top = int(torch.randint(2, 30, ())), int(torch.randint(2, 20, ()))
        box = [left, top, left + 20 + 8 * label, top + 24 - 6 * label]
        image[:, box[1] : box[3], box[0] : box[2]] = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9]])[
            label, :, None, None
        ]
        images.append(image)
        targets.append({"boxes": torch.tensor([box], dtype=torch.float32), "labels": torch.tensor([1 + label])})
    model = small(width=1 / 8, score_thresh=0.01, anchors=[[[20, 24], [28, 18]], [[40, 40]]])
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    first = None
    for _ in range(60):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    reestimate_statistics(model, [(images, targets)], torch.device("cpu"))
    accuracy = yolo_eval(model, [(images, targets)])
    assert loss.item() < first / 4 and accuracy > 0.9, (first, loss.item(), accuracy)


# ---- in the house ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 1}, "num_classes: got 1; allowed: an integer from 2 on: the background counts"),
        ({"size": 100}, r"size: got \[100, 100\]; allowed: one or two multiples of 32"),
        ({"size": [64]}, "size: got"),
        ({"size": 0}, "size: got"),
        ({"size": "64"}, "size: got '64'"),
        ({"anchors": ANCHORS}, "anchors: got .*; allowed: 2 lists, the finest head first"),
        ({"anchors": [[[10, 14]], []]}, "anchors: got"),
        ({"anchors": [[[10, 14]], [[1, -2]]]}, "anchors: got"),
        ({"anchors": [[[10, 14]], [[1, "2"]]]}, "anchors: got"),
        ({"width": 0}, "width: got 0"),
        ({"activation": ["silu"]}, "activation: got .*; allowed: leaky_relu, silu"),
        ({"box_coding": "yolov5"}, "box_coding: got 'yolov5'; allowed: exp, sigmoid"),
        ({"norm_eps": True}, "norm_eps: got True"),
        ({"score_thresh": 1.5}, "score_thresh: got 1.5"),
        ({"detections_per_img": 1.5}, "detections_per_img: got 1.5; allowed: an integer from 1 on"),
        ({"scor_thresh": 0.5}, "scor_thresh: got 0.5; allowed: no such argument, only width, activation"),
        ({"size": 33, "width": -1}, "size: got .*\nyolov3_tiny: width: got -1"),
    ],
)
def test_arguments_that_are_wrong_are_all_named(kwargs, message):
    with pytest.raises(ValueError, match="yolov3_tiny: " + message):
        build("yolov3_tiny", **{"num_classes": 3, **kwargs})


def test_it_is_rebuilt_from_its_architecture():
    model = prepared(
        small("yolov3_tiny", anchors=[[[4, 5]], [[9, 9], [20, 30]]], activation="silu", box_coding="sigmoid")
    )
    again = rebuild(json.loads(json.dumps(architecture_of(model))))
    again.load_state_dict(model.state_dict())
    image = torch.rand(3, 50, 70)
    (expected,), (got,) = model([image]), again.eval()([image])
    assert again.settings == model.settings and len(expected["boxes"]) > 0
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert yolov3_tiny_model(3, **SMALL).architecture["name"] == architecture_of(model)["name"] == "yolov3_tiny"
    assert num_classes_of(model) == 3 and model.settings.anchors == (((4, 5),), ((9, 9), (20, 30)))


def test_class_ids_outside_the_model_are_found(tmp_path):
    folder = write_detection(tmp_path, "cars_OD", classes=2, images=8)
    (folder / "train" / "annotations" / "frame2.txt").write_text("1 0.5 0.5 0.2 0.2\n2 0.5 0.5 0.2 0.2")
    tasks, problems = read_workload({"cars_yolo": detection_entry(small())})
    assert not problems
    (line,) = check(tasks, [tmp_path])
    expected = (
        "train/annotations/frame2.txt line 2: got class id 2; allowed: class ids 0 to 1, the classes of the model"
    )
    assert str(line) == f"cars_yolo: dataset {expected}"


def test_merged_models_are_loaded_without_code(tmp_path):
    models = nn.ModuleDict(
        {"a_yolo": small(), "b_yolo": small(num_classes=4, seed=1), "c_yolo": small("yolov3")}
    ).eval()
    groups = find_groups(models)
    tie(models, groups)
    write(tmp_path / "results", models)
    loaded, image = load_merged(tmp_path / "results"), torch.rand(3, 64, 64)
    assert (
        loaded["a_yolo"].network.backbone.fine[0].conv.weight is loaded["b_yolo"].network.backbone.fine[0].conv.weight
    )
    for name, model in models.items():
        (expected,), (got,) = model([image]), loaded[name]([image])
        assert torch.equal(expected["scores"], got["scores"]) and torch.equal(expected["boxes"], got["boxes"])


def test_layers_are_shared_with_whatever_has_the_same():
    with torch.device("meta"):
        models = {name: build(name, 3) for name in ("yolov3", "yolov3_tiny")}
        models["other"] = build("yolov3_tiny", 5)
    groups = find_groups({f"{name}_x": model for name, model in models.items()})
    tasks = [set(group.tasks) for group in groups]
    assert {"yolov3_tiny_x", "other_x"} in tasks  # such as the stem, which is narrower than that of the large one
    assert {"yolov3_x", "yolov3_tiny_x", "other_x"} in tasks
    outputs = [set(g.tasks) for g in groups if any(o.layer.endswith("output.1") for o in g.occurrences)]
    assert outputs == [{"yolov3_x", "yolov3_tiny_x"}] * 2, "outputs are alike for the same number of classes only"
    assert {layer.name for layer in find_layers(models["other"])} == {
        name for name, module in models["other"].named_modules() if isinstance(module, nn.Conv2d)
    }


def test_statistics_and_taps():
    model = small()
    images = [torch.rand(3, 40, 64) for _ in range(4)]
    taps = Taps(model, ["network.backbone.fine.0.conv", "network.heads.1.output.1"])
    reestimate_statistics(model, [(images, None)], torch.device("cpu"))
    assert [len(outputs) for outputs in taps.outputs.values()] == [1, 1]
    norm = model.network.backbone.fine[0].norm
    seen = taps.outputs["network.backbone.fine.0.conv"][0].detach()
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert model.training and norm.momentum == 0.1
    taps.remove()


@pytest.mark.parametrize("name", ["yolov3", "yolov3_tiny"])
def test_all_channels_but_the_outputs_can_be_lined_up(name):
    model, images = prepared(small(name)).double(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    found = find_channel_spaces(model)
    heads = 3 if name == "yolov3" else 2
    assert found.unaligned == tuple((f"network.heads.{i}.output.1", "output") for i in range(heads))
    with torch.no_grad():
        before = model.network(images)
        for space in found.spaces:
            permute(model, space, torch.randperm(space.size).tolist())
        for one, other in zip(before, model.network(images), strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_shuffled_copy_is_lined_up_again():
    torch.manual_seed(0)
    models = {"a_yolo": prepared(small(width=1 / 4)), "b_yolo": small(width=1 / 4).eval()}
    models["b_yolo"].load_state_dict(models["a_yolo"].state_dict())
    for space in find_channel_spaces(models["b_yolo"]).spaces:
        permute(models["b_yolo"], space, torch.randperm(space.size).tolist())
    weights = [model.network.backbone.fine[2].conv.weight for model in models.values()]
    assert not torch.allclose(*weights)
    images = {task: [[torch.rand(3, 64, 64) for _ in range(4)]] for task in models}
    done = align(models, find_groups(models), images)
    assert torch.allclose(*weights) and any(space.num_moved for space in done.spaces)
    assert {reason for _, _, reason in done.unaligned} == {"output"}


def test_default_anchors_are_those_of_the_cfg_files():
    flat = [anchor for level in ANCHORS for anchor in level]
    assert flat == [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)]
    flat = [anchor for level in TINY_ANCHORS for anchor in level]
    assert flat == [(10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319)]
