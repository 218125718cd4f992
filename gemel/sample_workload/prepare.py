"""Prepares the embedded default workload: draws and trains what is missing, once.

About two minutes on two cores, below sample_data/:

    datasets/<name>_CL, datasets/<name>_OD      as users' own datasets (docs/datasets.md)
    weights/<task>.pt, weights/<task>.json      the trained model, and its accuracy on val
"""

import itertools
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gemel.sample_workload.camera import CAMERAS
from gemel.sample_workload.drawing import draw_camera, is_drawn
from gemel.sample_workload.made import remove_leftovers
from gemel.sample_workload.tasks import ANCESTORS, PLAN, SAMPLE_ROOT, TASKS, Plan, task_named
from gemel.sample_workload.training import Methods, is_trained, train

log = logging.getLogger(__name__)


def prepare(methods: Mapping[str, Methods], root: Path = SAMPLE_ROOT, plan: Plan = PLAN, processes: int = 2) -> None:
    """Draws the datasets and trains the models that are missing below `root`, or were made by another recipe.

    methods: how the accuracy of a trained model is measured, by task kind.

    May be interrupted at any time: what is half done has another name and is done again. Each of the processes computes
    with one thread: the results do not depend on their number, and threads that wait for one another are many times
    slower on a machine that has other things to do.
    """
    stages = _stages(Path(root), plan, methods)
    if not stages:
        return
    remove_leftovers(Path(root))
    if processes > 1:
        try:
            _work_in_processes(stages, processes)
            return
        except BrokenProcessPool:  # a script without `if __name__ == "__main__"` cannot start any
            log.warning("the sample workload is prepared in this process alone, which takes longer")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in itertools.chain(*stages):
            job()
    finally:
        torch.set_num_threads(num_threads)


# ---- who does what, and when --------------------------------------------------------------------------------------


def _stages(root: Path, plan: Plan, methods: Mapping[str, Methods]) -> list[list[Callable[..., None]]]:
    """What is missing, as jobs; those of one stage do not wait for one another, the longest comes first."""
    cameras = [camera for camera in CAMERAS if not is_drawn(root, camera, plan)]
    missing = set()
    for name in TASKS:
        while name and not is_trained(root, name, plan):
            missing.add(name)
            name = task_named(name).parent
    generations: dict[int, list[str]] = {}
    for name in filter(missing.__contains__, [*ANCESTORS, *TASKS]):
        generations.setdefault(_generation(name), []).append(name)
    stages = [[partial(draw_camera, root, camera, plan) for camera in cameras]]
    stages += [[partial(train, root, name, plan, methods) for name in generations[age]] for age in sorted(generations)]
    return [stage for stage in stages if stage]


def _generation(name: str) -> int:
    parent = task_named(name).parent
    return 1 + _generation(parent) if parent else 0


def _work_in_processes(stages: list[list[Callable[..., None]]], processes: int) -> None:
    context = multiprocessing.get_context("spawn")  # a fork may inherit locks that nobody will release
    lock = context.RLock()
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(lock,)) as pool:
        for stage in stages:
            futures = [pool.submit(job, position=number % processes) for number, job in enumerate(stage)]
            for future in futures:
                future.result()


def _start_worker(lock: Any) -> None:
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for jobs for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
