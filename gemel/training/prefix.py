"""The part of a classifier before its first tied layer, frozen: it needs no gradients, and its outputs are cached.

Where a round ties late layers only, the modules before them can stay frozen. They then run in eval mode and without
gradients, and do not run at all for an image whose output is cached, in training and in evaluation. Source of the idea:
Jiang et al., "Mainstream", ATC 2018 (a stem that is not trained runs once for all tasks that share it).
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gemel.forward.modes import Models
from gemel.training.cut import Cut


@dataclass
class Prefix:
    """The part of a model before its cut, with its cached outputs."""

    cut: Cut
    weights: str  # digest of the parameters and buffers before the cut
    limit: int  # bytes of outputs that are cached at most
    keeps_training: bool  # whether images of train are the same each time, so that their outputs are worth caching
    outputs: dict[tuple, Tensor] = field(default_factory=dict)  # (in training, digest of the image) -> [1, ...]
    num_bytes: int = 0

    def __deepcopy__(self, memo: dict) -> "Prefix":
        return self  # copies of a model, such as the average of its weights, have the same frozen part

    def computes_the_same_as(self, other: "Prefix | None") -> bool:
        """Whether the other one has the same cut and weights, so that its cached outputs are valid here."""
        return other is not None and (self.cut, self.weights) == (other.cut, other.weights)

    def output(self, model: nn.Module, forward: Callable, images: Tensor) -> Tensor:
        """The output at the cut for every image.

        In training an image whose output is not cached runs alone, so that the output does not depend on which other
        images are in the batch with which it came first.
        """
        training = any(module.training for module in model.modules())
        if training and not self.keeps_training:
            return self.cut.output(model, forward, images)
        keys = [(training, _digest([image])) for image in images]
        if training:
            return torch.cat([self._alone(key, model, forward, images[[i]]) for i, key in enumerate(keys)])
        if all(key in self.outputs for key in keys):
            return torch.cat([self.outputs[key] for key in keys])
        output = self.cut.output(model, forward, images)
        for key, row in zip(keys, output.split(1), strict=True):
            self._keep(key, row.clone())
        return output

    def _alone(self, key: tuple, model: nn.Module, forward: Callable, image: Tensor) -> Tensor:
        if key in self.outputs:
            return self.outputs[key]
        return self._keep(key, self.cut.output(model, forward, image))

    def _keep(self, key: tuple, output: Tensor) -> Tensor:
        if key not in self.outputs and self.num_bytes + output.nbytes <= self.limit:
            self.outputs[key] = output
            self.num_bytes += output.nbytes
        return output


def prefix_of(model: nn.Module, cut: Cut, limit: int, keeps_training: bool) -> Prefix:
    """The model's part before the cut with its weights as they are now."""
    tensors = [t for name in cut.skipped for t in model.get_submodule(name).state_dict().values()]
    return Prefix(cut, _digest(tensors).hex(), limit, keeps_training)


def _digest(tensors: list[Tensor]) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


class _WithPrefix(nn.Module):
    """A mixin of the class that a model has while its prefix is frozen; copies of the model have that class too."""

    frozen_prefix: Prefix

    def forward(self, images: Tensor) -> Any:
        prefix, forward = self.frozen_prefix, super().forward
        with prefix.cut.given(self, prefix.output(self, forward, images)):
            return forward(images)


@contextlib.contextmanager
def frozen(models: Models, prefixes: Mapping[str, Prefix]) -> Iterator[None]:
    """Within, the prefixes of the named models are not trained, and do not run for images with cached outputs."""
    before = {name: type(models[name]) for name in prefixes}
    parameters = [p for name, prefix in prefixes.items() for p in prefix.cut.parameters(models[name])]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for name, prefix in prefixes.items():
        models[name].frozen_prefix = prefix  # type: ignore[assignment]  # torch's stubs: tensors and modules only
        models[name].__class__ = type(before[name].__name__, (_WithPrefix, before[name]), {})
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for name, kind in before.items():
            models[name].__class__ = kind
            del models[name].frozen_prefix


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of the model that are frozen; none outside `frozen`."""
    return model.frozen_prefix.cut.modules(model) if isinstance(model, _WithPrefix) else []
