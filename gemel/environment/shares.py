"""Which ranks compute a task, how many images of each of its batches, and with how many threads: by what tasks cost."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from gemel.environment.ranks import placed

Parts = dict[str, dict[int, int]]  # task -> rank -> images of a batch; the task belongs to the first rank named

BALANCED = 1.1  # times the total / ranks: up to here no task is split
WORTHWHILE = 0.98  # of the time before: a split that gains less is not made
EVEN = 1.05  # times the total / ranks: up to here no more of an evaluation is handed on
NEARLY_DONE = 0.1  # of a step: a rank that has less left to do is taken to wait already
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


def shares_of_threads(work: Mapping[str, Work], parts: Parts, rank: int, here: Collection[int]) -> dict[str, int]:
    """Task -> times how many threads, of each task that one rank computes alone, in the order of a step.

    here: the ranks of its machine. Those that have done their part of a step by then wait: others take their threads.
    """
    num_ranks = max(here, default=0) + 1
    num_ranks = max([num_ranks, *(number + 1 for on in parts.values() for number in on)])
    ends = loads(work, parts, num_ranks)
    begins = loads(work, {task: on for task, on in parts.items() if len(on) > 1}, num_ranks)[rank]
    found: dict[str, int] = {}
    for task in (task for task, on in parts.items() if set(on) == {rank}):
        still_busy = [number for number in here if number == rank or ends[number] > begins + NEARLY_DONE * max(ends)]
        found[task] = len(here) // len(still_busy)
        begins += work[task].seconds / found[task]
    return found


def split_first(tasks: Collection[str], parts: Parts) -> list[str]:
    """The tasks in the order in which a step takes them: those of several ranks first, so that none waits for long."""
    return sorted(tasks, key=lambda task: len(parts.get(task, ())) <= 1)


class Evaluation(NamedTuple):
    """What an evaluation of a task costs, in seconds."""

    reading: float  # all images, which the task's own rank reads in any case, and others as far as they share
    computing: float  # the outputs of all images


def evaluators(
    costs: Mapping[str, Evaluation], owners: Mapping[str, int], num_ranks: int
) -> dict[str, dict[int, float]]:
    """Task -> the ranks that share in its evaluation, with their shares of the images; its own rank first.

    Again and again the rank with most to do hands a part of its largest piece to the one with least to do, so that both
    are done at the same time.
    """
    shares = {task: {owners[task]: 1.0} for task in costs}

    def seconds(task: str, rank: int) -> float:
        return costs[task].computing + (costs[task].reading if rank != owners[task] else 0.0)

    for _ in range(MAX_SPLITS * num_ranks):
        busy = [sum(cost.reading for task, cost in costs.items() if owners[task] == rank) for rank in range(num_ranks)]
        pieces = {
            (task, rank): share * seconds(task, rank) for task, on in shares.items() for rank, share in on.items()
        }
        for (_, rank), piece in pieces.items():
            busy[rank] += piece
        longest, idlest = busy.index(max(busy)), busy.index(min(busy))
        largest = max(
            (task for task in shares if longest in shares[task]), key=lambda t: pieces[t, longest], default=""
        )
        if max(busy) <= EVEN * sum(busy) / num_ranks or not largest or not pieces[largest, longest]:
            break
        even = (busy[longest] - busy[idlest]) / (seconds(largest, longest) + seconds(largest, idlest))
        moved = min(shares[largest][longest], even)
        shares[largest][longest] -= moved
        shares[largest][idlest] = shares[largest].get(idlest, 0.0) + moved
    return shares


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
