"""The order of turns and the batch sizes of a workload.

Order: a model that follows another loads what the two do not share. What a cycle moves is known exactly
(residency.py), so up to EXACT_TASKS models every cyclic order is tried. For more, it is a travelling salesman's problem
over bytes not shared, solved by networkx (a dependency of torch) from several starts, and improved by moves of one to
three models that are judged by what a cycle moves. Batch sizes: the best of one size for all, judged by the simulator;
then the size of one task at a time goes up or down for as long as that raises the least share of frames in time.
"""

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import networkx
from networkx.algorithms.approximation import greedy_tsp, simulated_annealing_tsp

from gemel.edge.blocks import Blocks
from gemel.edge.profile import Profile
from gemel.edge.residency import Residency
from gemel.edge.simulator import Load, Plan, simulate
from gemel.edge.turns import neighbouring

EXACT_TASKS = 8
STARTS = 4  # of the solver
JUDGED = 400  # orders at most that are judged by what their cycle moves


def cycle_bytes(blocks: Blocks, order: Sequence[str], budget: int, eager: bool = False) -> float:
    """Bytes that a cycle of these turns moves. Raises ValueError if a model does not fit the budget."""
    return Residency(blocks, order, budget, eager).cycle_bytes()


def best_order(blocks: Blocks, budget: int, eager: bool = False, groups: Sequence[Collection[str]] = ()) -> list[str]:
    """The cyclic order whose cycle moves the fewest bytes; for more than EXACT_TASKS models, one close to it.

    groups: of tasks that are to stand next to each other, as they compute their first layers alike.
    The first task of the results comes first. Raises ValueError if a model does not fit the budget.
    """
    tasks = neighbouring(list(blocks.needs), groups)
    judged = {tuple(tasks): cycle_bytes(blocks, tasks, budget, eager)}
    if len(tasks) < 3 or not judged[tuple(tasks)]:
        return tasks
    if len(tasks) <= EXACT_TASKS:
        candidates: Iterable[Sequence[str]] = ((tasks[0], *rest) for rest in itertools.permutations(tasks[1:]))
    else:
        candidates = _tours(blocks)
    for order in candidates:
        if list(order) == neighbouring(order, groups):
            judged[tuple(order)] = cycle_bytes(blocks, order, budget, eager)
    best = min(judged, key=lambda order: judged[order])
    if len(tasks) > EXACT_TASKS:
        best = tuple(neighbouring(_improved(blocks, best, budget, eager), groups))
    first = best.index(tasks[0])
    return [*best[first:], *best[:first]]


def _tours(blocks: Blocks) -> Iterator[list[str]]:
    """Tours over the bytes that a model does not share with the one before it."""
    graph = networkx.DiGraph()
    most = max(map(blocks.bytes_of, blocks.needs))
    for one, other in itertools.permutations(blocks.needs, 2):
        unshared = blocks.bytes_of(other) - blocks.shared_bytes(one, other)
        graph.add_edge(one, other, weight=100 * unshared / most)  # the solver's temperature starts at 100
    tasks = list(blocks.needs)
    for start in range(STARTS):
        tour = greedy_tsp(graph, source=tasks[start * len(tasks) // STARTS])
        yield tour[:-1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield simulated_annealing_tsp(graph, tour, source=tour[0], seed=start, max_iterations=50)[:-1]


def _improved(blocks: Blocks, order: Sequence[str], budget: int, eager: bool) -> tuple[str, ...]:
    """The order after moving one model, or a run of two or three, elsewhere for as long as a cycle then moves less."""
    best, least = tuple(order), cycle_bytes(blocks, order, budget, eager)
    left = JUDGED
    improved = True
    while improved and left > 0:
        improved = False
        for candidate in _neighbours(best):
            left -= 1
            moved = cycle_bytes(blocks, candidate, budget, eager)
            if moved < least:
                best, least, improved = candidate, moved, True
                break
            if left <= 0:
                break
    return best


def _neighbours(order: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for length, begin in itertools.product((1, 2, 3), range(1, len(order))):
        moved, rest = order[begin : begin + length], order[:begin] + order[begin + length :]
        for place in range(1, len(rest) + 1):
            if place != begin:
                yield rest[:place] + moved + rest[place:]


def best_batches(
    blocks: Blocks, profile: Profile, budget: int, load: Load, order: Sequence[str] | None = None, eager: bool = False
) -> dict[str, int]:
    """Batch sizes by task, among those of the profile, that raise the least share of frames answered in time.

    Raises ValueError if a model does not fit the budget.
    """
    sizes = {task: list(profile.tasks[task].run_ms) for task in blocks.needs}

    def shares(batches: Mapping[str, int]) -> tuple[float, float]:
        counts = simulate(blocks, profile, budget, load, Plan(order, batches, eager))
        by_task = [counted.share for counted in counts.tasks.values()]
        return min(by_task), sum(by_task)

    uniform = [dict.fromkeys(sizes, size) for size in sorted(set.intersection(*map(set, sizes.values())))]
    best = max(uniform, key=shares)
    found, improved = shares(best), True
    while improved and found[0] < 1:
        improved = False
        for batches in _one_changed(best, sizes):
            if (judged := shares(batches)) > found:
                best, found, improved = batches, judged, True
    return best


def _one_changed(batches: Mapping[str, int], sizes: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """The batch sizes with that of one task a step larger or smaller."""
    for task, own in sizes.items():
        at = own.index(batches[task])
        for size in (*own[max(0, at - 1) : at], *own[at + 1 : at + 2]):
            yield {**batches, task: size}
