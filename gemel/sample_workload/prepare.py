"""Prepares the embedded default workload: draws the missing datasets and trains the missing models.

Takes about 75 CPU seconds the first time, in two processes. Writes below sample_data/:

    datasets/<name>_CL, datasets/<name>_OD      the datasets (layouts: docs/datasets.md)
    weights/<task>.pt, weights/<task>.json      the trained models, and their accuracies on val
"""

import itertools
import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gemel.sample_workload.artifacts import remove_leftovers
from gemel.sample_workload.camera import CAMERAS
from gemel.sample_workload.datasets import draw_split, is_drawn
from gemel.sample_workload.tasks import ANCESTORS, PLAN, SAMPLE_ROOT, SPLITS, TASKS, Plan, task_named
from gemel.sample_workload.training import Methods, is_trained, train

log = logging.getLogger(__name__)

Job = Callable[..., None]  # takes the line of its progress bar as `position`
Stages = list[list[Job]]


def prepare(methods: Mapping[str, Methods], root: Path = SAMPLE_ROOT, plan: Plan = PLAN, processes: int = 2) -> None:
    """Draws the datasets and trains the models below `root` that are missing or were made by another recipe.

    methods: task kind -> how the accuracy of a trained model is measured. processes: with this one; each computes with
    one thread, so results do not depend on their number, and a busy machine does not slow down threads that wait for
    each other. May be interrupted at any time: unfinished files have temporary names and are made again.
    """
    stages = _stages(Path(root), plan, methods)
    if not stages:
        return
    remove_leftovers(Path(root))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if processes > 1:
            _work_with(processes - 1, stages)
        else:
            _work_alone(stages)
    except BrokenProcessPool:  # a script without `if __name__ == "__main__"` cannot start any
        log.warning("prepares the sample workload in this process alone, which takes longer")
        _work_alone(_stages(Path(root), plan, methods))
    finally:
        torch.set_num_threads(num_threads)


# ---- jobs -----------------------------------------------------------------------------------------------


def _stages(root: Path, plan: Plan, methods: Mapping[str, Methods]) -> Stages:
    """The jobs for everything that is missing; jobs of one stage are independent, the longest comes first.

    What models are judged on is drawn beside the first ancestor, which would otherwise be trained alone.
    """
    draws: dict[str, list[Job]] = {
        split: [
            partial(draw_split, root, camera, split, plan)
            for camera in CAMERAS
            if not is_drawn(root, camera, split, plan)
        ]
        for split in SPLITS
    }
    missing = set()
    for task in TASKS:
        name: str | None = task
        while name and not is_trained(root, name, plan):
            missing.add(name)
            name = task_named(name).parent
    generations: dict[int, list[Job]] = {}
    for task in filter(missing.__contains__, [*ANCESTORS, *TASKS]):
        generations.setdefault(_generation(task), []).append(partial(train, root, task, plan, methods))
    second = [*generations.pop(0, []), *(job for split in SPLITS[1:] for job in draws[split])]
    stages = [draws[SPLITS[0]], second, *(generations[age] for age in sorted(generations))]
    return [stage for stage in stages if stage]


def _generation(name: str) -> int:
    """The number of ancestors whose weights a task starts from."""
    parent = task_named(name).parent
    return 1 + _generation(parent) if parent else 0


def _work_alone(stages: Stages) -> None:
    for job in itertools.chain(*stages):
        job()


def _work_with(num_workers: int, stages: Stages) -> None:
    """Runs the stages one after the other, the jobs of a stage in this process and in workers at the same time.

    This process begins at once, while workers import what they need, for seconds; a thread waits for each of them.
    """
    context = multiprocessing.get_context("spawn")  # a forked process may inherit locks that are never released
    lock = context.RLock()
    tqdm.set_lock(lock)
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(lock,))
    is_done = False
    try:
        for _ in range(num_workers):
            pool.submit(os.getpid)  # starts a worker
        with ThreadPoolExecutor(num_workers) as threads:
            for stage in stages:
                left = deque(stage)
                workers = [threads.submit(_work_off, left, number + 1, pool) for number in range(num_workers)]
                try:
                    _work_off(left)
                finally:
                    left.clear()  # where this was interrupted, workers begin no other job
                for worker in workers:
                    worker.result()
        is_done = True
    finally:
        pool.shutdown(wait=not is_done)  # workers that are done take a second to end


def _work_off(left: deque[Job], line: int = 0, pool: ProcessPoolExecutor | None = None) -> None:
    """Runs jobs until none is left, here or in a worker of the pool. line: where their progress bars are."""
    while True:
        try:
            job = left.popleft()
        except IndexError:
            return
        if pool is None:
            job(position=line)
        else:
            pool.submit(job, position=line).result()


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
