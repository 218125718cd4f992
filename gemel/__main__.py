"""The commands on a results folder: python -m gemel verify RESULTS [--workload FILE.py], python -m gemel edge ....

Everything heavy is imported inside a command, so that --help answers at once.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gemel.edge.flags import add_edge_commands
from gemel.environment import DEVICES

if TYPE_CHECKING:
    import torch

    from gemel.results_store.verify import Evaluation


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gemel", description="Commands on a results folder.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="check every file, tensor, tie and accuracy; one line per check")
    verify.add_argument("results", metavar="RESULTS", help="the results folder")
    verify.add_argument("--workload", metavar="FILE.py", help="a file with create_model_dict(): evaluates its tasks")
    verify.add_argument("--datasets", metavar="DIR", help="default: ../dataset_formation/datasets beside the checkout")
    verify.add_argument("--device", default="auto", choices=DEVICES, help="default: %(default)s")
    add_edge_commands(commands)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    return run_edge(flags) if flags.command == "edge" else verify_results(flags)


def run_edge(flags: argparse.Namespace) -> int:
    from gemel.edge.commands import run_command

    try:
        return run_command(flags)
    except ValueError as error:  # of the results, the frames, the flags or the workload file
        print(error, file=sys.stderr)
        return 2


def verify_results(flags: argparse.Namespace) -> int:
    from gemel.environment.device import pick_device
    from gemel.results_store.verify import print_checks, verify

    try:
        device = pick_device(flags.device)
        evaluations = evaluations_of(flags.workload, flags.datasets, device) if flags.workload else {}
    except ValueError as error:  # of the workload file, or no such device: the folder itself raises nothing
        print(error, file=sys.stderr)
        return 2
    return print_checks(verify(flags.results, evaluations, device))


def evaluations_of(workload: str, datasets: str | None, device: "torch.device") -> "Mapping[str, Evaluation]":
    """How each task of the workload file is evaluated; runs that file. Raises WorkloadError if it is wrong.

    The one place that reaches up into the checkout: datasets are found and opened by dataset_manager.py.
    """
    import dataset_manager
    from gemel.evaluation.eval_method import evaluate
    from gemel.results_store.verify import DatasetMissing, Evaluation
    from gemel.sample_workload.tasks import DATASETS_ROOT
    from gemel.training.options import TrainingOptions
    from gemel.workload import Task, WorkloadError, load_model_dict, read_workload

    tasks, problems = read_workload(load_model_dict(workload))
    if problems:
        raise WorkloadError(problems)
    roots = [Path(datasets) if datasets else dataset_manager.DEFAULT_ROOT, DATASETS_ROOT]

    def evaluation_of(task: Task) -> Evaluation:
        def accuracy(model, manifest) -> float:
            if dataset_manager.find_dataset(task, roots) is None:
                raise DatasetMissing(f"no dataset {task.dataset!r} in {', '.join(map(str, roots))}")
            size = TrainingOptions.of_flags(manifest["run"].get("flags")).batch_size(task)
            data = dataset_manager.open_task(task, roots, device=device, seed=0, batch_size=size)
            return evaluate(task, data.val, model)

        return Evaluation(task.model, accuracy)

    return {name: evaluation_of(task) for name, task in tasks.items()}


if __name__ == "__main__":
    sys.exit(main())
