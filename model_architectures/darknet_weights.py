"""Reads weights of a YOLOv3 from Darknet's files and from state dicts of the common PyTorch implementations.

A Darknet file, as pjreddie/darknet writes it (src/parser.c), is little-endian: int32 major, minor, revision; the number
of images seen, int64 from version 0.2 on and int32 before; then float32, per convolution in the order of the cfg file:
bias, weight, mean and variance of its normalisation, or its own bias; then its weights [out, in, height, width].
"""

import os
import re
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model_architectures.darknet import ConvUnit
from model_architectures.yolov3 import YOLOv3

VERSION_BYTES = 12
SHORT_HEADER, LONG_HEADER = 16, 20  # bytes: the version, and an int32 or int64 of images seen
MAX_VERSION = 1000  # in Darknet larger numbers are flags; no published YOLOv3 uses them
NORM_TENSORS = ("bias", "weight", "running_mean", "running_var")  # in the order of a Darknet file
MAX_SHOWN = 8  # lines of problems


class Layer(NamedTuple):
    """A convolution and its normalisation; the output convolution of a head has a bias instead of a normalisation."""

    name: str
    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """State-dict keys and tensors in the order of a Darknet file."""
        if self.norm is None:
            yield from ((f"{self.name}.{key}", getattr(self.conv, key)) for key in ("bias", "weight"))
        else:
            yield from ((f"{self.name}.norm.{key}", getattr(self.norm, key)) for key in NORM_TENSORS)
            yield f"{self.name}.conv.weight", self.conv.weight


def layers_of(model: YOLOv3) -> list[Layer]:
    """The convolutions of a YOLOv3 in the order of its cfg file."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ConvUnit):
            found.append(Layer(name, module.conv, module.norm))
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            found.append(Layer(name, module, None))
    return found


# ---- Darknet -----------------------------------------------------------------------------------------------


def load_darknet(model: YOLOv3, path: str | os.PathLike, partial: bool = False) -> YOLOv3:
    """Loads a Darknet weights file into `model` in place, and returns the model.

    partial: also accept a file that ends after some convolution (darknet53.conv.74, yolov3-tiny.conv.15), or a file for
    another number of classes, of which the output convolutions are skipped. Tensors that are not loaded keep their
    values. The length of the file is checked before any weight is read. Raises ValueError naming the file and the layer
    if it is not a Darknet file, too short, too long, or holds values that are not finite; the model is then unchanged.
    """
    layers, path = layers_of(model), Path(path)
    num_classes = model.num_classes - 1
    values, (file_classes, num_layers) = _read(path, layers, num_classes, partial)
    loaded: list[tuple[Tensor, np.ndarray]] = []
    start = 0
    for layer in layers[:num_layers]:
        size = _size(layer, num_classes, file_classes)
        if layer.norm is not None or file_classes == num_classes:
            loaded += _parts(path, layer, values[start : start + size])
        start += size
    with torch.no_grad():
        for tensor, part in loaded:
            tensor.copy_(torch.from_numpy(part).reshape(tensor.shape))
    return model


def _read(path: Path, layers: list[Layer], num_classes: int, partial: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """The float32 values of the file, and how many classes and convolutions it is for."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            major, minor, _ = struct.unpack("<3i", file.read(VERSION_BYTES).ljust(VERSION_BYTES, b"\xff"))
            if not (0 <= major < MAX_VERSION and 0 <= minor < MAX_VERSION):
                raise ValueError(f"{path}: got no Darknet header; allowed: a Darknet weights file")
            headers = (LONG_HEADER,) if major * 10 + minor >= 2 else (SHORT_HEADER, LONG_HEADER)
            for header in headers:  # eriklindernoren/PyTorch-YOLOv3 writes the long header with version 0.0
                num_values, rest = divmod(num_bytes - header, 4)
                fit = None if rest else _fit(layers, num_values, num_classes, partial)
                if fit is not None:
                    file.seek(header)
                    return np.fromfile(file, "<f4", num_values), fit
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    raise ValueError(f"{path}: {_misfit(layers, max(0, (num_bytes - headers[0]) / 4), num_classes)}")


