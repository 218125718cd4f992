"""The workload that a benchmark measures: command-line flags, task records and dataset folders, all checked.

Every benchmark that reads a workload uses these flags, `open_workload`, and ends with the exit code of `run_command`.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import dataset_manager
from gemel.environment import DEVICES
from gemel.environment.device import pick_device
from gemel.sample_workload.tasks import dataset_roots
from gemel.workload import Problem, Task, WorkloadError, load_model_dict, read_workload
from merge_workloads import EXIT_DONE, EXIT_INTERRUPTED, EXIT_WRONG_INPUT, create_sample_model_dict

EXIT_A_RUN_FAILED = 1


@dataclass(frozen=True)
class Workload:
    """The unmerged tasks of one workload, where their datasets are, and the device to measure on."""

    file: str | None  # absolute path of the workload file; None: the embedded default
    datasets: str | None  # absolute path of --datasets; None: the default of merge_workloads.py
    tasks: Mapping[str, Task]
    device: torch.device

    @property
    def roots(self) -> list[Path]:
        """Folders that hold datasets; a task's dataset is taken from the first one that has it."""
        return _roots(self.datasets, self.tasks)

    def folder_of(self, task: Task) -> Path:
        """The dataset folder of a task."""
        folder = dataset_manager.find_dataset(task, self.roots)
        assert folder is not None, "open_workload refuses a workload without its datasets"
        return folder


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that select the workload and the device."""
    parser.add_argument("--workload", metavar="FILE.py", help="defines create_model_dict(); default: the embedded one")
    parser.add_argument("--datasets", metavar="DIR", help="folder of the datasets; default: as for merge_workloads.py")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")


def model_dict_of(file: str | None) -> dict:
    """The task dictionary of a workload file; without one the embedded default, which is prepared if it is missing.

    Raises WorkloadError if the file does not define a dictionary.
    """
    return create_sample_model_dict() if file is None else load_model_dict(file)


def open_workload(flags: argparse.Namespace, tolerance: float | None = None) -> Workload:
    """Reads the workload that the flags name, checks its datasets and picks the device; evaluates nothing.

    tolerance: for tasks that state none. Raises WorkloadError with every problem of the dictionary, the datasets and
    the device.
    """
    tasks, problems = read_workload(model_dict_of(flags.workload), tolerance)
    device = torch.device("cpu")
    try:
        device = pick_device(flags.device)
    except ValueError as error:
        problems.append(Problem("benchmark", "--device", str(error), "a device that torch sees"))
    problems += dataset_manager.check(tasks, _roots(flags.datasets, tasks))
    if problems:
        raise WorkloadError(problems)
    return Workload(_absolute(flags.workload), _absolute(flags.datasets), tasks, device)


def _roots(datasets: str | None, tasks: Iterable[str]) -> list[Path]:
    return dataset_roots(tasks, Path(datasets) if datasets else dataset_manager.DEFAULT_ROOT)


def _absolute(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path else None


def run_command(command: Callable[[], Iterable[object] | None]) -> int:
    """Runs the body of a benchmark and returns its exit code; `command` returns the runs that failed, if it has runs.

    0: done; 1: a run failed; 2: the input is wrong (every problem is printed to stderr); 130: interrupted.
    """
    try:
        return EXIT_A_RUN_FAILED if command() else EXIT_DONE
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept: the same command resumes from there", file=sys.stderr)
        return EXIT_INTERRUPTED
