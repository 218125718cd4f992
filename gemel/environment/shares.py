"""Which ranks compute a task, and how many images of each of its batches: tasks spread over ranks by what they cost."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from gemel.environment.ranks import placed

Parts = dict[str, dict[int, int]]  # task -> rank -> images of a batch; the task belongs to the first rank named

BALANCED = 1.1  # times the total / ranks: up to here no task is split
WORTHWHILE = 0.98  # of the time before: a split that gains less is not made
EVEN = 1.05  # times the total / ranks: up to here no more of an evaluation is handed on
MAX_SPLITS = 2  # times the number of ranks: how often a task is split more
MAX_CANDIDATES = 8  # tasks of the rank with most to do, the most expensive ones, of which one is split next


class Work(NamedTuple):
    """What a step of a task costs."""

    seconds: float  # of a whole batch on one rank
    num_images: int = 1  # of a batch, which is cut between images
    split_seconds: float = 0.0  # more on each of its ranks where it is split: what they tell each other


def spread(work: Mapping[str, Work], num_ranks: int, apart: Sequence[Collection[str]] = ()) -> Parts:
    """Every task to one rank, as `ranks.placed` does it, or to several where that is too uneven.

    apart: sets of tasks that are worked on one after the other. Of each, tasks are split where the rank with most to do
    would have more than BALANCED times its share, as long as a step gets shorter, what splitting costs included. The
    ranks of a split task get equal parts, as they wait for each other in the middle of them.
    """
    owners = placed({task: one.seconds for task, one in work.items()}, num_ranks, apart)
    found: Parts = {task: {owners[task]: work[task].num_images} for task in work}
    alone = [task for task in work if not any(task in part for part in apart)]
    for names in [*apart, alone]:
        own = {task: work[task] for task in work if task in names}
        found |= _evened(own, {task: found[task] for task in own}, num_ranks)
    return found


def loads(work: Mapping[str, Work], parts: Parts, num_ranks: int) -> list[float]:
    """When each rank has done its part of a step, in seconds.

    Split tasks come first, in the order of the tasks; each begins when all its ranks are free, and they end together.
    """
    busy = [0.0] * num_ranks
    for task in split_first(parts, parts):
        on = parts[task]
        begins = max(busy[rank] for rank in on)
        longest = max(_seconds(work[task], num_images) for num_images in on.values())
        for rank in on:
            busy[rank] = begins + longest
    return busy


def split_first(tasks: Collection[str], parts: Parts) -> list[str]:
    """The tasks in the order in which a step takes them: those of several ranks first, so that none waits for long."""
    return sorted(tasks, key=lambda task: len(parts.get(task, ())) <= 1)


def evaluators(
    costs: Mapping[str, float], on: Mapping[str, Mapping[int, float]], num_ranks: int
) -> dict[str, dict[int, float]]:
    """Task -> the ranks that share in its evaluations, with their shares of the images; its own rank first.

    costs: seconds of an evaluation. on: the same of training, where it begins. Again and again the rank with most to do
    hands a part of its largest piece to the one with least to do, so that both are done at the same time.
    """
    pieces = {task: {rank: costs[task] * n / sum(on[task].values()) for rank, n in on[task].items()} for task in costs}
    for _ in range(MAX_SPLITS * num_ranks):
        busy = [sum(own.get(rank, 0.0) for own in pieces.values()) for rank in range(num_ranks)]
        longest, idlest = busy.index(max(busy)), busy.index(min(busy))
        if max(busy) <= EVEN * sum(busy) / num_ranks:
            break
        largest = max(pieces, key=lambda task: pieces[task].get(longest, 0.0))
        moved = min(pieces[largest][longest], (busy[longest] - busy[idlest]) / 2)
        pieces[largest][longest] -= moved
        pieces[largest][idlest] = pieces[largest].get(idlest, 0.0) + moved
    return {
        task: {rank: piece / costs[task] if costs[task] else 1 / len(own) for rank, piece in own.items()}
        for task, own in pieces.items()
    }


def _evened(work: Mapping[str, Work], parts: Parts, num_ranks: int) -> Parts:
    """The parts of one set of tasks: one task after the other is split more, and the shortest step is taken."""
    goal = BALANCED * sum(one.seconds for one in work.values()) / num_ranks
    best, shortest = parts, max(loads(work, parts, num_ranks))
    counts = dict.fromkeys(work, 1)  # task -> ranks
    for _ in range(MAX_SPLITS * num_ranks):
        busy = loads(work, parts, num_ranks)
        if shortest <= goal:
            break
        wider = list(_split_more(work, parts, counts, busy))
        tried = [(_laid_out(work, wanted, num_ranks), wanted) for wanted in wider]
        ends = [max(loads(work, laid_out, num_ranks)) for laid_out, _ in tried]
        if not tried:
            break
        chosen = next(i for i, end in enumerate(ends) if end <= max(goal, min(ends)))
        parts, counts = tried[chosen]
        if ends[chosen] < WORTHWHILE * shortest:
            best, shortest = parts, ends[chosen]
    return best


def _split_more(
    work: Mapping[str, Work], parts: Parts, counts: Mapping[str, int], busy: Sequence[float]
) -> Iterator[dict[str, int]]:
    """Numbers of ranks, with one task of the rank that is busy longest on more of them; few ranks first, and expensive
    tasks first."""
    rank, num_ranks = busy.index(max(busy)), len(busy)
    own = sorted((task for task in parts if rank in parts[task]), key=lambda task: (-work[task].seconds, task))
    for count in range(2, num_ranks + 1):
        for task in own[:MAX_CANDIDATES]:
            if counts[task] < count <= work[task].num_images:
                yield {**counts, task: count}


def _laid_out(work: Mapping[str, Work], counts: Mapping[str, int], num_ranks: int) -> Parts:
    """Each task on so many ranks, those with least to do so far, the largest parts first."""
    busy, found = [0.0] * num_ranks, Parts()
    for task in sorted(work, key=lambda task: (-work[task].seconds / counts[task], task)):
        chosen = sorted(range(num_ranks), key=lambda rank: (busy[rank], rank))[: counts[task]]
        bounds = [work[task].num_images * i // counts[task] for i in range(counts[task] + 1)]
        found[task] = {rank: end - begin for rank, (begin, end) in zip(chosen, itertools.pairwise(bounds), strict=True)}
        for rank, num_images in found[task].items():
            busy[rank] += _seconds(work[task], num_images)
    return {task: found[task] for task in work}


def _seconds(work: Work, num_images: int) -> float:
    share = num_images / work.num_images
    return work.seconds * share + (work.split_seconds if share < 1 else 0.0)
