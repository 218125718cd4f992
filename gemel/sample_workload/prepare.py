"""Prepares the embedded default workload: draws the missing datasets and trains the missing models.

Takes about 75 CPU seconds the first time, in two processes. Writes below sample_data/:

    datasets/<name>_CL, datasets/<name>_OD      the datasets (layouts: docs/datasets.md)
    weights/<task>.pt, weights/<task>.json      the trained models, and their accuracies on val
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from gemel.sample_workload.artifacts import remove_leftovers
from gemel.sample_workload.camera import CAMERAS
from gemel.sample_workload.datasets import draw_split, is_drawn
from gemel.sample_workload.tasks import ANCESTORS, PLAN, SAMPLE_ROOT, SPLITS, TASKS, Plan, task_named
from gemel.sample_workload.training import Methods, is_trained, train

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """A split to draw, or a model to train. needs: jobs that are to be done before."""

    name: str
    needs: frozenset[str]
    run: Callable[..., None]  # takes the line of its progress bar as `position`


def prepare(methods: Mapping[str, Methods], root: Path = SAMPLE_ROOT, plan: Plan = PLAN, processes: int = 2) -> None:
    """Draws the datasets and trains the models below `root` that are missing or were made by another recipe.

    methods: task kind -> how the accuracy of a trained model is measured. processes: with this one; each computes with
    one thread, so results do not depend on their number, and a busy machine does not slow down threads that wait for
    each other. May be interrupted at any time: unfinished files have temporary names and are made again.
    """
    jobs = _jobs(Path(root), plan, methods)
    if not jobs:
        return
    remove_leftovers(Path(root))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if processes > 1:
            _work_with(processes - 1, jobs)
        else:
            _work_alone(jobs)
    except BrokenProcessPool:  # a script without `if __name__ == "__main__"` cannot start any
        log.warning("prepares the sample workload in this process alone, which takes longer")
        _work_alone(_jobs(Path(root), plan, methods))
    finally:
        torch.set_num_threads(num_threads)


# ---- jobs -----------------------------------------------------------------------------------------------


def _jobs(root: Path, plan: Plan, methods: Mapping[str, Methods]) -> list[Job]:
    """What is missing, each job behind what it needs, and first what most others wait for."""

    def drawn(splits: Sequence[str]) -> list[Job]:
        missing = [(camera, split) for split in splits for camera in CAMERAS if not is_drawn(root, camera, split, plan)]
        return [Job(f"{c} {s}", frozenset(), partial(draw_split, root, c, s, plan)) for c, s in missing]

    def trained(tasks: Iterable[str], splits: Sequence[str]) -> list[Job]:
        found = []
        for name in filter(missing.__contains__, tasks):
            task = task_named(name)
            needs = {f"{camera} {split}" for camera in task.cameras for split in splits}
            needs |= {task.parent} if task.parent else set()
            found.append(Job(name, frozenset(needs), partial(train, root, name, plan, methods)))
        return found

    missing: set[str] = set()
    for task in TASKS:
        name: str | None = task
        while name and not is_trained(root, name, plan):
            missing.add(name)
            name = task_named(name).parent
    train_split, *others = SPLITS
    ancestors = trained(ANCESTORS, [train_split])  # which are not judged
    return [*drawn([train_split]), *ancestors, *drawn(others), *trained(TASKS, SPLITS[:2])]


def _work_alone(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.run()


class Schedule:
    """Hands out jobs in their order, each as soon as what it needs is done, to several threads."""

    def __init__(self, jobs: Sequence[Job]):
        self.left, self.unfinished = list(jobs), {job.name for job in jobs}
        self.changed = threading.Condition()

    def next(self) -> Job | None:
        """A job, waited for where none is ready; None: none is left."""
        with self.changed:
            while self.left:
                ready = next((job for job in self.left if not job.needs & self.unfinished), None)
                if ready is not None:
                    self.left.remove(ready)
                    return ready
                self.changed.wait()
        return None

    def work_off(self, run: Callable[[Job], None]) -> None:
        """Runs jobs until none is left. Where one fails, or is interrupted, no other begins."""
        try:
            while (job := self.next()) is not None:
                run(job)
                with self.changed:
                    self.unfinished.remove(job.name)
                    self.changed.notify_all()
        except BaseException:
            with self.changed:
                self.left.clear()
                self.changed.notify_all()
            raise


def _work_with(num_workers: int, jobs: Sequence[Job]) -> None:
    """Runs the jobs in this process and in workers at the same time.

    This process begins at once, while workers import what they need, for seconds; a thread waits for each of them.
    """
    context = multiprocessing.get_context("spawn")  # a forked process may inherit locks that are never released
    lock = context.RLock()
    tqdm.set_lock(lock)
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(lock,))
    schedule, is_done = Schedule(jobs), False
    try:
        for _ in range(num_workers):
            pool.submit(os.getpid)  # starts a worker
        with ThreadPoolExecutor(num_workers) as threads:
            lines = range(1, num_workers + 1)
            workers = [threads.submit(schedule.work_off, partial(_run_in, pool, line)) for line in lines]
            schedule.work_off(lambda job: job.run(position=0))
            for worker in workers:
                worker.result()
        is_done = True
    finally:
        pool.shutdown(wait=not is_done)  # workers that are done take a second to end


def _run_in(pool: ProcessPoolExecutor, line: int, job: Job) -> None:
    """Waits for a job in a worker. line: of its progress bar."""
    pool.submit(job.run, position=line).result()


def _start_worker(lock: Any) -> None:
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed, which would otherwise wait for jobs forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"
    parent.join()
    os._exit(1)
