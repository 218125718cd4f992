"""Which channels lie along each axis of a tensor, and which channels can only be permuted together.

A *space* is a set of channels that must all be permuted in the same way for a network to compute the same. An axis of a
tensor is a sequence of segments, each of which holds the channels of one space, every channel `inner` elements long
(more than one behind a Flatten). A fixed space is never permuted; the reason is stored.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MAX_REPEATS = 64  # of one space along one axis


class Segment(NamedTuple):
    """`size` channels of a space along an axis, each `inner` elements long."""

    space: int
    size: int
    inner: int = 1

    @property
    def length(self) -> int:
        return self.size * self.inner


Layout = tuple[Segment, ...]  # of one axis
Axes = tuple[Layout, ...]  # of one tensor


def length_of(layout: Layout) -> int:
    return sum(segment.length for segment in layout)


def identity_of(tensor: Tensor) -> tuple:
    """Equal for two tensors exactly if they are the same values in memory, whether they are one object or two."""
    if tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


class Layouts:
    """Spaces as a union-find structure, and the layout of every axis of the parameters and buffers seen so far."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._reason: dict[int, str] = {}  # of fixed roots
        self.bound: dict[tuple, dict[int, Layout]] = {}  # identity of a tensor -> axis -> layout

    def copy(self) -> "Layouts":
        """An independent copy, which the caller drops if the next step fails."""
        other = Layouts()
        other._parent, other._reason = list(self._parent), dict(self._reason)
        other.bound = {identity: dict(axes) for identity, axes in self.bound.items()}
        return other

    # ---- spaces -----------------------------------------------------------------------------------------

    def new(self, size: int) -> Layout:
        """The layout of an axis of `size` channels of a new space."""
        self._parent.append(len(self._parent))
        return (Segment(self._parent[-1], size),)

    def positions(self, length: int, reason: str = "positions of an image, not channels") -> Layout:
        """The layout of an axis that must not be permuted."""
        layout = self.new(length)
        self.fix(layout, reason)
        return layout

    def root(self, space: int) -> int:
        while self._parent[space] != space:
            self._parent[space] = self._parent[self._parent[space]]
            space = self._parent[space]
        return space

    def reason(self, space: int) -> str | None:
        """Why a space is fixed; None if it is free."""
        return self._reason.get(self.root(space))

    def is_fixed(self, layout: Layout) -> bool:
        return all(self.reason(segment.space) for segment in layout)

    def fix(self, layout: Layout, reason: str) -> None:
        for segment in layout:
            self._reason.setdefault(self.root(segment.space), reason)

    def unify(self, one: Layout, other: Layout, reason: str) -> Layout:
        """Joins the spaces of two axes of the same length; axes whose segments differ are both fixed, for `reason`."""
        assert length_of(one) == length_of(other), (one, other, reason)
        if [segment[1:] for segment in one] != [segment[1:] for segment in other]:
            self.fix((*one, *other), f"{reason} combines axes of different layouts")
            return one
        for a, b in zip(one, other, strict=True):
            self._join(self.root(a.space), self.root(b.space))
        return one

    def _join(self, a: int, b: int) -> None:
        if a == b:
            return
        a, b = min(a, b), max(a, b)
        self._parent[b] = a
        reasons = [self._reason[root] for root in (a, b) if root in self._reason]
        if reasons:
            self._reason[a] = reasons[0]

    # ---- parameters and buffers -------------------------------------------------------------------------

    def bind(self, tensor: Tensor | None, axis: int, layout: Layout, reason: str) -> Layout:
        """Records the layout of an axis of a parameter; where one is recorded already, the two are unified."""
        if tensor is None:
            return layout
        assert tensor.shape[axis] == length_of(layout), (reason, tuple(tensor.shape), axis, layout)
        axes = self.bound.setdefault(identity_of(tensor), {})
        if axis in axes:
            return self.unify(axes[axis], layout, reason)
        axes[axis] = layout
        return layout

    def axis_of(self, tensor: Tensor, axis: int) -> Layout:
        """The layout recorded for an axis of a parameter; where there is none, that of a new space."""
        axes = self.bound.setdefault(identity_of(tensor), {})
        if axis not in axes:
            axes[axis] = self.new(tensor.shape[axis])
        return axes[axis]

    def fix_tensor(self, tensor: Tensor, reason: str) -> None:
        for axis in range(tensor.ndim):
            self.fix(self.axis_of(tensor, axis), reason)

    # ---- operations on axes -----------------------------------------------------------------------------

    def slice(self, layout: Layout, start: int, stop: int, reason: str) -> Layout:
        """The elements start..stop of an axis; a segment that is only partly in the slice is fixed."""
        found, offset = [], 0
        for segment in layout:
            low, high = max(start, offset), min(stop, offset + segment.length)
            if high - low == segment.length:
                found.append(segment)
            elif low < high:
                self.fix((segment,), f"{reason} takes some of the channels")
                found += self.positions(high - low, f"{reason} takes some of the channels")
            offset += segment.length
        return tuple(found)

    def reshape(self, axes: Axes, shape: Sequence[int], reason: str) -> Axes:
        """The axes after a reshape to `shape`; an axis that is split is fixed."""
        result = [self.positions(length) for length in shape]
        for old, new in _blocks([length_of(layout) for layout in axes], shape):
            layouts = [axes[axis] for axis in old]
            if len(new) == 1:
                result[new[0]] = self._flatten(layouts, reason)
            else:
                for layout in layouts:
                    self.fix(layout, f"{reason} splits the axis")
        return tuple(result)

    def _flatten(self, layouts: list[Layout], reason: str) -> Layout:
        lengths = [length_of(layout) for layout in layouts]
        free = [i for i, layout in enumerate(layouts) if not self.is_fixed(layout)]
        outer, inner = (math.prod(lengths[: free[0]]), math.prod(lengths[free[0] + 1 :])) if free else (1, 1)
        if len(free) == 1 and outer <= MAX_REPEATS:
            layout = layouts[free[0]]
            return tuple(Segment(s.space, s.size, s.inner * inner) for s in layout) * outer
        for i in free:
            self.fix(layouts[i], f"{reason} merges it with another axis")
        return self.positions(math.prod(lengths), f"{reason} merges axes")


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest blocks of axes before and after a reshape with equally many elements, without axes of length 1."""
    left = [axis for axis, length in enumerate(old) if length > 1]
    right = [axis for axis, length in enumerate(new) if length > 1]
    blocks = []
    while left:
        a, b = [left.pop(0)], [right.pop(0)]
        while (sizes := [math.prod(old[i] for i in a), math.prod(new[i] for i in b)])[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        blocks.append((a, b))
    return blocks
