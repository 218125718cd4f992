"""Detectors: those of torchvision, those named in the published Gemel repository, and fcos_model for a CPU.

Input: list of Tensor[3, H, W] in [0, 1] and, in training mode, targets {"boxes": Tensor[n, 4] in pixels, "labels"}.
Output: a dictionary of losses in training mode, else one {"boxes", "labels", "scores"} per image. `num_classes` counts
the background as class 0, as torchvision does: a detector of cars and people has 3, with labels 1 and 2.
`trainable_backbone_layers` is torchvision's and has an effect only together with pretrained weights.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from model_architectures.classifiers import slim_resnet
from model_architectures.registry import Pretrained, architecture_of, register
from model_architectures.weights import named_tensors, weights_member
from model_architectures.yolov3 import YOLOv3

SSDLITE = "ssdlite320_mobilenet_v3_large"
FCOS_BACKBONES = ("slim_resnet", "resnet18", "resnet34", "resnet50", "mobilenet_v2")
SLIM_ARGUMENTS = ("layers", "width", "stem_kernel")  # of slim_resnet, passed on by fcos_model
FRCNN_BACKBONES = ("resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2")


def num_classes_of(model: nn.Module) -> int | None:
    """Number of class outputs; for a detector it includes the background, as in torchvision. None: unknown.

    Read from a YOLOv3 or from the heads of a torchvision detector, built here or elsewhere; for other models from the
    architecture that was recorded when they were built here.
    """
    if isinstance(model, RetinaNet | FCOS):
        return getattr(model.head.classification_head, "num_classes", None)
    if isinstance(model, YOLOv3):
        return model.num_classes
    if isinstance(model, SSD):
        return getattr(model.head.classification_head, "num_columns", None)
    if isinstance(model, GeneralizedRCNN):
        predictor = getattr(model.roi_heads, "box_predictor", None)
        return getattr(getattr(predictor, "cls_score", None), "out_features", None)
    architecture = architecture_of(model)
    return architecture["num_classes"] if architecture else None


def fcos_model(
    num_classes: int,
    backbone: str = "slim_resnet",
    out_channels: int = 64,
    head_convs: int = 2,
    min_size: int = 128,
    max_size: int = 256,
    **kwargs: Any,
) -> FCOS:
    """A small FCOS for images of about 96 to 256 px, on a feature pyramid with levels of strides 8, 16 and 32.

    num_classes: with the background as class 0 (FCOS learns never to predict 0; no label may be 0).
    backbone: one of FCOS_BACKBONES; its layers have the shapes and names of the classifier of the same name, below
    `backbone.body`. out_channels: of the pyramid, a multiple of 32. head_convs: convolutions before each output
    (torchvision's FCOS has 4). The shorter side of an image is scaled to `min_size`; the longer side is at most
    `max_size`. kwargs: `layers`, `width` and `stem_kernel` of slim_resnet, for that backbone only; arguments of
    torchvision's FCOS (score_thresh, image_mean, ...) and of its GeneralizedRCNNTransform. Raises ValueError on other
    arguments and values.
    """
    slim = {key: kwargs.pop(key, None) for key in SLIM_ARGUMENTS}
    slim = {key: value for key, value in slim.items() if value is not None}
    if slim and backbone != "slim_resnet":
        raise ValueError(f"fcos_model: {', '.join(slim)}: allowed for backbone 'slim_resnet' only, got {backbone!r}")
    if not isinstance(out_channels, int) or out_channels < 32 or out_channels % 32:
        raise ValueError(f"fcos_model: out_channels: got {out_channels!r}; allowed: multiples of 32 (GroupNorm)")
    _refuse_unknown("fcos_model", kwargs, FCOS, SLIM_ARGUMENTS)
    body = _fcos_body(backbone, None, **slim)
    channels = [_out_channels(body[level]) for level in body.return_layers]
    pyramid = BackboneWithFPN(body, body.return_layers, channels, out_channels)
    pyramid.fpn.extra_blocks = None  # no level of stride 64: on small images it has two cells a side
    strides = tuple((8 * 2**index,) for index in range(len(channels)))  # an FCOS "anchor" is as large as the stride
    anchors = AnchorGenerator(strides, ((1.0,),) * len(strides))
    head = FCOSHead(out_channels, 1, num_classes, num_convs=head_convs)
    return FCOS(pyramid, num_classes, min_size, max_size, anchor_generator=anchors, head=head, **kwargs)


def _fcos_body(backbone: str, weights: Any, **slim: Any) -> IntermediateLayerGetter:
    """The backbone without its classifier; it returns the features of strides 8, 16 and 32."""
    if backbone not in FCOS_BACKBONES:
        raise ValueError(f"fcos_model: backbone: got {backbone!r}; allowed: {', '.join(FCOS_BACKBONES)}")
    if backbone == "slim_resnet":
        body = slim_resnet(1, **slim)
    else:
        weights = weights_member(backbone, weights, "weights_backbone")
        body = torchvision.models.get_model(backbone, weights=weights, progress=False)
    if backbone == "mobilenet_v2":
        return IntermediateLayerGetter(body.features, {"6": "0", "13": "1", "18": "2"})
    stages = [name for name, _ in body.named_children() if name.startswith("layer")]
    if len(stages) < 2:
        raise ValueError("fcos_model: layers: got one stage; allowed: two to four, as the pyramid begins at the second")
    return IntermediateLayerGetter(body, {stage: str(level) for level, stage in enumerate(stages[1:])})


def _out_channels(stage: nn.Module) -> int:
    """Output channels of the last convolution of a module."""
    return [module.out_channels for module in stage.modules() if isinstance(module, nn.Conv2d)][-1]


def frcnn_model(num_classes: int, backbone: str = "resnet50", **kwargs: Any) -> FasterRCNN:
    """Faster R-CNN on a backbone with one feature map, with the state-dict keys of the published Gemel repository.

    backbone: one of FRCNN_BACKBONES. kwargs: those of torchvision's FasterRCNN (min_size, box_score_thresh, ...).
    Raises ValueError on other arguments.
    """
    _refuse_unknown("frcnn_model", kwargs, FasterRCNN)
    features: Any = _frcnn_body(backbone, None)
    features.out_channels = _out_channels(features)
    return FasterRCNN(
        features,
        num_classes,
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(featmap_names=["0"], output_size=7, sampling_ratio=2),
        **kwargs,
    )


def _frcnn_body(backbone: str, weights: Any) -> nn.Sequential:
    """The backbone without its pooling and classifier."""
    if backbone not in FRCNN_BACKBONES:
        raise ValueError(f"frcnn_model: backbone: got {backbone!r}; allowed: {', '.join(FRCNN_BACKBONES)}")
    weights = weights_member(backbone, weights, "weights_backbone")
    model = torchvision.models.get_model(backbone, weights=weights, progress=False)
    if hasattr(model, "features"):
        return model.features
    return nn.Sequential(*list(model.children())[:-2])  # without avgpool and fc


def _pretrained_backbone(model: str, weights: Any, weights_backbone: Any, **kwargs: Any) -> Pretrained:
    """The pretrained weights of torchvision's classifier, as backbone of fcos_model or frcnn_model."""
    make, body, prefix = _WITH_BACKBONE[model]
    backbone = kwargs.get("backbone", inspect.signature(make).parameters["backbone"].default)
    if weights is not None or backbone == "slim_resnet":
        raise ValueError(f"{model}: got pretrained weights; allowed: weights_backbone, for a backbone of torchvision")
    donor = body(backbone, weights_backbone)
    return Pretrained({prefix + name: tensor for name, tensor in named_tensors(donor).items()}, {})


def _refuse_unknown(name: str, kwargs: dict[str, Any], detector: type, own: Sequence[str] = ()) -> None:
    """Raises ValueError on unknown arguments, which torchvision's detectors ignore. own: arguments of the builder."""
    known = {*inspect.signature(detector).parameters, *inspect.signature(GeneralizedRCNNTransform).parameters}
    known = known - {"kwargs"} | {"_skip_resize", *own}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise ValueError(f"{name}: unknown arguments {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")


def _torchvision_detector(
    function: str, num_classes: int, frozen_norm_eps: float | None = None, reduced_tail: bool = True, **kwargs: Any
) -> nn.Module:
    """The model of a torchvision function, without weights.

    frozen_norm_eps: eps of the FrozenBatchNorm2d that torchvision uses in pretrained backbones; None: BatchNorm2d.
    reduced_tail: for ssdlite, whether the last stage of MobileNetV3 has half its channels.
    """
    kwargs.pop("trainable_backbone_layers", None)  # without weights torchvision ignores it, and warns
    builder = torchvision.models.get_model_builder(function)
    model = builder(weights=None, weights_backbone=None, num_classes=num_classes, **kwargs)
    _refuse_unknown(function, kwargs, type(model))
    if frozen_norm_eps is not None:
        _freeze_norms(model.backbone, frozen_norm_eps)
    if function == SSDLITE and not reduced_tail:
        _widen_tail(model, num_classes)
    return model


def _freeze_norms(module: nn.Module, eps: float) -> None:
    """Replaces every BatchNorm2d below the module by a FrozenBatchNorm2d."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps))
        else:
            _freeze_norms(child, eps)


def _widen_tail(model: SSD, num_classes: int) -> None:
    """Gives an ssdlite the full tail of MobileNetV3, as torchvision does only when it loads a pretrained backbone."""
    norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # as torchvision sets it for this model
    features = torchvision.models.mobilenet_v3_large(norm_layer=norm_layer, reduced_tail=False).features
    last_strided = [index for index, block in enumerate(features) if getattr(block, "_is_cn", False)][-1]
    model.backbone = SSDLiteFeatureExtractorMobileNet(features, last_strided, norm_layer)
    channels = retrieve_out_channels(model.backbone, (320, 320))
    model.head = SSDLiteHead(channels, model.anchor_generator.num_anchors_per_location(), num_classes, norm_layer)


def _pretrained_detector(function: str, weights: Any, weights_backbone: Any, **kwargs: Any) -> Pretrained:
    """The tensors of torchvision's pretrained model, and the arguments that its structure depends on."""
    weights = weights_member(function, weights)
    if weights_backbone is not None:
        backbone = next(name for name in ("resnet50", "mobilenet_v3_large", "vgg16") if name in function)
        weights_backbone = weights_member(backbone, weights_backbone, "weights_backbone")
    for ours in ("frozen_norm_eps", "reduced_tail", *(["num_keypoints"] if weights else [])):
        kwargs.pop(ours, None)
    builder = torchvision.models.get_model_builder(function)
    donor = builder(weights=weights, weights_backbone=weights_backbone, progress=False, **kwargs)
    frozen = [module.eps for module in donor.modules() if isinstance(module, FrozenBatchNorm2d)]
    structure: dict[str, Any] = {"frozen_norm_eps": frozen[0]} if frozen else {}
    if function == SSDLITE:
        structure["reduced_tail"] = weights is not None
    return Pretrained(named_tensors(donor), structure)


_WITH_BACKBONE: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], str]] = {
    "fcos_model": (fcos_model, _fcos_body, "backbone.body."),
    "frcnn_model": (frcnn_model, _frcnn_body, "backbone."),
}
for _name, (_make, *_) in _WITH_BACKBONE.items():
    register(_name, partial(_pretrained_backbone, _name))(_make)
for _name in torchvision.models.list_models(module=torchvision.models.detection):
    register(_name, partial(_pretrained_detector, _name))(partial(_torchvision_detector, _name))
register("ssd_vgg_model", partial(_pretrained_detector, "ssd300_vgg16"))(partial(_torchvision_detector, "ssd300_vgg16"))
# Published with the full tail, which has more layers in common with mobilenetv3 than torchvision's default.
_ssd_mobilenet = partial(_torchvision_detector, SSDLITE, reduced_tail=False)
register("ssd_mobilenet_model", partial(_pretrained_detector, SSDLITE))(_ssd_mobilenet)
