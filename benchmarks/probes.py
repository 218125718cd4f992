"""A workload held in memory for measurements without training: unmerged models, some train images, val."""

import argparse
import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, Subset

from benchmarks.workloads import add_workload_arguments, open_workload
from gemel.datasets.folders import find_dataset, open_split
from gemel.datasets.loaders import collate_detection
from gemel.environment.seeds import generator
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.forward.batches import Batch
from gemel.forward.modes import Models
from gemel.workload import CLASSIFICATION, Problem, Task, WorkloadError

BATCH_SIZE = {True: 40, False: 4}  # of classifiers and of detectors


@dataclass(frozen=True)
class Probe:
    """The models of a workload, which a measurement ties and restores, their unmerged copies, and images."""

    tasks: Mapping[str, Task]
    models: nn.ModuleDict
    teachers: Models  # the unmerged models
    images: Mapping[str, Sequence[Batch]]  # of train, with the val transform
    val: Mapping[str, Any]  # batches (images, targets), in lists that take the places of loaders
    device: torch.device

    def batches(self, task: str, count: int) -> list[Batch]:
        """The first `count` train images, rounded up to whole batches."""
        size = len(self.images[task][0])
        return list(self.images[task][: -(-count // size)])

    def reestimate(self, task: str, count: int) -> None:
        """Re-estimates the batch normalisation statistics of the task's model over the first `count` train images."""
        batches = [(batch, None) for batch in self.batches(task, count)]
        reestimate_statistics(self.models[task], batches, self.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that all measurements on a probe have."""
    add_workload_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="selects the images (default: %(default)s)")


def open_probe(
    flags: argparse.Namespace, num_images: int, num_val: int | None = None, names: Sequence[str] | None = None
) -> Probe:
    """Opens the workload and loads `num_images` train and `num_val` val images per task (None: all) into memory.

    names: of the tasks to open (None: all). Raises WorkloadError with every problem of the workload, and for names of
    tasks that it does not have.
    """
    workload = open_workload(flags)
    tasks = pick_tasks(workload.tasks, names)
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()}).to(workload.device)
    images, val = {}, {}
    for name, task in tasks.items():
        train = load_split(task, workload.roots, "train", flags.seed)
        images[name] = [batch for batch, _ in take(task, train, num_images)]
        val[name] = take(task, load_split(task, workload.roots, "val", flags.seed), num_val)
    teachers = {name: copy.deepcopy(model).eval() for name, model in models.items()}
    return Probe(tasks, models, teachers, images, val, workload.device)


def pick_tasks(tasks: Mapping[str, Task], names: Sequence[str] | None) -> dict[str, Task]:
    """The named tasks in the order of the workload; all without names. Raises WorkloadError listing unknown names."""
    allowed = ", ".join(tasks)
    unknown = [name for name in names or () if name not in tasks]
    if unknown:
        raise WorkloadError([Problem("benchmark", "--tasks", repr(name), allowed) for name in unknown])
    return {name: task for name, task in tasks.items() if names is None or name in names}


def load_split(task: Task, roots: Iterable[Path], split: str, seed: int) -> Subset:
    """The samples of a split in a random order, with the val transform: without augmentation."""
    folder = find_dataset(task, list(roots))
    assert folder is not None, "open_workload refuses a workload without its datasets"
    dataset = open_split(task, folder, split, plain=True)
    return Subset(dataset, torch.randperm(len(dataset), generator=generator(seed, "probe", split, task.name)).tolist())


def take(task: Task, samples: Subset, count: int | None) -> list:
    """The first `count` samples (None: all) as batches (images, targets); the last batch may be smaller."""
    kind = task.kind == CLASSIFICATION
    collate = None if kind else collate_detection
    chosen = Subset(samples, range(min(count or len(samples), len(samples))))
    return list(DataLoader(chosen, BATCH_SIZE[kind], collate_fn=collate))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN if one of the two is constant."""
    return float(spearmanr(a, b).statistic)
