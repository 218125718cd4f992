"""The registry of builders: every model by name, and the dictionary from which a built model can be rebuilt.

A builder makes a model without pretrained weights and never downloads. Pretrained weights are a second step: their
tensors are copied into the model that the builder made, where the shapes agree. So a model with pretrained weights and
the model rebuilt from its architecture are made by the same code.
"""

import difflib
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

ARCHITECTURE_KEYS = ("name", "num_classes", "kwargs")
# Arguments with which torchvision downloads, or that cannot be written to a file.
NOT_RECORDED = ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress")


class Pretrained(NamedTuple):
    """Pretrained weights that can be copied into a built model."""

    tensors: dict[str, torch.Tensor]  # by their names in the model
    kwargs: dict[str, Any]  # builder arguments for the structure in which these weights were trained


class Builder(NamedTuple):
    """One entry of the registry."""

    make: Callable[..., nn.Module]  # (num_classes, **kwargs) -> model
    pretrained: Callable[..., Pretrained] | None  # (weights, weights_backbone, **kwargs); None: has no weights


_BUILDERS: dict[str, Builder] = {}


def register(name: str, pretrained: Callable[..., Pretrained] | None = None) -> Callable:
    """Decorator that registers a builder `(num_classes, **kwargs) -> nn.Module` under `name`.

    Raises ValueError when the name is registered already.
    """

    def enter(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in _BUILDERS:
            raise ValueError(f"a builder is already registered under the name {name!r}")
        _BUILDERS[name] = Builder(make, pretrained)
        return make

    return enter


def names() -> list[str]:
    """The names of all builders, sorted."""
    return sorted(_BUILDERS)


def build(name: str, num_classes: int, weights: Any = None, weights_backbone: Any = None, **kwargs: Any) -> nn.Module:
    """Builds the model `name` with `num_classes` outputs and records in `model.architecture` how to rebuild it.

    num_classes: for classifiers the number of classes; for detectors torchvision's count, where class 0 is the
    background (a detector of cars and people has 3).
    weights: a member of torchvision's weights enum for this model, its name ("DEFAULT", "IMAGENET1K_V1", ...), or None.
    If the pretrained model has another number of classes, the layers whose shape depends on it keep their random
    weights; all others get the pretrained ones. Nothing is downloaded unless this or `weights_backbone` is given.
    weights_backbone: for detectors, the same for the backbone alone; ignored if `weights` is given.
    kwargs: arguments of the builder, plain JSON values.
    Raises ValueError on an unknown name, weights that do not exist, or arguments that are not JSON values.
    """
    builder = _find(name)
    kwargs = _checked(name, num_classes, kwargs)
    pretrained = None
    if weights is not None or weights_backbone is not None:
        if builder.pretrained is None:
            raise ValueError(f"{name}: weights: got {weights or weights_backbone!r}; there are none for this model")
        pretrained = builder.pretrained(weights, weights_backbone, **kwargs)
        kwargs = {**kwargs, **pretrained.kwargs}
    model: Any = builder.make(num_classes, **kwargs)
    if pretrained is not None:
        _copy_matching(pretrained.tensors, model)
    model.architecture = {"name": name, "num_classes": num_classes, "kwargs": kwargs}
    return model


def rebuild(architecture: Mapping[str, Any]) -> nn.Module:
    """Builds a model from the `architecture` of another model, with random weights.

    The dictionary may come from an untrusted file: anything wrong with it raises ValueError, and nothing is downloaded.
    An architecture does not record whether parameters require gradients.
    """
    if not isinstance(architecture, Mapping) or set(architecture) != set(ARCHITECTURE_KEYS):
        raise ValueError(f"architecture: got {_short(architecture)}; allowed is {{name, num_classes, kwargs}}")
    name, num_classes, kwargs = (architecture[key] for key in ARCHITECTURE_KEYS)
    _find(name)
    kwargs = _checked(name, num_classes, kwargs)
    try:
        return build(name, num_classes, **kwargs)
    except Exception as error:  # a builder may raise anything on wrong arguments
        raise ValueError(f"{name}: kwargs: got {_short(kwargs)}; cannot build with them: {error}") from error


def architecture_of(model: nn.Module) -> dict[str, Any] | None:
    """`model.architecture` if it describes the model; None if it was built elsewhere or a layer was replaced."""
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, dict):
        return None
    try:
        expected = _shapes_when_built(json.dumps(architecture))
    except (TypeError, ValueError, RecursionError):  # no JSON, or nothing can be built from it
        return None
    return architecture if _shapes(model) == expected else None


@functools.lru_cache(maxsize=256)
def _shapes_when_built(architecture: str) -> dict[str, torch.Size]:
    """The shapes of all tensors of a model that is built from this JSON text; as `rebuild`, without memory for them."""
    with torch.device("meta"):
        return _shapes(rebuild(json.loads(architecture)))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def _find(name: Any) -> Builder:
    if not isinstance(name, str) or name not in _BUILDERS:
        near = difflib.get_close_matches(str(name), _BUILDERS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(f"unknown model {_short(name)}{hint} There are: {', '.join(names())}")
    return _BUILDERS[name]


def _checked(name: str, num_classes: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments after a round trip through JSON: tuples become lists, as they do in a manifest.

    Raises ValueError naming every argument that is wrong.
    """
    problems = []
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        problems.append(f"{name}: num_classes: got {_short(num_classes)}; allowed: an integer from 1 on")
    if not isinstance(kwargs, Mapping):
        raise ValueError("\n".join([*problems, f"{name}: kwargs: got {_short(kwargs)}; allowed: a dictionary"]))
    plain = {}
    for key, value in kwargs.items():
        if not isinstance(key, str) or key in NOT_RECORDED:
            problems.append(
                f"{name}: kwargs: got {_short(key)}; allowed: a builder's arguments (no {', '.join(NOT_RECORDED)})"
            )
            continue
        try:
            plain[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            problems.append(f"{name}: {key}: got {_short(value)}; allowed: plain JSON values")
    if problems:
        raise ValueError("\n".join(problems))
    return plain


def _copy_matching(tensors: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Copies every tensor of the same name and shape, and its requires_grad; skips layers for other class counts."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unknown = sorted(set(tensors) - set(own))
    assert not unknown, f"the pretrained model has tensors that the built model lacks: {unknown[:5]}"
    with torch.no_grad():
        for name, tensor in tensors.items():
            differing = sum(a != b for a, b in zip(own[name].shape, tensor.shape, strict=True))
            assert differing <= 1, f"{name}: {tensor.shape} and {own[name].shape} differ in two dimensions"
            if not differing:
                own[name].copy_(tensor)
                if isinstance(own[name], nn.Parameter):
                    own[name].requires_grad_(tensor.requires_grad)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