def _fit(layers: list[Layer], num_values: int, num_classes: int, partial: bool) -> tuple[int, int] | None:
    """(classes, convolutions) of a file with `num_values` values; None if no file for these layers has that length."""
    if num_values == _total(layers, num_classes, num_classes):
        return num_classes, len(layers)
    if not partial:
        return None
    if file_classes := _classes_of(layers, num_values, num_classes):
        return file_classes, len(layers)
    ends = np.cumsum([_size(layer, num_classes, num_classes) for layer in layers]).tolist()
    return (num_classes, ends.index(num_values) + 1) if num_values in ends else None


def _size(layer: Layer, num_classes: int, file_classes: int) -> int:
    """Number of values of a layer in a file for `file_classes`; both class counts are without the background."""
    size = sum(tensor.numel() for _, tensor in layer.tensors())
    return size if layer.norm is not None else size // (5 + num_classes) * (5 + file_classes)


def _total(layers: list[Layer], num_classes: int, file_classes: int) -> int:
    return sum(_size(layer, num_classes, file_classes) for layer in layers)


def _classes_of(layers: list[Layer], num_values: float, num_classes: int) -> int | None:
    """The number of classes for which a whole file has `num_values` values; None if there is no such number."""
    none, one = (_total(layers, num_classes, classes) for classes in (0, 1))
    classes = (num_values - none) / (one - none)
    return int(classes) if classes >= 1 and classes == int(classes) else None


def _misfit(layers: list[Layer], num_values: float, num_classes: int) -> str:
    """The error message for a file of a wrong length."""
    total = _total(layers, num_classes, num_classes)
    allowed = f"allowed: {total} values for the {len(layers)} convolutions of the model"
    if file_classes := _classes_of(layers, num_values, num_classes):
        hint = f"it is for {file_classes} classes (num_classes={file_classes + 1}), the model for {num_classes}"
        return f"got {num_values:g} values: {hint}; {allowed}, or partial=True"
    if num_values > total:
        return f"got {num_values - total:.12g} values after the last layer; {allowed}"
    start = 0
    for layer in layers:
        size = _size(layer, num_classes, num_classes)
        if num_values < start + size:
            break
        start += size
    return f"ends within {layer.name}: got {num_values - start:.12g} of its {size} values; {allowed}"


def _parts(path: Path, layer: Layer, values: np.ndarray) -> Iterator[tuple[Tensor, np.ndarray]]:
    """The tensors of a layer and their values in the file. Raises ValueError if they are not finite."""
    start = 0
    for key, tensor in layer.tensors():
        part = values[start : start + tensor.numel()]
        start += tensor.numel()
        if not np.isfinite(part).all():
            raise ValueError(f"{path}: {key}: got values that are not finite; allowed: finite ones")
        if key.endswith("running_var") and (part < 0).any():
            raise ValueError(f"{path}: {key}: got {part.min():g}; allowed: variances from 0 on")
        yield tensor, part


# ---- PyTorch -----------------------------------------------------------------------------------------------


class Port(NamedTuple):
    """How another implementation names the tensors of convolutions and normalisations, and keys to ignore."""

    name: str
    conv: re.Pattern
    norm: re.Pattern
    ignored: re.Pattern
    finest_first: bool  # the order of its output convolutions; Darknet begins with the coarsest


PORTS = (
    Port(
        "eriklindernoren/PyTorch-YOLOv3",
        re.compile(r"(module_list\.\d+)\.conv_\d+\.(\w+)"),
        re.compile(r"(module_list\.\d+)\.batch_norm_\d+\.(\w+)"),
        re.compile(r"module_list\.\d+\.yolo_\d+\.\w+"),
        finest_first=False,
    ),
    Port(
        "ultralytics/yolov3 before version 9",
        re.compile(r"(module_list\.\d+)\.Conv2d\.(\w+)"),
        re.compile(r"(module_list\.\d+)\.BatchNorm2d\.(\w+)"),
        re.compile(r"module_list\.\d+\.anchor\w*"),
        finest_first=False,
    ),
    Port(
        "ultralytics/yolov3",
        re.compile(r"(model\.\d+(?:\.\d+|\.cv\d)*)\.conv\.(\w+)|(model\.\d+\.m\.\d+)\.(\w+)"),
        re.compile(r"(model\.\d+(?:\.\d+|\.cv\d)*)\.bn\.(\w+)"),
        re.compile(r"model\.\d+\.anchor\w*"),
        finest_first=True,
    ),
)
PortLayer = tuple[str, dict[str, str]]  # name, and {"conv.weight", "norm.bias", ...: key in the state dict}


