"""What a run would do, computed from a profile: the same turns, moves and rules as in the runtime, and no models.

Time advances from event to event: weights have arrived, a frame arrives, a model ends. Left out: that reading weights
slows down the model that runs meanwhile, and the time of the runtime's own Python.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemel.edge.arrivals import Arrivals
from gemel.edge.blocks import Blocks
from gemel.edge.counts import Counts, counts_of
from gemel.edge.frames import KEPT
from gemel.edge.profile import Profile
from gemel.edge.residency import Move
from gemel.edge.turns import Turns


@dataclass(frozen=True)
class Load:
    """The frames that arrive: for every task one in 1 / fps seconds."""

    fps: float
    sla: float | None  # seconds
    count: int  # frames of the stream


@dataclass(frozen=True)
class Plan:
    """How models take turns."""

    order: Sequence[str] | None = None
    batches: Mapping[str, int] | None = None
    eager: bool = False
    shared_computation: bool = True  # layers that tasks compute alike run once a frame; False: as for unmerged models


def simulate(
    blocks: Blocks, profile: Profile, budget: int, load: Load, plan: Plan | None = None, max_turns: int | None = None
) -> Counts:
    """What `Runtime.run` would count. max_turns: ends after so many turns, as if the runtime were stopped then.

    Raises ValueError for a budget below the largest model, or a wrong order.
    """
    plan = plan or Plan()
    arrivals = {
        task: Arrivals(load.fps, load.sla, (plan.batches or {}).get(task, 1), load.count) for task in blocks.needs
    }
    groups = [[task for task in group if task in arrivals] for group in profile.groups]
    turns = Turns(blocks, plan.order, budget, arrivals, plan.eager, groups if plan.shared_computation else ())
    simulation = _Simulation(blocks, profile, turns)
    while (max_turns is None or turns.number < max_turns) and (turn := turns.next()) is not None:
        task, step = turn
        simulation.counts.peak_resident_bytes = max(simulation.counts.peak_resident_bytes, step.peak_bytes)
        simulation.turn(task, step.enter, step.prefetch)
    return simulation.end()


class _Simulation:
    def __init__(self, blocks: Blocks, profile: Profile, turns: Turns):
        self.blocks, self.profile, self.turns, self.arrivals = blocks, profile, turns, turns.arrivals
        self.counts = counts_of(blocks.needs)
        self.now = 0.0
        self.read_ahead_until = 0.0
        self.prepared: OrderedDict[tuple[int, int], None] = OrderedDict()  # inputs that are kept
        self.move_seconds: dict[tuple[int, ...], float] = {}
        self.run_seconds: dict[tuple[str, int, bool], float] = {}
        self.ran_on: dict[int, range] = {}  # group -> frames whose outputs of common layers are kept

    def turn(self, task: str, enter: Move, prefetch: Move) -> None:
        counted, arrivals = self.counts.tasks[task], self.arrivals[task]
        began = self.now
        self.now = max(self.now, self.read_ahead_until) + self._seconds_of(enter)
        counted.turns += 1
        counted.swap_seconds += self.now - began
        self.counts.bytes_moved += enter.bytes + prefetch.bytes
        self.read_ahead_until = self.now + self._seconds_of(prefetch)
        self.now = max(self.now, arrivals.next_arrival)
        taken, dropped = self.turns.take(task, self.now)
        counted.dropped += dropped
        seconds = self._run_seconds(task, len(taken), self._follows(task, taken)) + sum(
            self._input_seconds(task, k) for k in taken
        )
        self.now += seconds
        counted.run_seconds += seconds
        arrivals.ran(seconds)
        for k in taken:
            counted.answered(self.now - k / arrivals.fps, arrivals.sla)

    def end(self) -> Counts:
        self.counts.seconds = self.now
        for task, arrivals in self.arrivals.items():
            self.counts.tasks[task].dropped += arrivals.drop_arrived(self.now)
        return self.counts

    def _seconds_of(self, move: Move) -> float:
        if move.loaded not in self.move_seconds:
            num_tensors = sum(len(self.blocks.all[i].keys) for i in move.loaded)
            self.move_seconds[move.loaded] = self.profile.load_seconds(num_tensors, move.bytes)
        return self.move_seconds[move.loaded]

    def _follows(self, task: str, frames: range) -> bool:
        """Whether the outputs of common layers are there for these frames; else they are from now on."""
        if (group := self.turns.group_of.get(task)) is None:
            return False
        before, self.ran_on[group] = self.ran_on.get(group), frames
        return before == frames

    def _run_seconds(self, task: str, batch: int, follows: bool) -> float:
        if (task, batch, follows) not in self.run_seconds:
            self.run_seconds[task, batch, follows] = self.profile.tasks[task].run_seconds(batch, follows)
        return self.run_seconds[task, batch, follows]

    def _input_seconds(self, task: str, k: int) -> float:
        """Of making the input of a frame, unless another task made it; and of reading the image."""
        profile = self.profile.tasks[task]
        seconds = self._once((profile.input, k), profile.input_ms) / 1e3
        return seconds + self._once((-1, k), self.profile.image_ms) / 1e3 if seconds else 0.0

    def _once(self, key: tuple[int, int], cost: float) -> float:
        if key in self.prepared:
            return 0.0
        self.prepared[key] = None
        if len(self.prepared) > KEPT:
            self.prepared.popitem(last=False)
        return cost


def budgets_between(blocks: Blocks, unmerged: Blocks, count: int) -> list[int]:
    """Budgets from the largest model alone to all models without sharing, evenly spaced, in bytes."""
    least, most = blocks.bytes_of(blocks.largest), unmerged.distinct_bytes
    steps = max(1, count - 1)
    return sorted({least + math.ceil((most - least) * i / steps) for i in range(count)})
