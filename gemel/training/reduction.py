"""Gradients of parameters that models of several ranks hold, summed in one collective a step.

Not DistributedDataParallel: it fails when a model is skipped in a step, and ranks diverge silently when parameters are
tied after wrapping. One flat sum after the backward passes is right whatever is tied or skipped.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemel.environment import ranks
from gemel.forward.modes import Models
from gemel.sharing.holders import held_by
from gemel.training.united import names_of


class Reduced(NamedTuple):
    """What all ranks' batches of one step come to."""

    loss: Tensor  # the sum; 0-dim
    num_samples: int
    is_out_of_memory: bool  # of one rank at least


class Reduction:
    """Sums gradients over the ranks.

    shared: the parameters that several models hold; those that models of several ranks hold are summed. trained: what
    this rank trains; what one model holds whose task several ranks compute is summed as well. The flat buffer
    is made once, in float32, and holds besides the gradients, of each parameter, how many ranks have a gradient: one
    that none has, since its tasks are given up, stays without. Each gradient lies in it in the memory layout that its
    parameter has on the first rank, so that it is copied as it lies, and what comes back is a part of the buffer.
    """

    def __init__(
        self,
        models: Models,
        shared: Collection[nn.Parameter],
        device: torch.device,
        trained: Sequence[nn.Parameter] = (),
    ):
        self.parameters: list[nn.Parameter] = []
        strides: list[list[int]] = []
        holders = held_by(models) if ranks.size() > 1 else {}
        if ranks.size() > 1:
            self.parameters = [parameter for parameter in shared if len(holders[parameter]) > 1]
            self.parameters += _of_split_tasks(models, [p for p in trained if len(holders[p]) > 1], set(shared))
            strides = ranks.of_first(lambda: [_dense_stride(parameter) for parameter in self.parameters])
        self.is_held = [ranks.rank() in holders[parameter] for parameter in self.parameters]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.flat = torch.empty(sum(self.sizes) + len(self.sizes) + 3, device=device)
        parts = self.flat.split([*self.sizes, len(self.sizes), 3])
        triples = zip(parts, self.parameters, strides, strict=False)  # what is left are counts and values
        self.sums = [part.as_strided(p.shape, stride, part.storage_offset()) for part, p, stride in triples]
        self.counts, self.values = parts[-2:]

    def reduce(self, loss: Tensor, num_samples: int, is_out_of_memory: bool) -> Reduced:
        """Replaces gradients by their sums over all ranks, which are valid until the next call.

        On the ranks that hold the parameter: another one would keep the gradient, and add it to the next sum.
        """
        has_gradient = [parameter.grad is not None for parameter in self.parameters]
        self.counts.copy_(torch.tensor(has_gradient, dtype=torch.float32))
        self.values.copy_(torch.stack([loss.float(), loss.new_tensor(num_samples), loss.new_tensor(is_out_of_memory)]))
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if parameter.grad is None:
                total.zero_()
            else:
                total.copy_(parameter.grad)
        ranks.sum_in_place(self.flat)
        *present, summed_loss, samples, failures = self.flat[sum(self.sizes) :].tolist()
        for parameter, total, count, is_held in zip(self.parameters, self.sums, present, self.is_held, strict=True):
            parameter.grad = total.to(parameter.dtype) if count and is_held else None
        return Reduced(loss.new_tensor(summed_loss), int(samples), failures > 0)


def _of_split_tasks(
    models: Models, trained: Sequence[nn.Parameter], shared: Collection[nn.Parameter]
) -> list[nn.Parameter]:
    """Those of all ranks, in the order of the models, without shared ones; all ranks ask: what one freezes, only those
    that compute its task know."""
    own = names_of(models, [parameter for parameter in trained if parameter not in shared])
    named = {name for part in ranks.gathered(own) for name in part}
    everything = list(dict.fromkeys(p for model in models.values() for p in model.parameters()))
    return [p for p, name in zip(everything, names_of(models, everything), strict=True) if name in named]


def _dense_stride(parameter: nn.Parameter) -> list[int]:
    """The strides of a tensor without gaps that has the layout of this one."""
    return list(torch.empty_like(parameter, device="meta").stride())
