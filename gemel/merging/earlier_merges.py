"""Models that this process has merged before, as when a notebook's cell is run twice: they are taken as they came.

A merge ties the models of the dictionary in place. Without this, the second call would find models that share
parameters with each other, and other weights than those that the results folder was made from.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemel.merging.fingerprint import model_digest
from gemel.sharing.adapters import own_modules, set_adapter
from gemel.sharing.affine import set_affine
from gemel.sharing.memory import named_tensors


@dataclass
class Original:
    """A model as it came, and how the merge left it (None: the merge is not over)."""

    tensors: dict[str, Tensor]  # copies on the CPU
    requires_grad: dict[str, bool]
    training: dict[str, bool]  # module name -> mode
    digest_after: str | None = None


_ORIGINALS: weakref.WeakKeyDictionary[nn.Module, Original] = weakref.WeakKeyDictionary()
_forgetful: list[bool] = []  # not empty within `not_remembered`


@contextlib.contextmanager
def not_remembered() -> Iterator[None]:
    """Within, no copies are kept: for a program that merges once and ends."""
    _forgetful.append(True)
    try:
        yield
    finally:
        _forgetful.pop()


def bytes_kept(models: Iterable[nn.Module]) -> int:
    """Bytes of the copies of these models."""
    originals = (_ORIGINALS[model] for model in models if model in _ORIGINALS)
    return sum(tensor.nbytes for original in originals for tensor in original.tensors.values())


def remember(models: Mapping[str, nn.Module]) -> None:
    """Keeps copies of the models on the CPU, for as long as the models live."""
    for model in () if _forgetful else models.values():
        own = named_tensors(model)
        _ORIGINALS[model] = Original(
            tensors={key: tensor.detach().cpu().clone() for key, tensor in own.items()},
            requires_grad={key: tensor.requires_grad for key, tensor in own.items()},
            training={name: module.training for name, module in model.named_modules()},
        )


def note_as_left(models: Mapping[str, nn.Module]) -> None:
    """Notes how a merge left the models, so that a change by anybody else is seen."""
    for model in models.values():
        if model in _ORIGINALS:
            _ORIGINALS[model].digest_after = model_digest(model)


def restore(models: Iterable[object]) -> None:
    """Brings back, as they came, the models that a merge of this process left and nobody has changed since."""
    for model in models:
        if not isinstance(model, nn.Module) or model not in _ORIGINALS:
            continue
        original = _ORIGINALS[model]
        if original.digest_after is not None and original.digest_after == model_digest(model):
            _bring_back(model, original)
        del _ORIGINALS[model]


@torch.no_grad()
def _bring_back(model: nn.Module, original: Original) -> None:
    """Takes off what the merge added, and gives every tensor its value again; parameters are new objects."""
    for _, module in list(own_modules(model)):
        set_adapter(module, None)
        set_affine(module, None)
    made: dict[int, nn.Parameter] = {}  # id of a parameter -> its successor: a tie within the model stays one
    for key, tensor in named_tensors(model).items():
        name, _, attribute = key.rpartition(".")
        values = original.tensors[key].to(tensor.device)
        if not isinstance(tensor, nn.Parameter):
            tensor.copy_(values)
            continue
        if id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(values, original.requires_grad[key])
        setattr(model.get_submodule(name), attribute, made[id(tensor)])
    for name, module in model.named_modules():
        module.training = original.training[name]
