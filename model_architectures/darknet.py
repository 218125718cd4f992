"""The networks of YOLOv3 and YOLOv3-tiny: from images to the raw outputs of the heads, without control flow.

Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018, and the published yolov3.cfg and yolov3-tiny.cfg.
Convolutions are registered in the order of the cfg files, which is also the order of Darknet's weights files.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"leaky_relu": partial(nn.LeakyReLU, 0.1), "silu": nn.SiLU}

Unit = Callable[..., nn.Module]  # (in_channels, out_channels, kernel, stride=1) -> a ConvUnit
Widths = Callable[[int], int]  # channels in the cfg file -> channels in a network of another width


class ConvUnit(nn.Sequential):
    """Convolution, batch normalisation, activation."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, activation: str, eps: float
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps)
        self.act = ACTIVATIONS[activation]()


class Residual(nn.Module):
    """A residual block: a 1x1 convolution to half the channels, a 3x3 convolution back, added to the input."""

    def __init__(self, unit: Unit, channels: int, hidden: int):
        super().__init__()
        self.reduce, self.expand = unit(channels, hidden, 1), unit(hidden, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.reduce(x))


class Darknet53(nn.Module):
    """From images to features of strides 8, 16 and 32."""

    def __init__(self, unit: Unit, widths: Widths):
        super().__init__()
        self.stem = unit(3, widths(32), 3)
        self.stages = nn.ModuleList()
        for channels, depth in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
            wide, half = widths(channels), widths(channels // 2)
            blocks = (Residual(unit, wide, half) for _ in range(depth))
            self.stages.append(nn.Sequential(unit(half, wide, 3, 2), *blocks))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, features = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return tuple(features[-3:])


class SamePool(nn.Module):
    """Max-pooling of 2x2 with stride 1 that keeps the size; padding never is the maximum, as in Darknet."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2, 1)


class TinyBackbone(nn.Module):
    """From images to features of strides 16 and 32."""

    def __init__(self, unit: Unit, widths: Widths):
        super().__init__()
        layers = [unit(3, widths(16), 3)]
        for channels in (32, 64, 128, 256):
            layers += [nn.MaxPool2d(2), unit(widths(channels // 2), widths(channels), 3)]
        self.fine = nn.Sequential(*layers)
        last = (unit(widths(256), widths(512), 3), SamePool(), unit(widths(512), widths(1024), 3))
        self.coarse = nn.Sequential(nn.MaxPool2d(2), *last)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        fine = self.fine(x)
        return fine, self.coarse(fine)


class Head(nn.Module):
    """From features of one stride and those of the coarser head to (outputs, features for the finer head)."""

    def __init__(self, lateral: nn.Module | None, neck: nn.Module, output: nn.Module):
        super().__init__()
        self.lateral = lateral  # upsamples the features of the coarser head; None: the coarsest head
        self.neck = neck
        self.output = output

    def forward(self, features: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.lateral is not None:
            features = torch.cat([self.lateral(coarser), features], 1)
        features = self.neck(features)
        return self.output(features), features


class Network(nn.Module):
    """From [N, 3, H, W] to [N, anchors x (5 + classes), H / stride, W / stride] per head, the finest first."""

    def __init__(self, backbone: nn.Module, heads: Sequence[Head]):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)  # the coarsest first

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs, coarser = [], None
        for head, features in zip(self.heads, reversed(self.backbone(images)), strict=True):
            output, coarser = head(features, coarser)
            outputs.append(output)
        return tuple(reversed(outputs))


def full_network(unit: Unit, widths: Widths, num_outputs: Sequence[int]) -> Network:
    """Darknet-53 with three heads; num_outputs: output channels of each head, the finest first."""
    backbone, heads = Darknet53(unit, widths), []
    for channels, outputs in zip((512, 256, 128), reversed(num_outputs), strict=True):
        thin, wide = widths(channels), widths(2 * channels)
        coarsest = channels == 512
        lateral = None if coarsest else nn.Sequential(unit(wide, thin, 1), nn.Upsample(scale_factor=2, mode="nearest"))
        first = unit(wide if coarsest else thin + wide, thin, 1)
        neck = nn.Sequential(first, *(unit(*shape) for shape in [(thin, wide, 3), (wide, thin, 1)] * 2))
        heads.append(Head(lateral, neck, _output(unit, thin, wide, outputs)))
    return Network(backbone, heads)


def tiny_network(unit: Unit, widths: Widths, num_outputs: Sequence[int]) -> Network:
    """The small network with two heads; num_outputs: output channels of each head, the finest first."""
    fine, coarse = num_outputs
    backbone = TinyBackbone(unit, widths)
    lateral = nn.Sequential(unit(widths(256), widths(128), 1), nn.Upsample(scale_factor=2, mode="nearest"))
    heads = [
        Head(None, unit(widths(1024), widths(256), 1), _output(unit, widths(256), widths(512), coarse)),
        Head(lateral, nn.Identity(), _output(unit, widths(128) + widths(256), widths(256), fine)),
    ]
    return Network(backbone, heads)


def _output(unit: Unit, in_channels: int, channels: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(unit(in_channels, channels, 3), nn.Conv2d(channels, num_outputs, 1))
