"""Groups with low-rank adapters, larger ones where tying is predicted to hurt more."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from gemel.sharing.adapters import adapter_bytes, rank_within
from gemel.sharing.groups import Configuration, Group
from gemel.thresholds import THRESHOLDS

MAX_SHARE = 0.4  # of a layer's bytes that an adapter takes: from a half on, two tasks would save nothing by sharing
HALVINGS = 40  # of the range in which the factor of all shares is looked for

Ranks = Sequence[Sequence[int]]  # of each group: of its adapters in `full` and in `smaller`


class AdaptedGroups:
    """The groups of a search, each with an adapter per task; without, where none is that small.

    full: adapters that take at most a budget, a share of their layer's bytes, or, once `allocate` shared out what
    several take together, as many bytes in other parts. smaller: the same with a part of the budget, and ever less of
    it by `make_smaller`.
    """

    def __init__(self, groups: Configuration, models: Mapping[str, nn.Module], budget: float):
        first = [group.occurrences[0] for group in groups]
        self.groups, self.layers = groups, [models[o.task].get_submodule(o.layer) for o in first]
        self.full, self.smaller = (
            [self._with_rank(i, rank_within(layer, share)) for i, layer in enumerate(self.layers)]
            for share in (budget, THRESHOLDS.fill.smaller_adapters * budget)
        )

    def allocate(self, density: Mapping[int, float]) -> None:
        """Shares out the bytes that the adapters of some groups take together, by a power of the groups' density.

        density: index of a group -> how much tying it is expected to hurt, per byte. Each adapter keeps rank 1 or more.
        """
        for adapted in (self.full, self.smaller):
            weights = {i: density[i] ** THRESHOLDS.fill.adapter_exponent for i in density if adapted[i].rank}
            limit = sum(adapted[i].adapter_bytes for i in weights)
            low, high = 0.0, MAX_SHARE / min((w for w in weights.values() if w > 0), default=1.0)
            for _ in range(HALVINGS):
                factor = (low + high) / 2
                is_within = sum(g.adapter_bytes for g in self._in_proportion(weights, factor).values()) <= limit
                low, high = (factor, high) if is_within else (low, factor)
            for i, group in self._in_proportion(weights, low).items():
                adapted[i] = group

    def make_smaller(self, kept: Collection[Group]) -> bool:
        """Takes the same part of the ranks in `smaller` once more, if some of these groups are kept; whether it did.

        Each adapter keeps rank 1 or more.
        """
        if not any(group.rank > 1 and group in kept for group in self.smaller):
            return False
        share = THRESHOLDS.fill.smaller_adapters
        ranks = [group.rank and max(1, int(share * group.rank)) for group in self.smaller]
        self.smaller = [self._with_rank(i, rank) for i, rank in enumerate(ranks)]
        return True

    def _in_proportion(self, weights: Mapping[int, float], factor: float) -> dict[int, Group]:
        """The groups with adapters of this factor times their weight of the layer's bytes."""
        shares = {i: min(MAX_SHARE, factor * weight) for i, weight in weights.items()}
        return {i: self._with_rank(i, max(1, rank_within(self.layers[i], share))) for i, share in shares.items()}

    def _with_rank(self, index: int, rank: int) -> Group:
        group, layer = self.groups[index], self.layers[index]
        return group.with_adapters(rank, group.as_counted(layer, adapter_bytes(layer, rank))) if rank else group

    @property
    def ranks(self) -> list[list[int]]:
        """As JSON values."""
        return [[one.rank, other.rank] for one, other in zip(self.full, self.smaller, strict=True)]

    def set_ranks(self, ranks: Ranks) -> None:
        """Takes what `ranks` was."""
        self.full, self.smaller = (
            [self._with_rank(i, both[number]) for i, both in enumerate(ranks)] for number in (0, 1)
        )
