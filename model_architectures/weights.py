"""Weights of models: torchvision's pretrained weights by name, and state dicts from files."""

import copy
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torchvision.models import WeightsEnum

from model_architectures.darknet_weights import from_port, load_darknet
from model_architectures.yolov3 import YOLOv3

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # auxiliary classifiers of inception_v3 and googlenet
MAX_SHOWN = 8  # lines per kind of problem


def weights_member(function: str, weights: Any, argument: str = "weights") -> WeightsEnum | None:
    """The member of the weights enum of torchvision's `function` for a member or its name; None for None.

    Raises ValueError, listing the members, if there is no such member.
    """
    enum = torchvision.models.get_model_weights(function)
    if weights is None or isinstance(weights, enum):
        return weights
    member = weights.removeprefix(f"{enum.__name__}.") if isinstance(weights, str) else None
    if member not in enum.__members__:
        raise ValueError(f"{function}: {argument}: got {weights!r}; allowed: {', '.join(['None', *enum.__members__])}")
    return enum[member]


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, as the module holds them; state_dict() would lose requires_grad."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Loads a state dict (.pt, .pth) into `model` in place, and returns the model.

    The file may hold the state dict itself, {"state_dict": ...} or {"model": ...}; its keys may begin with "module.".
    Only tensors are read, no code is run. Files in torchvision's older layouts load as in torchvision; auxiliary
    classifiers are skipped if the model was built without them. For a YOLOv3 the file may also be one of Darknet
    (.weights) or a state dict of the common PyTorch implementations (darknet_weights.py).
    Raises ValueError naming the file if it cannot be read safely, holds no state dict or does not fit the model (with
    the missing keys, unexpected keys and different shapes). The model is unchanged when it raises.
    """
    if isinstance(model, YOLOv3) and str(path).endswith(".weights"):
        return load_darknet(model, path)
    state: Any = _read_state_dict(path)  # with `_metadata`, as state_dict() gives it
    if isinstance(model, YOLOv3):
        try:
            state = from_port(model, state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if getattr(model, "aux_logits", None) is False:
        for key in [key for key in state if key.startswith(AUXILIARY)]:
            del state[key]
    own: Any = model.state_dict()
    if not hasattr(state, "_metadata") and state.keys() == own.keys():
        state._metadata = own._metadata  # MNASNet reads its layout version from here
    problems = _problems(model, state)
    if problems:
        raise ValueError("\n".join([f"{path}: the weights do not fit the model", *problems]))
    model.load_state_dict(state)
    return model


def _read_state_dict(path: str | os.PathLike) -> OrderedDict[str, torch.Tensor]:
    """The state dict in a file, without wrappers. Raises ValueError naming the file."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors; allowed: a file as torch.save(model.state_dict(), path) writes it"
        raise ValueError(f"{path}: cannot be read as weights: {reason}") from error
    except Exception as error:  # the unpickler may raise anything on a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot be read as weights: {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content or not all(_is_entry(*entry) for entry in content.items()):
        raise ValueError(f"{path}: got {_describe(content)}; allowed: a state dict, which maps names to tensors")
    state: Any = OrderedDict(content)
    if hasattr(content, "_metadata"):
        state._metadata = content._metadata
    if all(key.startswith("module.") for key in state):  # saved from DataParallel
        consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor)


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    entries = ", ".join(f"{key}: {type(value).__name__}" for key, value in list(content.items())[:MAX_SHOWN])
    return f"a dictionary of {entries}" if content else "an empty dictionary"


def _problems(model: nn.Module, state: Any) -> list[str]:
    """The errors that load_state_dict(strict=True) would raise, found on a copy without storage."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in state.items()}
    differing = {
        key: f"{key}: got {got[key]}, expected {own[key]}" for key in own if got.get(key, own[key]) != own[key]
    }
    fitting: Any = OrderedDict((key, value) for key, value in state.items() if key not in differing)
    if hasattr(state, "_metadata"):
        fitting._metadata = state._metadata
    try:
        found = _skeleton(model).load_state_dict(fitting, strict=False, assign=True)
    except (RuntimeError, ValueError) as error:
        return [f"  {error}"]
    missing = [key for key in found.missing_keys if key not in differing]
    return [
        *_capped("missing", _by_layer(missing)),
        *_capped("unexpected", _by_layer(found.unexpected_keys)),
        *_capped("different shape", list(differing.values())),
    ]


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model with all tensors on the meta device: shapes without storage."""
    stand_ins: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        stand_ins[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(model, stand_ins)


def _by_layer(keys: Iterable[str]) -> list[str]:
    """["fc.weight", "fc.bias"] -> ["fc: weight, bias"]."""
    layers: dict[str, list[str]] = {}
    for key in keys:
        layer, _, tensor = key.rpartition(".")
        layers.setdefault(layer, []).append(tensor)
    return [f"{layer or 'the model'}: {', '.join(tensors)}" for layer, tensors in layers.items()]


def _capped(kind: str, lines: list[str]) -> list[str]:
    """The first lines of one kind of problem, and how many more there are."""
    more = [f"  {kind}: and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
    return [f"  {kind}: {line}" for line in lines[:MAX_SHOWN]] + more
