"""What is in memory when: which blocks a model's turn moves in and out under a budget of bytes.

Models take turns in a cyclic order, so the next use of every block is known. What is evicted is what is needed last
(Belady, "A study of replacement algorithms for a virtual-storage computer", 1966: the fewest moves where all blocks
have one size; with blocks of several sizes a good rule, not a proof). Nothing here depends on time: the runtime and the
simulator take the same steps, and move the same bytes.

A set of blocks is an int whose bit i is block i.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gemel.edge.blocks import Blocks

MOST_CYCLES = 16  # until what a cycle moves is taken as settled


@dataclass(frozen=True)
class Move:
    """Blocks that leave memory, and then blocks that enter it."""

    evicted: tuple[int, ...]
    loaded: tuple[int, ...]
    bytes: int  # of the loaded ones


@dataclass(frozen=True)
class Step:
    """One turn: what moves before the model runs, and what moves for the next one while it runs."""

    enter: Move
    prefetch: Move
    resident: int  # the set of blocks in memory at the end of the turn
    peak_bytes: int  # most bytes in memory during the turn


NOTHING = Move((), (), 0)


class Residency:
    """The steps of a cyclic order of tasks under a budget.

    eager: while a model runs, load all of the next one that fits, even where that evicts blocks which would otherwise
    stay until they are used again: more bytes move, less time is waited. Otherwise only blocks are evicted early that
    the next turn evicts anyway, so that prefetching moves no additional byte.
    Raises ValueError if the largest model does not fit the budget.
    """

    def __init__(self, blocks: Blocks, order: Sequence[str], budget: int, eager: bool = False):
        largest = blocks.largest  # also of models that are not in the order, but may be visited
        if (least := blocks.bytes_of(largest)) > budget:
            raise ValueError(
                f"memory: got {budget} bytes; allowed: at least {least}, which the model of {largest} takes alone"
            )
        self.blocks, self.order, self.budget, self.eager = blocks, tuple(order), budget, eager
        self.sizes = [block.bytes for block in blocks.all]
        self.needs = [_set_of(blocks.needs[task]) for task in order]
        self.largest_first = [-size for size in self.sizes]  # among blocks that are needed at the same time
        self.last_first: dict[int, list[int]] = {}
        self.steps: dict[tuple[int, int], Step] = {}

    def step(self, turn: int, resident: int) -> Step:
        """The turn of order[turn], which begins with these blocks in memory."""
        if (turn, resident) not in self.steps:
            self.steps[turn, resident] = self._plan(turn, resident)
        return self.steps[turn, resident]

    def visit(self, model: str, turn: int, resident: int) -> tuple[Move, int]:
        """What moves so that a model runs before this turn, which need not be in the order; and what is then in memory.

        All that it does not need may leave, what the turns need first last.
        """
        needs = _set_of(self.blocks.needs[model])
        missing = _members(needs & ~resident)
        lack = self.bytes_of(resident) + sum(map(self.sizes.__getitem__, missing)) - self.budget
        move = self._move(self._evict(turn, resident & ~needs, lack), missing)
        return move, self._after(resident, move)

    def bytes_of(self, resident: int) -> int:
        """Bytes of a set of blocks."""
        return sum(self.sizes[i] for i in _members(resident))

    def cycle_bytes(self) -> float:
        """Bytes that a cycle of all turns moves, on average, once the cycles repeat (or in cycles 9 to 16)."""
        resident, moved = 0, [0]
        seen: dict[int, int] = {}
        while resident not in seen and len(moved) <= MOST_CYCLES:
            seen[resident] = len(moved) - 1
            total = moved[-1]
            for turn in range(len(self.order)):
                step = self.step(turn, resident)
                resident = step.resident
                total += step.enter.bytes + step.prefetch.bytes
            moved.append(total)
        first = seen.get(resident, MOST_CYCLES // 2)
        return (moved[-1] - moved[first]) / (len(moved) - 1 - first)

    # ---- planning -----------------------------------------------------------------------------------------

    def _last_first(self, turn: int) -> list[int]:
        """All blocks, in the order in which they are evicted during a turn: the one that is needed last comes first."""
        unused, found = (1 << len(self.sizes)) - 1, []
        for ahead in range(len(self.order)):
            needed = self.needs[(turn + ahead) % len(self.order)] & unused
            found.append(_members(needed))
            unused &= ~needed
        groups = (_members(unused), *reversed(found))
        return [i for group in groups for i in sorted(group, key=self.largest_first.__getitem__)]

    def _plan(self, turn: int, resident: int) -> Step:
        after = (turn + 1) % len(self.order)
        used = self.bytes_of(resident)
        enter = self._enter(turn, resident, used)
        present, used = self._after(resident, enter), self._bytes_after(used, enter)
        prefetch = self._prefetch(turn, after, present, used)
        peak = max(used, self._bytes_after(used, prefetch))
        assert peak <= self.budget, f"{peak} bytes in memory, budget {self.budget}"
        return Step(enter, prefetch, self._after(present, prefetch), peak)

    def _enter(self, turn: int, resident: int, used: int) -> Move:
        """What a turn needs to begin; all that it does not need may leave."""
        missing = _members(self.needs[turn] & ~resident)
        lack = used + sum(map(self.sizes.__getitem__, missing)) - self.budget
        return self._move(self._evict(turn, resident & ~self.needs[turn], lack), missing)

    def _prefetch(self, turn: int, after: int, resident: int, used: int) -> Move:
        """What of the next turn's blocks can move while this turn's model is in memory."""
        missing = _members(self.needs[after] & ~resident)
        if not missing:
            return NOTHING
        movable = resident & ~self.needs[turn] & ~self.needs[after]
        if self.eager:
            lack = used + sum(map(self.sizes.__getitem__, missing)) - self.budget
            evicted = self._evict(after, movable, lack)
        else:
            evicted = [i for i in self._enter(after, resident, used).evicted if movable >> i & 1]
        room = self.budget - used + sum(map(self.sizes.__getitem__, evicted))
        loaded = []
        for i in missing:
            if self.sizes[i] <= room:
                loaded.append(i)
                room -= self.sizes[i]
        return self._move(evicted, loaded) if loaded else NOTHING

    def _evict(self, turn: int, movable: int, lack: int) -> list[int]:
        """Blocks to evict so that `lack` bytes become free: those needed last, and none that need not go."""
        chosen: list[int] = []
        if lack <= 0:
            return chosen
        if turn not in self.last_first:
            self.last_first[turn] = self._last_first(turn)
        for i in self.last_first[turn]:
            if movable >> i & 1:
                chosen.append(i)
                lack -= self.sizes[i]
                if lack <= 0:
                    break
        for i in reversed(chosen):  # the last one may have been larger than needed
            if self.sizes[i] <= -lack:
                chosen.remove(i)
                lack += self.sizes[i]
        return chosen

    def _move(self, evicted: Sequence[int], loaded: Sequence[int]) -> Move:
        return Move(tuple(evicted), tuple(loaded), sum(map(self.sizes.__getitem__, loaded)))

    def _after(self, resident: int, move: Move) -> int:
        return resident & ~_set_of(move.evicted) | _set_of(move.loaded)

    def _bytes_after(self, used: int, move: Move) -> int:
        return used + move.bytes - sum(map(self.sizes.__getitem__, move.evicted))


def _set_of(blocks: Sequence[int]) -> int:
    found = 0
    for i in blocks:
        found |= 1 << i
    return found


def _members(blocks: int) -> list[int]:
    found = []
    while blocks:
        lowest = blocks & -blocks
        found.append(lowest.bit_length() - 1)
        blocks ^= lowest
    return found
