"""Every builder by name: what it builds, what it refuses, and how a model is rebuilt from its architecture."""

from functools import partial

import pytest
import torch
import torchvision
from architecture_samples import assert_same_outputs, fresh_layers, through_json
from torch import nn

import model_architectures
from model_architectures import architecture_of, build, names, num_classes_of, rebuild, registry

CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
DETECTORS = torchvision.models.list_models(module=torchvision.models.detection)
GEMEL_CLASSIFIERS = ["resnet18", "resnet50", "resnet101", "resnet152", "vgg16", "inceptionv3", "mobilenetv3"]
GEMEL_DETECTORS = ["ssd_vgg_model", "ssd_mobilenet_model", "frcnn_model"]
BOX_HEAD = "roi_heads.box_predictor.cls_score roi_heads.box_predictor.bbox_pred"
HEADS = {  # the layers whose shape follows the number of classes: one small model of every family that has them
    "classifier": ["densenet121"],
    "classifier.1": ["efficientnet_b0", "mnasnet0_5", "mobilenet_v2", "squeezenet1_1"],
    "classifier.2": ["convnext_tiny"],
    "classifier.3": ["mobilenet_v3_small"],
    "classifier.5": ["maxvit_t"],
    "classifier.6": ["alexnet"],
    "fc": ["regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"],
    "head": ["swin_t", "swin_v2_t"],
    "heads.head": ["vit_b_32"],
    "head.classification_head.cls_logits": ["fcos_resnet50_fpn", "retinanet_resnet50_fpn_v2"],
    " ".join(f"head.classification_head.module_list.{level}" for level in range(6)): ["ssd300_vgg16"],
    " ".join(f"head.classification_head.module_list.{i}.1" for i in range(6)): ["ssdlite320_mobilenet_v3_large"],
    BOX_HEAD: ["fasterrcnn_mobilenet_v3_large_320_fpn", "keypointrcnn_resnet50_fpn"],
    f"{BOX_HEAD} roi_heads.mask_predictor.mask_fcn_logits": ["maskrcnn_resnet50_fpn"],
}


@pytest.mark.parametrize("name", names())
def test_every_name_builds_on_meta_with_the_classes_asked_for(name):
    with torch.device("meta"):
        model = build(name, 3).eval()
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
        assert through_json(model.architecture)["name"] == name
        if name in CLASSIFIERS or name in GEMEL_CLASSIFIERS or name == "slim_resnet":
            assert model(torch.empty(2, 3, 224, 224)).shape == (2, 3)
        else:
            del model.architecture  # read from the heads, also of detectors built elsewhere
            assert num_classes_of(model) == 3


def test_torchvisions_and_gemels_and_the_small_models_are_there():
    functions = [*GEMEL_CLASSIFIERS, *GEMEL_DETECTORS, "slim_resnet", "fcos_model"]
    assert set(names()) >= {*CLASSIFIERS, *DETECTORS, *functions}
    with torch.device("meta"):
        for name in functions:
            model = getattr(model_architectures, name)(4)
            assert model.architecture["name"] == name and num_classes_of(model) == 4


def test_published_names_build_what_was_published():
    with torch.device("meta"):
        inception = model_architectures.inceptionv3(2)
        mobilenet = model_architectures.mobilenetv3(2)
        full_tail = model_architectures.ssd_mobilenet_model(2)
        plain = build("ssdlite320_mobilenet_v3_large", 2)
    assert inception.AuxLogits is None and inception.aux_logits is False and inception.transform_input is True
    shape = mobilenet.features[16][0].weight.shape  # the last layer
    assert full_tail.backbone.features[1][-1][0].weight.shape == shape != plain.backbone.features[1][-1][0].weight.shape


@pytest.mark.parametrize(
    ("name", "head"),
    [
        pytest.param(name, head, marks=[pytest.mark.exhaustive] if number else [])
        for head, models in HEADS.items()
        for number, name in enumerate(models)
    ],
)
def test_another_number_of_classes_replaces_the_head_and_keeps_the_body(pretend, name, head):
    pretrained = pretend(name)
    model = build(name, 5, weights="DEFAULT")
    assert fresh_layers(model, pretrained) == set(head.split())
    assert num_classes_of(model) == 5
    assert all(tensor.isfinite().all() for tensor in model.parameters())


