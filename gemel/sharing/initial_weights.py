"""Initial weights of a tied parameter from those of its occurrences, by name and without data."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rule = Callable[[Sequence[Tensor], Sequence[float] | None], Tensor]

MEDIAN_STEPS = 8


def first(parameters: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The values of the first occurrence. Source: the published code of Gemel, NSDI 2023."""
    return parameters[0].detach().clone()


def mean(parameters: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The mean of the occurrences. Source: Wortsman et al., "Model soups", ICML 2022."""
    stacked = torch.stack([p.detach() for p in parameters])
    return torch.einsum("t...,t->...", stacked, _shares(stacked, weights))


def similar(parameters: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The geometric median: a mean in which occurrences near the others have more weight.

    Of two occurrences it is their mean. Source: Pillutla et al., "Robust Aggregation for Federated Learning",
    IEEE Transactions on Signal Processing 2022, algorithm 2 (smoothed Weiszfeld).
    """
    stacked = torch.stack([p.detach() for p in parameters])
    shares = _shares(stacked, weights)
    current = shares
    for _ in range(MEDIAN_STEPS):
        centre = torch.einsum("t...,t->...", stacked, current)
        distances = (stacked - centre).flatten(1).norm(dim=1)
        if distances.max() == 0:
            break
        current = shares / (distances / distances.max()).clamp_min(1e-6)
        current = current / current.sum()
    return torch.einsum("t...,t->...", stacked, current)


def _shares(stacked: Tensor, weights: Sequence[float] | None) -> Tensor:
    shares = stacked.new_ones(len(stacked)) if weights is None else stacked.new_tensor(list(weights))
    return shares / shares.sum()


# name -> rule: ([parameter of each occurrence], [weight of each task] or None) -> values of the shared parameter
INITIAL_WEIGHTS: dict[str, Rule] = {"first": first, "mean": mean, "similar": similar}
