"""Commands: python -m gemel plan MODEL ..., on a results folder verify, report and watch, and edge ....

Everything heavy is imported inside a command, so that --help answers at once.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gemel.console.flags import parse_size
from gemel.edge.flags import add_edge_commands
from gemel.environment import DEVICES

if TYPE_CHECKING:
    import torch

    from gemel.results_store.verify import Evaluation


EXIT_CODES = "Exit codes: 0 done; 1 a check failed, or another failure; 2 the input is wrong; 130 interrupted."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gemel", description="Plans a merge, and looks at its results.", epilog=EXIT_CODES
    )
    parser.add_argument("--debug", action="store_true", help="on an error, print where in the code it came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", epilog=EXIT_CODES, help="what models could save by sharing; needs no data")
    models_help = "a builder's name such as resnet50, or resnet50:10 for ten classes; or one workload file FILE.py"
    plan.add_argument("models", nargs="+", metavar="MODEL", help=models_help)
    plan.add_argument("--memory", type=parse_size, metavar="SIZE", help="of the box (default: boxes of 2, 4, 8 GiB)")
    plan.add_argument("--json", metavar="FILE.json", help="write the plan as JSON as well")
    plan.add_argument("--html", metavar="FILE.html", help="write the plan as a page as well")
    report = commands.add_parser("report", epilog=EXIT_CODES, help="write RESULTS/report.html anew")
    report.add_argument("results", metavar="RESULTS", help="the results folder")
    watch = commands.add_parser("watch", epilog=EXIT_CODES, help="follow a merge from another terminal")
    watch.add_argument("results", metavar="RESULTS", help="the results folder")
    watch.add_argument("--once", action="store_true", help="print what happened so far, and end")
    verify = commands.add_parser(
        "verify", epilog=EXIT_CODES, help="check every file, tensor, tie and accuracy; one line per check"
    )
    verify.add_argument("results", metavar="RESULTS", help="the results folder")
    verify.add_argument("--workload", metavar="FILE.py", help="a file with create_model_dict(): evaluates its tasks")
    verify.add_argument("--datasets", metavar="DIR", help="default: ../dataset_formation/datasets beside the checkout")
    verify.add_argument("--device", default="auto", choices=DEVICES, help="default: %(default)s")
    add_edge_commands(commands)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    command = {
        "plan": plan_command,
        "report": report_command,
        "watch": watch_command,
        "verify": verify_command,
        "edge": edge_command,
    }
    try:
        return command[flags.command](flags)
    except ValueError as error:  # a WorkloadError or ResultsError, or no such device
        if flags.debug:
            raise
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # a box that only loads results has no more than that needs
        print(f"{error}: this command needs a checkout with requirements.txt installed", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def plan_command(flags: argparse.Namespace) -> int:
    """Prints what could be saved, and writes it where that is asked for."""
    from gemel.merging.plan import build_named, make_plan, name_problems, plan_of, plan_text
    from gemel.report.plan_page import writable_problems, write_plan
    from gemel.workload import WorkloadError, load_model_dict

    problems = writable_problems(flags.json, flags.html)
    is_file = len(flags.models) == 1 and flags.models[0].endswith(".py")
    problems += [] if is_file else name_problems(flags.models)
    if problems:
        raise WorkloadError(problems)
    planned = plan_of(load_model_dict(flags.models[0])) if is_file else make_plan(build_named(flags.models))
    print(plan_text(planned, flags.memory))
    write_plan(planned, flags.memory, flags.json, flags.html)
    return 0


def report_command(flags: argparse.Namespace) -> int:
    """Writes the report of a results folder."""
    from gemel.report.page import write_report

    print(f"wrote {write_report(flags.results)}")
    return 0


def watch_command(flags: argparse.Namespace) -> int:
    """Follows the log of a run until it ends."""
    from gemel.console.watch import watch

    watch(flags.results, follow=not flags.once)
    return 0


def edge_command(flags: argparse.Namespace) -> int:
    """The commands of a box with little memory."""
    from gemel.edge.commands import run_command

    return run_command(flags)


def verify_command(flags: argparse.Namespace) -> int:
    """Checks a results folder; a damaged one raises nothing, it is said line by line."""
    from gemel.environment.device import pick_device
    from gemel.results_store.verify import print_checks, verify

    device = pick_device(flags.device)
    evaluations = evaluations_of(flags.workload, flags.datasets, device) if flags.workload else {}
    return print_checks(verify(flags.results, evaluations, device))


def evaluations_of(workload: str, datasets: str | None, device: "torch.device") -> "Mapping[str, Evaluation]":
    """How each task of the workload file is evaluated; runs that file. Raises WorkloadError if it is wrong.

    The one place that reaches up into the checkout: datasets are found and opened by dataset_manager.py.
    """
    import dataset_manager
    from gemel.evaluation.eval_method import evaluate
    from gemel.results_store.verify import DatasetMissing, Evaluation
    from gemel.sample_workload.tasks import dataset_roots
    from gemel.training.options import TrainingOptions
    from gemel.workload import Task, WorkloadError, load_model_dict, read_workload

    tasks, problems = read_workload(load_model_dict(workload))
    if problems:
        raise WorkloadError(problems)
    roots = dataset_roots(tasks, Path(datasets).expanduser() if datasets else dataset_manager.DEFAULT_ROOT)

    def evaluation_of(task: Task) -> Evaluation:
        def accuracy(model, manifest) -> float:
            if dataset_manager.find_dataset(task, roots) is None:
                raise DatasetMissing(f"no dataset {task.dataset!r} in {', '.join(map(str, roots))}")
            size = TrainingOptions.of_flags(manifest["run"].get("flags")).batch_size(task)
            data = dataset_manager.open_task(task, roots, device=device, seed=0, batch_size=size)
            return evaluate(task, data.val, model)

        return Evaluation(task.model, accuracy)

    return {name: evaluation_of(task) for name, task in tasks.items()}


def end_process(code: int) -> NoReturn:
    """Ends without taking down the modules of torch, which takes seconds on a busy machine: all is written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    exit_code = main()
    edge = sys.modules.get("gemel.edge.commands")
    if edge is not None and edge.signalled.is_set():  # a service is ended by SIGTERM, and has a second for it
        end_process(exit_code)
    sys.exit(exit_code)
