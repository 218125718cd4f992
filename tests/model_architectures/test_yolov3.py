"""YOLOv3 as a detector: targets, detections, arguments, and that it is rebuilt, merged and aligned."""

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
from model_architectures.yolov3 import ANCHORS, TINY_ANCHORS

SMALL = {"width": 1 / 16, "size": 64, "score_thresh": 0.0}
SQUARE = {"boxes": torch.tensor([[8.0, 10.0, 40.0, 50.0]]), "labels": torch.tensor([1])}


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
def test_all_channels_but_the_outputs_can_be_aligned(name):
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


def test_a_shuffled_copy_is_aligned_again():
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
