"""Whose turn it is: models in a cyclic order, each until its frames are exhausted, and what each turn moves."""

from collections.abc import Collection, Mapping, Sequence

from gemel.edge.arrivals import Arrivals
from gemel.edge.blocks import Blocks
from gemel.edge.residency import Move, Residency, Step


class Turns:
    """The turns of a run or a simulation, one after the other; nothing here depends on how long they take.

    groups: of tasks that compute their first layers alike: they run on the same frames, one after the other.
    Raises ValueError if the largest model does not fit the budget, or the order is not one of the tasks.
    """

    def __init__(
        self,
        blocks: Blocks,
        order: Sequence[str] | None,
        budget: int,
        arrivals: Mapping[str, Arrivals],
        eager: bool = False,
        groups: Sequence[Collection[str]] = (),
    ):
        order = neighbouring(list(arrivals), groups) if order is None else list(order)
        if sorted(order) != sorted(arrivals):
            raise ValueError(f"order: got {', '.join(order)}; allowed: each of {', '.join(arrivals)} once")
        self.arrivals = arrivals
        self.order = order
        self.models = {task: task for task in order}  # task -> the model that serves it, by its name among the blocks
        self.residency = Residency(blocks, order, budget, eager)
        self.resident = 0  # the set of blocks in memory
        self.number = 0  # turns taken
        self._turn = 0
        self.group_of = {task: i for i, group in enumerate(groups) for task in group}
        self._ahead: dict[int, range] = {}  # group -> frames that its first task took last

    def take(self, task: str, now: float) -> tuple[range, int]:
        """(frames that the task runs on at its turn, frames that were dropped), as Arrivals.take has it.

        The first task of a group in the order chooses frames that all of them can answer in time; the others follow.
        """
        own, group = self.arrivals[task], self.group_of.get(task)
        if group is None:
            return own.take(now)
        members = [other for other in self.order if self.group_of.get(other) == group]
        if task != members[0]:
            return own.take(now, ahead=self._ahead.get(group))
        taken, dropped = own.take(now, sum(self.arrivals[other].expected for other in members[1:]))
        self._ahead[group] = taken
        return taken, dropped

    def next(self) -> tuple[str, Step] | None:
        """(the task whose turn it is, what moves); None if no task has frames left."""
        if not self._leave_out_exhausted():
            return None
        task = self.order[self._turn]
        step = self.residency.step(self._turn, self.resident)
        self.resident = step.resident
        self._turn = (self._turn + 1) % len(self.order)
        self.number += 1
        return task, step

    def visit(self, model: str) -> Move:
        """What moves so that a model runs between two turns."""
        move, self.resident = self.residency.visit(model, self._turn, self.resident)
        return move

    def serve_by(self, task: str, model: str) -> None:
        """From its next turn on, a task is served by another model, which computes nothing as other tasks do."""
        self.models[task] = model
        self.group_of.pop(task, None)
        self._plan_for(self.order)

    def _leave_out_exhausted(self) -> bool:
        """Goes on with the tasks that have frames; whether there are any."""
        left = [task for task in self.order if not self.arrivals[task].is_exhausted]
        if left and len(left) < len(self.order):
            self._plan_for([task for task in (*self.order[self._turn :], *self.order[: self._turn]) if task in left])
            self._turn = 0
        return bool(left)

    def _plan_for(self, order: list[str]) -> None:
        before, self.order = self.residency, order
        self.residency = Residency(before.blocks, [self.models[t] for t in order], before.budget, before.eager)


def neighbouring(tasks: Sequence[str], groups: Sequence[Collection[str]]) -> list[str]:
    """The tasks in their order, with those of a group next to each other."""
    group_of = {task: group for group in groups for task in group}
    found: list[str] = []
    for task in tasks:
        found += [other for other in tasks if other in group_of.get(task, (task,)) and other not in found]
    return found
