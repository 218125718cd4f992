"""Classifiers: those of torchvision, those named in the published Gemel repository, and slim_resnet for a CPU.

Input: Tensor[N, 3, H, W]; output: Tensor[N, num_classes]. Only inception_v3 and googlenet with auxiliary classifiers
(`aux_logits`, on by default as in torchvision) return a tuple in training mode.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchvision.models.resnet import BasicBlock

from model_architectures.registry import Pretrained, register
from model_architectures.weights import AUXILIARY, named_tensors, weights_member

# Arguments whose default torchvision changes if weights are given (googlenet, inception_v3; ViT with SWAG weights).
SET_BY_WEIGHTS = ("aux_logits", "transform_input", "image_size")


class SlimResNet(nn.Module):
    """A ResNet of BasicBlocks of any width, with the layer names and strides of torchvision's (see slim_resnet)."""

    def __init__(self, num_classes: int, layers: Sequence[int], width: int, stem_kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, stem_kernel, stride=2, padding=stem_kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stages = [f"layer{index}" for index in range(1, len(layers) + 1)]
        channels = width
        for index, (stage, depth) in enumerate(zip(self.stages, layers, strict=True)):
            self.add_module(stage, _stage(channels, width * 2**index, depth, stride=1 if index == 0 else 2))
            channels = width * 2**index
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or in_channels != channels:
        convolution = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)
        downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))
    first = BasicBlock(in_channels, channels, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(depth - 1)))


@register("slim_resnet")
def slim_resnet(
    num_classes: int, layers: Sequence[int] = (2, 2, 2, 2), width: int = 32, stem_kernel: int = 3
) -> SlimResNet:
    """A small ResNet for images of about 48 to 128 px, with torchvision's layer names (conv1, bn1, layer1, ..., fc).

    layers: number of BasicBlocks per stage, one to four stages. width: channels of the first stage; each stage has
    twice as many as the one before. stem_kernel: 3 (for small images) or 7 (as in torchvision). The strides after the
    stages are 4, 8, 16 and 32. Raises ValueError on other values. It has no pretrained weights.
    """
    if not 1 <= len(layers) <= 4 or not all(isinstance(depth, int) and depth >= 1 for depth in layers):
        raise ValueError(f"slim_resnet: layers: got {layers!r}; allowed: one to four integers from 1 on")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"slim_resnet: width: got {width!r}; allowed: an integer from 1 on")
    if stem_kernel not in (3, 7):
        raise ValueError(f"slim_resnet: stem_kernel: got {stem_kernel!r}; allowed: 3, 7")
    return SlimResNet(num_classes, layers, width, stem_kernel)


def _torchvision_classifier(function: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """The model of a torchvision function, without weights, on the default device (also the meta device)."""
    if function in ("googlenet", "inception_v3"):
        kwargs.setdefault("init_weights", True)  # the default of torchvision, which warns if it is not stated
    make = partial(torchvision.models.get_model, function, weights=None, num_classes=num_classes, **kwargs)
    on_meta = torch.get_default_device().type == "meta"
    return _regnet_on_meta(make) if on_meta and function.startswith("regnet") else make()


def _regnet_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Builds a RegNet on the meta device: its constructor reads values of tensors, so only parameters are moved."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    replace: Callable[..., Any] = to_meta  # torch declares that hooks return None, and uses what they return
    hook = register_module_parameter_registration_hook(replace)
    try:
        with torch.device("cpu"):
            return make().to("meta")
    finally:
        hook.remove()


def _pretrained_classifier(function: str, weights: Any, weights_backbone: Any, **kwargs: Any) -> Pretrained:
    """The tensors of torchvision's pretrained model, and the arguments that its structure depends on."""
    if weights_backbone is not None:
        raise ValueError(f"{function}: weights_backbone: got {weights_backbone!r}; allowed: None for a classifier")
    weights = weights_member(function, weights)
    aux_logits = kwargs.pop("aux_logits", None)
    if aux_logits:  # torchvision refuses False if weights are given; False removes the classifiers below
        kwargs["aux_logits"] = True
    donor = torchvision.models.get_model(function, weights=weights, progress=False, **kwargs)
    structure = {name: getattr(donor, name) for name in SET_BY_WEIGHTS if hasattr(donor, name)}
    left_out: tuple[str, ...] = ()
    if aux_logits is False:
        structure["aux_logits"] = False
        left_out = AUXILIARY
    if weights.meta["categories"] is None:  # vgg16 IMAGENET1K_FEATURES has an unusable classifier
        left_out = ("classifier.",)
    tensors = {name: tensor for name, tensor in named_tensors(donor).items() if not name.startswith(left_out)}
    return Pretrained(tensors, structure)


def _register_torchvision(name: str, function: str, **defaults: Any) -> None:
    make = partial(_torchvision_classifier, function, **defaults)
    register(name, pretrained=partial(_pretrained_classifier, function, **defaults))(make)


for _name in torchvision.models.list_models(module=torchvision.models):
    _register_torchvision(_name, _name)
# As published with Gemel: the model maps inputs normalised for ImageNet to the inputs of the original Inception.
_register_torchvision("inceptionv3", "inception_v3", aux_logits=False, transform_input=True)
_register_torchvision("mobilenetv3", "mobilenet_v3_large")