def test_the_same_number_of_classes_keeps_the_head(pretend):
    pretrained = pretend("resnet18")
    assert not fresh_layers(build("resnet18", 1000, torchvision.models.ResNet18_Weights.IMAGENET1K_V1), pretrained)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {"weights": "IMAGENET1K_V9"}, "resnet18: weights: got 'IMAGENET1K_V9'.*IMAGENET1K_V1, DEFAULT"),
        ("resnet18", {"weights": torchvision.models.ResNet50_Weights.DEFAULT}, "resnet18: weights: .*allowed"),
        ("resnet18", {"weights_backbone": "DEFAULT"}, "allowed: None for a classifier"),
        ("fcos_resnet50_fpn", {"weights_backbone": "COCO_V1"}, "weights_backbone: got 'COCO_V1'.*IMAGENET1K_V1"),
        ("slim_resnet", {"weights": "DEFAULT"}, "slim_resnet: weights: got 'DEFAULT'; there are none"),
        ("fcos_model", {"weights": "DEFAULT"}, "fcos_model: got pretrained weights; allowed: weights_backbone"),
        ("fcos_model", {"weights_backbone": "DEFAULT"}, "for a backbone of torchvision"),
        ("resnet18", {"pretrained": True}, "kwargs: got 'pretrained'"),
        ("resnet18", {"norm_layer": nn.BatchNorm2d}, "norm_layer: got .*plain JSON values"),
        ("slim_resnet", {"layers": []}, "layers: got"),
        ("slim_resnet", {"layers": [2, 0]}, "layers: got"),
        ("slim_resnet", {"layers": [1.5]}, "layers: got"),
        ("slim_resnet", {"width": 0}, "width: got 0"),
        ("slim_resnet", {"stem_kernel": 4}, "stem_kernel: got 4; allowed: 3, 7"),
        ("fcos_model", {"backbone": "vgg16"}, "backbone: got 'vgg16'; allowed: slim_resnet, resnet18"),
        ("fcos_model", {"backbone": "resnet18", "width": 16}, "width: allowed for backbone 'slim_resnet' only"),
        ("fcos_model", {"out_channels": 48}, "out_channels: got 48; allowed: multiples of 32"),
        ("fcos_model", {"layers": [2]}, "layers: got one stage"),
        ("fcos_model", {"min_sizes": 96}, "unknown arguments min_sizes"),
        ("frcnn_model", {"backbone": "x", "weights_backbone": "DEFAULT"}, "backbone: got 'x'; allowed: resnet18"),
    ],
)
def test_build_refuses_weights_and_arguments_that_do_not_exist(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, 3, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("slim_resnet", {"layers": (1, 2, 1), "width": 8, "stem_kernel": 7}),
        ("mobilenetv3", {"dropout": 0.1}),
        ("regnet_y_400mf", {}),
        ("inceptionv3", {"init_weights": False}),
        ("fcos_model", {"width": 8, "score_thresh": 0.0, "min_size": 96, "head_convs": 1}),
        ("ssd_mobilenet_model", {"score_thresh": 0.0}),
    ],
)
def test_a_rebuilt_model_computes_the_same(name, arguments):
    model = build(name, 3, **arguments)
    again = rebuild(through_json(model.architecture))
    again.load_state_dict(model.state_dict())
    assert_same_outputs(model, again)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("resnet18", "architecture: got 'resnet18'"),
        ({"name": "resnet18", "num_classes": 3}, "allowed is {name, num_classes, kwargs}"),
        ({"name": "resnet81", "num_classes": 3, "kwargs": {}}, "unknown model 'resnet81'; did you mean resnet18"),
        ({"name": ["resnet18"], "num_classes": 3, "kwargs": {}}, "unknown model"),
        ({"name": "resnet18", "num_classes": True, "kwargs": {}}, "num_classes: got True"),
        ({"name": "resnet18", "num_classes": 0, "kwargs": {}}, "num_classes: got 0"),
        ({"name": "resnet18", "num_classes": 3, "kwargs": [1]}, r"kwargs: got \[1\]; allowed: a dictionary"),
        ({"name": "resnet18", "num_classes": 3, "kwargs": {"weights": "DEFAULT"}}, "kwargs: got 'weights'"),
        ({"name": "resnet18", "num_classes": 3, "kwargs": {"depth": 7}}, "resnet18: kwargs: .*cannot build with them"),
        ({"name": "slim_resnet", "num_classes": 3, "kwargs": {"layers": ["x"]}}, "slim_resnet: kwargs: .*layers"),
        ({"name": "slim_resnet", "num_classes": 3, "kwargs": {"num_classes": 3}}, "cannot build with them"),
        ({"name": "fcos_model", "num_classes": 3, "kwargs": {"backbone": "os.system"}}, "backbone: got 'os.system'"),
        ({"name": "ssd300_vgg16", "num_classes": 3, "kwargs": {"scor_thresh": 1}}, "unknown arguments scor_thresh"),
    ],
)
def test_rebuild_refuses_what_a_file_should_not_hold(architecture, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        rebuild(architecture)


def test_architecture_of_notices_a_replaced_head():
    model = build("slim_resnet", 3, width=8)
    assert architecture_of(model) == {"name": "slim_resnet", "num_classes": 3, "kwargs": {"width": 8}}
    model.fc = nn.Linear(model.fc.in_features, 7)
    assert architecture_of(model) is None and num_classes_of(model) is None
    assert architecture_of(nn.Linear(2, 2)) is None


def test_a_name_is_registered_once(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    registry.register("pico_linear")(partial(nn.Linear, 2))
    assert build("pico_linear", 5).out_features == 5
    with pytest.raises(ValueError, match="already registered under the name 'pico_linear'"):
        registry.register("pico_linear")(partial(nn.Linear, 2))


def test_an_unknown_name_lists_near_misses_and_all_names():
    with pytest.raises(ValueError, match="unknown model 'resnet_18'; did you mean resnet18 or ") as caught:
        build("resnet_18", 3)
    assert all(name in str(caught.value) for name in names())
