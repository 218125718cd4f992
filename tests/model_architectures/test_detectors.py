"""Detectors: backbones, frozen normalisation, and fcos_model."""

import pytest
import torch
from architecture_samples import assert_same_outputs, tensors_equal, through_json
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import model_architectures
from model_architectures import build, rebuild


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2"])
def test_frcnn_model_has_the_published_layout(backbone):
    with torch.device("meta"):
        model = model_architectures.frcnn_model(6, backbone=backbone)
    assert model.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    assert model.rpn.anchor_generator.aspect_ratios == ((0.5, 1.0, 2.0),)
    assert model.roi_heads.box_roi_pool.output_size == (7, 7)
    assert model.rpn.head.conv[0][0].in_channels == model.backbone.out_channels
    assert any(key.startswith("backbone.0.") for key in model.state_dict())  # nn.Sequential of the children


@pytest.mark.parametrize(
    ("name", "backbone", "kwargs", "prefix", "source"),
    [
        ("fcos_model", "resnet18", {"backbone": "resnet18"}, "backbone.body.", ""),
        ("fcos_model", "mobilenet_v2", {"backbone": "mobilenet_v2"}, "backbone.body.", "features."),
        ("frcnn_model", "mobilenet_v2", {"backbone": "mobilenet_v2"}, "backbone.", "features."),
        ("ssdlite320_mobilenet_v3_large", "mobilenet_v3_large", {}, "backbone.features.1.3.", "features.16."),
    ],
)
def test_weights_backbone_fills_the_backbone(pretend, name, backbone, kwargs, prefix, source):
    pretrained = pretend(backbone)
    model = build(name, 3, weights_backbone="IMAGENET1K_V1", **kwargs)
    filled = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(prefix)}
    assert filled
    assert tensors_equal(filled, {key: pretrained[source + key.removeprefix(prefix)] for key in filled})
    rebuild(through_json(model.architecture)).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("name", "eps", "arguments"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 1e-5, {"trainable_backbone_layers": 2}),
        ("fasterrcnn_resnet50_fpn", 0.0, {}),
    ],
)
def test_a_rebuilt_detector_has_the_norm_layers_of_the_pretrained_one(pretend, name, eps, arguments):
    pretend(name)
    model = build(name, 3, weights="COCO_V1", min_size=64, max_size=64, box_score_thresh=0.0, **arguments)
    again = rebuild(through_json(model.architecture))
    again.load_state_dict(model.state_dict())
    assert {module.eps for module in again.modules() if isinstance(module, FrozenBatchNorm2d)} == {eps}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in again.modules())
    assert not all(parameter.requires_grad for parameter in model.backbone.body.parameters())  # torchvision's freezing
    assert_same_outputs(model, again)


def test_fcos_model_trains_a_step_and_detects():
    torch.manual_seed(0)
    model = build("fcos_model", 3, width=16, score_thresh=0.0)
    images = [torch.rand(3, 128, 128), torch.rand(3, 96, 128)]
    target = {"boxes": torch.tensor([[10.0, 20.0, 60.0, 80.0]]), "labels": torch.tensor([2])}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = []
    for _ in range(4):
        loss = sum(model(images, [target, target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0]
    levels = model.backbone(torch.rand(1, 3, 96, 160)).values()
    assert [tuple(level.shape[1:]) for level in levels] == [(64, 12, 20), (64, 6, 10), (64, 3, 5)]
    assert model.anchor_generator.sizes == ((8,), (16,), (32,))
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.inference_mode():
        for image, found in zip(images, model.eval()(images), strict=True):
            assert len(found["boxes"]) > 0 and set(found["labels"].tolist()) <= {0, 1, 2}
            height, width = image.shape[-2:]
            assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()


@pytest.mark.parametrize(
    ("backbone", "slim"),
    [("slim_resnet", {"layers": [1, 2, 1, 1], "width": 16}), ("resnet18", {}), ("resnet50", {}), ("mobilenet_v2", {})],
)
def test_fcos_backbone_layers_match_the_classifier_of_the_same_name(backbone, slim):
    with torch.device("meta"):
        classifier, detector = build(backbone, 5, **slim), build("fcos_model", 3, backbone=backbone, **slim)
    body = {key: value.shape for key, value in detector.backbone.body.state_dict().items()}
    own = {key.removeprefix("features."): value.shape for key, value in classifier.state_dict().items()}
    assert own.keys() - body.keys() == {key for key in own if key.startswith(("fc.", "classifier."))}
    assert all(own[key] == shape for key, shape in body.items())


def slim(num_classes=3, **kwargs):
    return build("slim_resnet", num_classes, layers=[1, 1], width=8, **kwargs)


def test_recorded_keywords_of_fcos_model_rebuild_it():
    """Manifests record the keywords of slim_resnet beside those of fcos_model; None asks for the default."""
    kwargs = {"layers": [1, 1], "width": 8, "stem_kernel": 7, "out_channels": 32, "score_thresh": 0.1}
    model = rebuild({"name": "fcos_model", "num_classes": 3, "kwargs": kwargs})
    body = model.backbone.body
    assert body.conv1.weight.shape == (8, 3, 7, 7) and len(body.layer2) == 1 and model.score_thresh == 0.1
    defaults = rebuild({"name": "fcos_model", "num_classes": 3, "kwargs": {"layers": None, "width": None}})
    assert shapes_of(defaults) == shapes_of(build("fcos_model", 3))
    with pytest.raises(ValueError, match="widht; allowed: .*layers.*stem_kernel.*width"):
        build("fcos_model", 3, widht=8)


def shapes_of(model):
    return {key: value.shape for key, value in model.state_dict().items()}


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
