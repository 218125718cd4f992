"""How many threads torch computes with: as many as there are idle cores, and those of ranks that wait.

Threads of one operation wait for each other busily. On cores that other programs use, two threads can be slower than
one (benchmarks/LOG.md, "2026-11-26 Threads beside other programs").
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from gemel.environment import ranks
from gemel.environment.cores import ranks_here, usable_cores
from gemel.environment.shares import Work, shares_of_threads

SECONDS = 0.25  # over which idle cores are counted
STATISTICS = Path("/proc/stat")  # Linux


def idle_cores() -> int | None:
    """Cores that are idle now, rounded to the nearest number, at least 1; None where the system does not say."""
    before = _idle_and_total()
    if before is None:
        return None
    time.sleep(SECONDS)
    after = _idle_and_total()
    if after is None or after[1] <= before[1]:
        return None
    share = (after[0] - before[0]) / (after[1] - before[1])
    return max(1, round(share * (os.cpu_count() or 1)))


def choose_num_threads() -> int:
    """Torch's number of threads, or the number of idle cores if that is less; OMP_NUM_THREADS is left as it is."""
    num_threads = torch.get_num_threads()
    if num_threads == 1 or "OMP_NUM_THREADS" in os.environ:
        return num_threads
    return min(num_threads, idle_cores() or num_threads)


@contextlib.contextmanager
def num_threads_set(num_threads: int) -> Iterator[None]:
    """Within, torch computes with that many threads."""
    before = torch.get_num_threads()
    if num_threads == before:
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def threads_of_waiting_ranks() -> Iterator[None]:
    """Within, this rank works while all others wait: torch computes with the threads of all ranks on this machine."""
    num_threads = torch.get_num_threads()
    with num_threads_set(max(num_threads, min(num_threads * ranks_here(), usable_cores()))):
        yield


def times_threads(tasks: Collection[str]) -> dict[str, int]:
    """Task -> times how many threads, of those tasks that this rank trains alone: in a step of all of them it takes the
    threads of ranks on its machine that have less to do. Empty with one process."""
    if ranks.size() == 1:
        return {}
    work = {task: Work(ranks.seconds_of_step(task)) for task in tasks}
    parts = {task: ranks.parts_of(task) or {ranks.owner_of(task): 1} for task in tasks}
    num_ranks, cores = ranks_here(), usable_cores()
    first = ranks.rank() - ranks.rank() % num_ranks
    found = shares_of_threads(work, parts, ranks.rank(), range(first, first + num_ranks))
    return {task: max(1, min(times, cores // torch.get_num_threads())) for task, times in found.items()}


def _idle_and_total() -> tuple[int, int] | None:
    """Time that all cores were idle, and all their time, in the system's ticks since it started."""
    try:
        line = STATISTICS.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    ticks = [int(word) for word in line.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
