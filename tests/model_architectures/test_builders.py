"""model_architectures: every name, pretrained weights without a network, rebuilding, and weights from files."""

import json
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.ops import FrozenBatchNorm2d

import model_architectures
from model_architectures import architecture_of, build, load_weights, names, num_classes_of, rebuild, registry

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


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    """A test that did not provide pretrained weights itself fails when something asks for them."""
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda weights, *_, **__: pytest.fail(f"downloads {weights}"))


def small_vgg_init(self, features, num_classes=1000, init_weights=True, dropout=0.5):
    """A VGG of the same layer names without the 120 million weights of its classifier, which cost seconds here."""
    nn.Module.__init__(self)
    self.features = features
    self.classifier = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4, num_classes))


@pytest.fixture
def pretend(monkeypatch):
    """Makes torchvision "download" the state dict of a model of its own with random weights, and returns that."""
    monkeypatch.setattr(torchvision.models.VGG, "__init__", small_vgg_init)

    def provide(function, weights="DEFAULT", **kwargs):
        member = torchvision.models.get_model_weights(function)[weights]
        kwargs |= {"weights_backbone": None} if function in DETECTORS else {}
        kwargs["num_classes"] = len(member.meta["categories"] or range(1000))
        state = torchvision.models.get_model(function, weights=None, **kwargs).state_dict()
        monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda weights, *args, **kwargs: state)
        return state

    return provide


def fresh_layers(model, pretrained):
    """The layers that do not have the pretrained weights; every tensor is either that or of another shape."""
    fresh = set()
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in pretrained or tensor.shape != pretrained[key].shape:
            fresh.add(key.rpartition(".")[0])
        elif not torch.equal(tensor, pretrained[key]):
            fresh.add(f"changed: {key}")
    return fresh


def through_json(architecture):
    return json.loads(json.dumps(architecture))


def tensors_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_outputs(model, again):
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        expected, got = model.eval()(images), again.eval()(images)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert isinstance(expected, torch.Tensor) or all(len(found["boxes"]) > 0 for found in expected)


@pytest.mark.parametrize("name", names())
def test_every_name_builds_on_meta_with_the_classes_asked_for(name):
    with torch.device("meta"):
        model = build(name, 3).eval()
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
        assert through_json(model.architecture)["name"] == name
        if name in CLASSIFIERS or name in GEMEL_CLASSIFIERS or name == "slim_resnet":
            assert model(torch.empty(2, 3, 224, 224)).shape == (2, 3)
        else:
            del model.architecture  # the heads tell, whoever built the detector
            assert num_classes_of(model) == 3


def test_torchvisions_and_gemels_and_the_small_models_are_there():
    functions = [*GEMEL_CLASSIFIERS, *GEMEL_DETECTORS, "slim_resnet", "fcos_model"]
    assert set(names()) >= {*CLASSIFIERS, *DETECTORS, *functions}
    with torch.device("meta"):
        for name in functions:
            model = getattr(model_architectures, name)(4)
            assert model.architecture["name"] == name and num_classes_of(model) == 4


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2"])
def test_frcnn_model_has_the_published_layout(backbone):
    with torch.device("meta"):
        model = model_architectures.frcnn_model(6, backbone=backbone)
    assert model.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    assert model.rpn.anchor_generator.aspect_ratios == ((0.5, 1.0, 2.0),)
    assert model.roi_heads.box_roi_pool.output_size == (7, 7)
    assert model.rpn.head.conv[0][0].in_channels == model.backbone.out_channels
    assert any(key.startswith("backbone.0.") for key in model.state_dict())  # nn.Sequential of the children


def test_published_names_build_what_was_published():
    with torch.device("meta"):
        inception = model_architectures.inceptionv3(2)
        mobilenet = model_architectures.mobilenetv3(2)
        full_tail = model_architectures.ssd_mobilenet_model(2)
        plain = build("ssdlite320_mobilenet_v3_large", 2)
    assert inception.AuxLogits is None and inception.aux_logits is False and inception.transform_input is True
    shape = mobilenet.features[16][0].weight.shape  # the last layer
    assert full_tail.backbone.features[1][-1][0].weight.shape == shape != plain.backbone.features[1][-1][0].weight.shape


@pytest.mark.parametrize(("name", "head"), [(name, head) for head, models in HEADS.items() for name in models])
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
    ("name", "function", "arguments", "head"),
    [
        ("googlenet", "googlenet", {}, {"fc"}),
        ("googlenet", "googlenet", {"aux_logits": True}, {"fc", "aux1.fc2", "aux2.fc2"}),
        ("inception_v3", "inception_v3", {}, {"fc", "AuxLogits.fc"}),
        ("inceptionv3", "inception_v3", {}, {"fc"}),
    ],
)
@pytest.mark.filterwarnings("ignore:auxiliary heads")
def test_inception_heads_and_input_are_rebuilt_as_the_weights_set_them(pretend, name, function, arguments, head):
    pretrained = pretend(function, init_weights=False)
    model = build(name, 5, weights="DEFAULT", **arguments)
    assert fresh_layers(model, pretrained) == head
    quick = {**model.architecture["kwargs"], "init_weights": False}
    again = rebuild(through_json({**model.architecture, "kwargs": quick}))
    again.load_state_dict(model.state_dict())
    assert again.aux_logits is model.aux_logits is (len(head) > 1)
    assert_same_outputs(model, again)
    again.transform_input = False  # what the weights had turned on, and what the line above sees
    with pytest.raises(AssertionError):
        assert_same_outputs(model, again)


