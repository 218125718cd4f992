"""Compares ours with other ways to merge, by the accuracy right after tying: without labels and without training.

    python -m benchmarks.peers --workload FILE.py --datasets DIR --tasks NAME NAME --images 320 --seeds 0 1 2

Ties every group of the tasks at once. The table has each task's accuracy on val as a share of its unmerged accuracy and
the CPU seconds that the method took, medians over the seeds, which select the images. PLeaS and ZipIt are run from
checkouts of their repositories (--pleas, --zipit), with the packages that these import installed.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from benchmarks.peer_checkouts import pleas, zipit
from benchmarks.peer_methods import METHODS, Case, Method
from benchmarks.probes import Probe, open_probe
from benchmarks.workloads import add_workload_arguments, run_command
from gemel.console.tables import table
from gemel.evaluation.eval_method import evaluate
from gemel.forward.modes import to_channels_last
from gemel.sharing.affine import Affine
from gemel.sharing.groups import find_groups, saved_bytes
from gemel.sharing.memory import distinct_bytes

CHECKOUTS = {"PLeaS": pleas, "ZipIt": zipit}  # name -> what makes a method of the path of a checkout
Scores = tuple[list[float], float] | str  # share of unmerged accuracy of each task, CPU seconds; or why there are none


def score(name: str, method: Method, probe: Probe, unmerged: Mapping[str, float], seed: int) -> Scores:
    """Runs a method on copies of the models. What the code of a checkout raises is returned as text."""
    models = to_channels_last(copy.deepcopy(probe.models), probe.device).eval()
    began = time.process_time()
    try:
        method(Case(models, probe.images, probe.device, seed))
    except Exception as error:
        if name not in CHECKOUTS:
            raise
        return f"cannot be run: {type(error).__name__}: {error}".splitlines()[0]
    seconds = time.process_time() - began
    check_everything_is_tied(name, models, probe.models)
    shares = [evaluate(task, probe.val[t], models[t]) / unmerged[t] for t, task in probe.tasks.items()]
    return shares, seconds


def check_everything_is_tied(name: str, models: nn.ModuleDict, unmerged: nn.ModuleDict) -> None:
    """Raises AssertionError where a method saves fewer or more bytes than tying all groups does, private scales and
    biases aside."""
    private = sum(p.nbytes for module in models.modules() if isinstance(module, Affine) for p in module.parameters())
    saved, all_groups = distinct_bytes(unmerged) - distinct_bytes(models) + private, saved_bytes(find_groups(unmerged))
    assert saved == all_groups, f"{name}: saves {saved} bytes; allowed: {all_groups}, those of all groups"


def row_of(name: str, found: list[Scores]) -> list[str]:
    """The row of a method: medians over the seeds, of the tasks, of the worst of them and of the seconds."""
    reasons = [one for one in found if isinstance(one, str)]
    if reasons:
        return [name, reasons[0]]
    scores = [one for one in found if not isinstance(one, str)]
    columns = zip(*([*shares, min(shares)] for shares, _ in scores), strict=True)
    seconds = statistics.median(seconds for _, seconds in scores)
    return [name, *(f"{statistics.median(column):.3f}" for column in columns), f"{seconds:.1f}"]


def measure(flags: argparse.Namespace) -> None:
    """Prints the table. Raises WorkloadError with every problem of the workload."""
    methods = {name: METHODS[name] for name in flags.methods}
    paths = {"PLeaS": flags.pleas, "ZipIt": flags.zipit}
    methods |= {name: CHECKOUTS[name](path) for name, path in paths.items() if path is not None}
    found: dict[str, list[Scores]] = {name: [] for name in methods}
    tasks: list[str] = []
    for seed in flags.seeds:
        probe = open_probe(argparse.Namespace(**{**vars(flags), "seed": seed}), flags.images, names=flags.tasks)
        tasks = list(probe.tasks)
        unmerged = {name: evaluate(task, probe.val[name]) for name, task in probe.tasks.items()}
        for name, method in methods.items():
            found[name].append(score(name, method, probe, unmerged, seed))
            print(f"seed {seed}", *row_of(name, found[name][-1:]), sep="  ", file=sys.stderr, flush=True)
    width = len(tasks) + 3
    rows = [row + [""] * (width - len(row)) for row in (row_of(name, scores) for name, scores in found.items())]
    print(table(["everything tied, nothing trained", *tasks, "worst", "CPU s"], rows))


def main(arguments: list[str] | None = None) -> int:
    """The command; exit codes as in benchmarks.workloads.run_command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    add_workload_arguments(parser)
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="of the workload (default: all)")
    help_of = "train images per task, rounded up to whole batches (default: %(default)s)"
    parser.add_argument("--images", type=int, default=320, help=help_of)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    for name in CHECKOUTS:
        parser.add_argument(f"--{name.lower()}", type=Path, metavar="DIR", help=f"checkout of {name}'s repository")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    return run_command(lambda: measure(flags))


if __name__ == "__main__":
    sys.exit(main())
