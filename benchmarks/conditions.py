"""The conditions of a comparison of whole merges: its flags, how runs are made, the measured unmerged workload."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import dataset_manager
from benchmarks.workloads import Workload, add_workload_arguments, open_workload
from gemel.console.flags import parse_duration
from gemel.datasets.folders import SampleError
from gemel.datasets.loaders import TaskData
from gemel.evaluation.eval_method import evaluate
from gemel.forward.modes import to_channels_last
from gemel.merging.fingerprint import fingerprint
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.training.options import TrainingOptions
from gemel.workload import Problem, Task, WorkloadError


class Accuracies(NamedTuple):
    """What an unmerged model reaches on each split."""

    val: float
    test: float | None  # None: the dataset has no test split


@dataclass(frozen=True)
class RunSettings:
    """How every run of the comparison is made."""

    out: Path  # folder of all runs, tables and plots
    tolerance: float | None  # for tasks that state none
    time_budget: float  # seconds of wall time, per run
    threads: int  # per run
    jobs: int  # runs at the same time
    fresh: bool  # whether finished runs are run again


@dataclass(frozen=True)
class Unmerged:
    """The workload before any merge: its loaders, accuracies and bytes."""

    data: Mapping[str, TaskData]
    accuracies: Mapping[str, Accuracies]
    fingerprints: dict  # task -> fingerprint of its model, dataset and transforms
    total_bytes: int
    optimal_saved_bytes: int


@dataclass(frozen=True)
class Bench:
    """The conditions that all runs of a comparison have in common."""

    workload: Workload
    settings: RunSettings
    unmerged: Unmerged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that all comparisons of whole merges on one workload have."""
    add_workload_arguments(parser)
    parser.add_argument("--tolerance", type=float, help="as for merge_workloads.py")
    add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how each run is made, and where it goes."""
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for runs, tables and plots")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: %(default)s")
    parser.add_argument("--time-budget", type=parse_duration, default=1200.0, metavar="TIME", help="per run; 20m")
    parser.add_argument("--threads", type=_positive_integer, default=1, help="per run (default: %(default)s)")
    parser.add_argument("--jobs", type=_positive_integer, default=1, help="parallel runs (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are finished already")


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number of at least 1")
    return int(text)


def open_bench(flags: argparse.Namespace) -> Bench:
    """Loads, checks and measures the unmerged workload; merges and writes nothing.

    Raises WorkloadError with every problem of the workload, the datasets and the device, or with every task whose
    unmerged model is below its target.
    """
    torch.set_num_threads(flags.threads)
    workload = open_workload(flags, flags.tolerance)
    names = ("out", "tolerance", "time_budget", "threads", "jobs", "fresh")
    settings = RunSettings(**{name: getattr(flags, name) for name in names})
    return Bench(workload, settings, _measure(workload))


def _measure(workload: Workload) -> Unmerged:
    """Puts the models on the device, laid out as a merge has them, opens the loaders and evaluates every task."""
    tasks, device, sizes = workload.tasks, workload.device, TrainingOptions()
    fingerprints = fingerprint(tasks, {name: workload.folder_of(task) for name, task in tasks.items()}, {})["tasks"]
    data = {
        name: dataset_manager.open_task(task, workload.roots, device=device, seed=0, batch_size=sizes.batch_size(task))
        for name, task in tasks.items()
    }
    models = {name: to_channels_last(task.model.to(device), device) for name, task in tasks.items()}
    return Unmerged(
        data=data,
        accuracies=measure_unmerged(tasks, data),
        fingerprints=fingerprints,
        total_bytes=distinct_bytes(models),
        optimal_saved_bytes=saved_bytes(find_groups(models)),
    )


def measure_unmerged(tasks: Mapping[str, Task], data: Mapping[str, TaskData]) -> dict[str, Accuracies]:
    """Evaluates every unmerged model on val and, where there is one, on test.

    Raises WorkloadError with one Problem per task that cannot be evaluated or is below its target: such a workload
    cannot be merged.
    """
    accuracies, problems = {}, []
    for name, task in tasks.items():
        test = data[name].test
        try:
            val = evaluate(task, data[name].val)
            accuracies[name] = Accuracies(val, None if test is None else evaluate(task, test))
        except SampleError:
            raise
        except Exception as error:  # a user's eval method may raise anything
            got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            problems.append(Problem(name, "eval_method", got, "f(model, data_loader) -> float in [0, 1]"))
            continue
        if val < task.target_acc:
            got = (
                f"an unmerged model that reaches {val:.4f} on val, {task.target_acc - val:.4f} below its target "
                f"{task.target_acc:.4f} ({task.tolerance:g} x unmerged_acc {task.unmerged_acc:g})"
            )
            problems.append(Problem(name, "unmerged_acc", got, "the accuracy that the model has on the val split"))
    if problems:
        raise WorkloadError(problems)
    return accuracies