def test_vgg_features_only_weights_leave_the_whole_classifier_fresh(pretend):
    pretrained = pretend("vgg16", "IMAGENET1K_FEATURES")
    for key, tensor in pretrained.items():
        if key.startswith("classifier."):
            tensor.fill_(float("nan"))  # as in the published file
    model = build("vgg16", 1000, weights="IMAGENET1K_FEATURES")
    assert all(tensor.isfinite().all() for tensor in model.parameters())
    assert torch.equal(model.features[0].weight, pretrained["features.0.weight"])


def test_weights_that_set_the_image_size_are_rebuilt_with_it(pretend):
    pretend("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", image_size=384)
    with torch.device("meta"), pytest.warns(UserWarning, match="non-meta"):
        model = build("vit_b_16", 5, weights="IMAGENET1K_SWAG_E2E_V1")
        again = rebuild(through_json(model.architecture))
    assert again.encoder.pos_embedding.shape == model.encoder.pos_embedding.shape == (1, 577, 768)


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
    ("name", "arguments", "message"),
    [
        ("resnet18", {"weights": "IMAGENET1K_V9"}, "resnet18: weights: got 'IMAGENET1K_V9'.*IMAGENET1K_V1, DEFAULT"),
        ("resnet18", {"weights": torchvision.models.ResNet50_Weights.DEFAULT}, "resnet18: weights: .*allowed"),
        ("resnet18", {"weights_backbone": "DEFAULT"}, "this is a classifier"),
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


def test_slim_resnet_at_48_px():
    model = build("slim_resnet", 4)
    assert model(torch.rand(2, 3, 48, 48)).shape == (2, 4)
    assert [getattr(model, f"layer{i}")[1].conv2.out_channels for i in range(1, 5)] == [32, 64, 128, 256]


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


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("slim_resnet", lambda state: state),
        ("slim_resnet", lambda state: {"state_dict": state, "epoch": 7}),
        ("slim_resnet", lambda state: {"model": {f"module.{key}": value for key, value in state.items()}}),
        ("slim_resnet", lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}),
        ("mnasnet0_5", dict),  # without the version that its load_state_dict asks for
        # the feature pyramid of older versions of torchvision
        ("fcos_model", lambda state: {k.replace("blocks.0.0.", "blocks.0."): state[k] for k in state}),
    ],
)
def test_load_weights_reads_the_usual_layouts(tmp_path, name, wrap):
    trained, model = build(name, 3), build(name, 3)
    torch.save(wrap(trained.state_dict()), tmp_path / "weights.pth")
    assert load_weights(model, tmp_path / "weights.pth") is model
    assert tensors_equal(model.state_dict(), trained.state_dict())


def test_load_weights_lists_what_does_not_fit_and_leaves_the_model_alone(tmp_path):
    state = slim(num_classes=5).state_dict()
    del state["bn1.weight"], state["bn1.bias"]
    state["head.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pt")
    model = slim()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(model, tmp_path / "other.pt")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'other.pt'}: the weights do not fit the model",
        "  missing: bn1: weight, bias",
        "  unexpected: head: weight",
        "  another shape: fc.weight: got (5, 16), expected (3, 16)",
        "  another shape: fc.bias: got (5,), expected (3,)",
    ]
    assert tensors_equal(model.state_dict(), before)


def test_load_weights_caps_a_long_list(tmp_path):
    torch.save({"fc.weight": torch.zeros(3, 16), "fc.bias": torch.zeros(3)}, tmp_path / "head.pt")
    with pytest.raises(ValueError, match=r"  missing: and \d+ more") as caught:
        load_weights(slim(), tmp_path / "head.pt")
    assert len(str(caught.value).splitlines()) == 1 + 8 + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as weights"),
        (b"not a checkpoint", "cannot be read as weights"),
        (b"", "cannot be read as weights"),
        (nn.Linear(2, 2), "cannot be read as weights: .*model.state_dict"),
        ([torch.zeros(2)], "got a list; allowed: a state dict"),
        ({}, "got an empty dictionary"),
        ({"epoch": 3, "loss": 0.5}, "got a dictionary of epoch: int, loss: float"),
    ],
)
def test_load_weights_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(slim(), path)
    assert str(caught.value).startswith(str(path))


def test_load_weights_skips_auxiliary_classifiers_that_are_off(tmp_path):
    full = build("googlenet", 3, aux_logits=True, init_weights=False)
    torch.save(full.state_dict(), tmp_path / "full.pt")
    model = load_weights(build("googlenet", 3, aux_logits=False, init_weights=False), tmp_path / "full.pt")
    assert torch.equal(model.fc.weight, full.fc.weight)
    with pytest.raises(ValueError, match="unexpected: aux1"):  # only if the model says that they are off
        model.aux_logits = None
        load_weights(model, tmp_path / "full.pt")
