"""Rounding to 8 bits in a merge: on which images, and when. Weights of other types are rounded where they are kept."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gemel.environment import ranks
from gemel.fitting.rounding import round_to_inputs
from gemel.forward.batches import Batch
from gemel.forward.modes import deep_copy, state_on_cpu
from gemel.sharing.holders import synchronise
from gemel.sharing.quantisation import Quantised, quantise, quantised_weights
from gemel.thresholds import THRESHOLDS
from gemel.trials.images import ImageSampler
from gemel.trials.state import MergeState

MOST_IMAGES = 16  # in a batch: what a fit holds in memory is bounded elsewhere (gemel/trials/fit_samples.py)


class Rounding:
    """Rounds models of a merge whose store is in int8 on the images of the fits; without effect for other types."""

    def __init__(self, state: MergeState, images: ImageSampler):
        self.state, self.images = state, images
        self._unmerged: dict[str, dict[str, Tensor | Quantised]] = {}  # task -> what rounding changed

    @property
    def store_dtype(self) -> torch.dtype:
        return self.state.store_dtype

    @property
    def is_on(self) -> bool:
        return self.store_dtype == torch.int8

    def of_unmerged(self, name: str, model: nn.Module) -> nn.Module:
        """A rounded copy of a model of this rank as it came; the same rounding is there for `begin`."""
        if not self.is_on:
            return model
        copied = deep_copy(model)
        round_to_inputs({name: copied}, {name: self._images_of(name)}, self.images.seed, with_other_ranks=False)
        before, small = dict(model.named_parameters()), set(map(id, quantised_weights(copied)))
        self._unmerged[name] = {
            key: quantise(p) if id(p) in small else p.detach().clone()
            for key, p in copied.named_parameters()
            if not torch.equal(p, before[key])
        }
        return copied

    @torch.no_grad()
    def begin(self) -> None:
        """Gives the live models the values of the store's type before the search: those that were judged."""
        for name, changed in self._unmerged.items():
            for key, value in changed.items():
                rounded = value.dequantised() if isinstance(value, Quantised) else value
                self.state.models[name].get_parameter(key).data.copy_(rounded)
        self._unmerged.clear()
        if self.is_on:
            synchronise(self.state.models)
        self.state.round_weights()

    def of_trial(self, names: Iterable[str]) -> dict:
        """Rounds the live models of these tasks, which share with no other; their state before, to undo it."""
        if not self.is_on:
            return {}
        container = nn.ModuleDict({name: self.state.models[name] for name in names})
        before = state_on_cpu(container)
        synchronise(container)
        images = {name: self._images_of(name) for name in ranks.mine(container)}
        round_to_inputs(container, images, self.images.seed)
        synchronise(container)
        return before

    def undo(self, before: dict) -> None:
        """Takes back what `of_trial` did."""
        if before:
            self.state.models.load_state_dict(before, strict=False)

    def _images_of(self, name: str) -> list[Batch]:
        return self.images.of_tasks([name], THRESHOLDS.fit.pixels, "fit", max_batch=MOST_IMAGES)[name]
