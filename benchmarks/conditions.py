"""The conditions of a benchmark: its flags, and the workload as it was before any merge, checked and measured."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import dataset_manager
import merger
from gemel.datasets.loaders import TaskData
from gemel.environment import DEVICES
from gemel.environment.device import pick_device
from gemel.merging.fingerprint import fingerprint
from gemel.merging.flags import parse_duration
from gemel.merging.records import Accuracy
from gemel.sample_workload.tasks import DATASETS_ROOT
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.training.options import TrainingOptions
from gemel.workload import Problem, Task, WorkloadError, load_model_dict, read_workload


@dataclass(frozen=True)
class Bench:
    """The conditions that all runs share, and the unmerged workload."""

    workload: str | None  # file; None: the embedded default
    datasets: str | None
    out: Path
    tolerance: float | None
    device: torch.device
    time_budget: float  # seconds of wall time, per run
    threads: int
    jobs: int
    fresh: bool
    tasks: Mapping[str, Task]
    data: Mapping[str, TaskData]
    identity: dict  # fingerprint of models, datasets, transforms ...
    unmerged: Mapping[str, Accuracy]
    total_bytes: int
    optimal_saved_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all benchmarks have."""
    parser.add_argument("--workload", metavar="FILE.py", help="defines create_model_dict(); default: the embedded one")
    parser.add_argument("--datasets", metavar="DIR", help="as for merge_workloads.py")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="for runs, tables and plots")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: %(default)s")
    parser.add_argument("--time-budget", type=parse_duration, default=1200.0, metavar="TIME", help="per run; 20m")
    parser.add_argument("--tolerance", type=float, help="as for merge_workloads.py")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    parser.add_argument("--threads", type=_count, default=1, help="per run (default: %(default)s)")
    parser.add_argument("--jobs", type=_count, default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="run again what was run already")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number of at least 1")
    return int(text)


def open_bench(flags: argparse.Namespace) -> Bench:
    """Loads, checks and measures the unmerged workload; nothing is run or written.

    Raises WorkloadError with every problem of the workload, the datasets and the device.
    """
    torch.set_num_threads(flags.threads)
    tasks, problems = read_workload(load_model_dict(flags.workload), flags.tolerance)
    try:
        device = pick_device(flags.device)
    except ValueError as error:
        problems.append(Problem("benchmark", "--device", str(error), "one that torch sees"))
    roots = [Path(flags.datasets) if flags.datasets else dataset_manager.DEFAULT_ROOT, DATASETS_ROOT]
    problems += dataset_manager.check(tasks, roots)
    if problems:
        raise WorkloadError(problems)
    identity = fingerprint(tasks, {n: dataset_manager.find_dataset(t, roots) for n, t in tasks.items()}, {})["tasks"]
    sizes = TrainingOptions()
    data = {
        name: dataset_manager.open_task(task, roots, device=device, seed=0, batch_size=sizes.batch_size(task))
        for name, task in tasks.items()
    }
    models = {name: task.model for name, task in tasks.items()}
    return Bench(
        workload=str(Path(flags.workload).resolve()) if flags.workload else None,
        datasets=str(Path(flags.datasets).resolve()) if flags.datasets else None,
        out=flags.out,
        tolerance=flags.tolerance,
        device=device,
        time_budget=flags.time_budget,
        threads=flags.threads,
        jobs=flags.jobs,
        fresh=flags.fresh,
        tasks=tasks,
        data=data,
        identity=identity,
        unmerged=_measure_unmerged(tasks, data, device),
        total_bytes=distinct_bytes(models),
        optimal_saved_bytes=saved_bytes(find_groups(models)),
    )


def _measure_unmerged(tasks, data, device: torch.device) -> dict[str, Accuracy]:
    """By the merger's own preflight, which refuses a workload that could not be merged."""
    nothing = {"training": TrainingOptions(), "initial_weights": "mean", "seed": 0, "flags": {}, "fingerprint": {}}
    nothing["alignment"] = "none"
    run = merger.start(tasks, data, "never written", strategy_name="all", device=device, **nothing)
    merger.preflight(run)
    return run.accuracy
