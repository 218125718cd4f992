"""Whose turn it is: models in a cyclic order, each until its frames are exhausted, and what each turn moves."""

from collections.abc import Mapping, Sequence

from gemel.edge.arrivals import Arrivals
from gemel.edge.blocks import Blocks
from gemel.edge.residency import Residency, Step


class Turns:
    """The turns of a run or a simulation, one after the other; nothing here depends on how long they take.

    Raises ValueError if the largest model does not fit the budget, or the order is not one of the tasks.
    """

    def __init__(
        self,
        blocks: Blocks,
        order: Sequence[str] | None,
        budget: int,
        arrivals: Mapping[str, Arrivals],
        eager: bool = False,
    ):
        order = list(blocks.needs) if order is None else list(order)
        if sorted(order) != sorted(blocks.needs):
            raise ValueError(f"order: got {', '.join(order)}; allowed: each of {', '.join(blocks.needs)} once")
        self.arrivals = arrivals
        self.residency = Residency(blocks, order, budget, eager)
        self.resident = 0  # the set of blocks in memory
        self.number = 0  # turns taken
        self._turn = 0

    def next(self) -> tuple[str, Step] | None:
        """(the task whose turn it is, what moves); None if no task has frames left."""
        if not self._leave_out_exhausted():
            return None
        task = self.residency.order[self._turn]
        step = self.residency.step(self._turn, self.resident)
        self.resident = step.resident
        self._turn = (self._turn + 1) % len(self.residency.order)
        self.number += 1
        return task, step

    def _leave_out_exhausted(self) -> bool:
        """Goes on with the tasks that have frames; whether there are any."""
        order = self.residency.order
        left = [task for task in order if not self.arrivals[task].is_exhausted]
        if left and len(left) < len(order):
            following = [task for task in (*order[self._turn :], *order[: self._turn]) if task in left]
            self.residency = Residency(self.residency.blocks, following, self.residency.budget, self.residency.eager)
            self._turn = 0
        return bool(left)