def from_port(model: YOLOv3, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Renames the keys of a state dict of one of PORTS to those of the model; returns any other state dict unchanged.

    Convolutions are paired in the order of the cfg file. Raises ValueError naming the layers that only one side has,
    tensors that are missing or unknown, and shapes that differ.
    """
    port = next((port for port in PORTS if any(port.conv.fullmatch(key) for key in state)), None)
    if port is None:
        return state
    found, unknown = _found_in(port, state)
    keys, problems = _paired(layers_of(model), found, state, port.finest_first)
    problems += [f"{key}: unknown" for key in unknown]
    if problems:
        more = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise ValueError(
            "\n  ".join([f"the weights of {port.name} do not fit the model", *problems[:MAX_SHOWN], *more])
        )
    return OrderedDict((own, state[key]) for own, key in keys.items())


def _found_in(port: Port, state: Mapping[str, Tensor]) -> tuple[list[PortLayer], list[str]]:
    """The layers of a port in the order of their numbers, and the unknown keys."""
    layers: dict[str, dict[str, str]] = {}
    unknown = []
    for key in state:
        matches = {"conv": port.conv.fullmatch(key), "norm": port.norm.fullmatch(key)}
        part, match = next(((part, match) for part, match in matches.items() if match), ("", None))
        if match is None:
            unknown += [] if port.ignored.fullmatch(key) else [key]
            continue
        layer, tensor = (group for group in match.groups() if group is not None)
        layers.setdefault(layer, {})[f"{part}.{tensor}"] = key
    return sorted(layers.items(), key=lambda item: _by_number(item[0])), unknown


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sort key of a dotted name that puts model.10 after model.9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _paired(
    own: list[Layer], found: list[PortLayer], state: Mapping[str, Tensor], finest_first: bool
) -> tuple[dict[str, str], list[str]]:
    """{key of the model: key of the port}, and what does not fit; output convolutions are paired separately."""
    outputs = [layer for layer in found if "conv.bias" in layer[1]]
    inner = [layer for layer in found if "conv.bias" not in layer[1]]
    pairs = [
        *zip_longest((layer for layer in own if layer.norm is not None), inner),
        *zip_longest((layer for layer in own if layer.norm is None), outputs[::-1] if finest_first else outputs),
    ]
    keys: dict[str, str] = {}
    problems = []
    for layer, theirs in pairs:
        if layer is None or theirs is None:
            side = (
                f"{layer.name}: got nothing for it" if theirs is None else f"{theirs[0]}: the model has no such layer"
            )
            problems.append(side)
        else:
            problems += _pair(layer, theirs, state, keys)
    return keys, problems


def _pair(layer: Layer, port_layer: PortLayer, state: Mapping[str, Tensor], keys: dict[str, str]) -> Iterator[str]:
    """Adds the tensors of a pair of layers to `keys`; yields a line for each tensor that does not fit."""
    name, theirs = port_layer
    own = {key.removeprefix(f"{layer.name}."): tensor for key, tensor in layer.tensors()}
    if layer.norm is None:
        own = {f"conv.{key}": tensor for key, tensor in own.items()}
    elif "norm.num_batches_tracked" in theirs and layer.norm.num_batches_tracked is not None:
        own["norm.num_batches_tracked"] = layer.norm.num_batches_tracked
    yield from (f"{theirs[key]}: unknown" for key in theirs if key not in own)
    for key, tensor in own.items():
        target = f"{layer.name}.{key.removeprefix('conv.') if layer.norm is None else key}"
        if key not in theirs:
            yield f"{name}: got no {key} for {target}"
        elif state[theirs[key]].shape != tensor.shape:
            got = list(state[theirs[key]].shape)
            yield f"{theirs[key]} for {target}: got {got}, expected {list(tensor.shape)}"
        else:
            keys[target] = theirs[key]
