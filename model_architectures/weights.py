"""Weights of models: torchvision's pretrained weights by name, and state dicts from files."""

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from model_architectures.checkpoints import Candidate, read_candidates, say_what_was_taken
from model_architectures.darknet_weights import from_port, load_darknet
from model_architectures.yolov3 import YOLOv3

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # auxiliary classifiers of inception_v3 and googlenet
DOES_NOT_FIT = "the weights do not fit the model"
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


def load_weights(model: nn.Module, path: str | os.PathLike, entry: str | None = None) -> nn.Module:
    """Loads a state dict (.pt, .pth, .ckpt, .safetensors) into `model` in place, and returns the model.

    The file may hold the state dict itself, or a dictionary with one as "state_dict", "model", "model_state_dict",
    "net", "ema" or any other key (entry: which, where several fit); the keys of the state dict may have a prefix, such
    as "module." or "_orig_mod.", which is taken off if then everything fits. What was taken is logged where there was a
    choice. Only tensors are read, no code is run. Files in torchvision's older layouts load as there; auxiliary
    classifiers are skipped if the model was built without them. For a YOLOv3 the file may also be one of Darknet
    (.weights) or a state dict of the common PyTorch implementations (darknet_weights.py).
    Raises ValueError naming the file if it cannot be read safely, holds no state dict or does not fit the model (with
    the missing keys, unexpected keys and different shapes). The model is unchanged when it raises.
    """
    path = os.path.expanduser(path)
    if isinstance(model, YOLOv3) and str(path).endswith(".weights"):
        return load_darknet(model, path)
    own: Any = model.state_dict()
    tried = [_tried(model, own, candidate) for candidate in read_candidates(path, own, entry)]
    fitting = [candidate for candidate, problems in tried if not problems]
    if not fitting:
        problems = min((problems for _, problems in tried), key=len)
        known = not problems[0].startswith(" ")  # a state dict of a YOLOv3 of no known kind
        raise ValueError(f"{path}: {problems[0]}" if known else "\n".join([f"{path}: {DOES_NOT_FIT}", *problems]))
    taken, *others = fitting
    say_what_was_taken(path, taken, [other for other in others if not _same(taken.state, other.state)])
    model.load_state_dict(taken.state)
    return model


def _tried(model: nn.Module, own: Any, candidate: Candidate) -> tuple[Candidate, list[str]]:
    """(the candidate as it would be loaded, its problems)."""
    state = candidate.state
    if isinstance(model, YOLOv3):
        try:
            state = from_port(model, state)
        except ValueError as error:
            return candidate, [str(error)]
    if getattr(model, "aux_logits", None) is False:
        for key in [key for key in state if key.startswith(AUXILIARY)]:
            del state[key]
    if not hasattr(state, "_metadata") and state.keys() == own.keys():
        state._metadata = own._metadata  # MNASNet reads its layout version from here
    return candidate._replace(state=state), _problems(model, state)


def _same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


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
