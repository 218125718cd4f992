"""Measures what aligning channels and matching layers contributes: accuracy after tying all groups, without training.

    python -m benchmarks.alignment --workload mine.py --datasets DIR     # minutes; prints a table

For every way to match layers and to align channels: ties all groups to the mean of their weights, re-estimates batch
normalisation statistics, trains nothing. The table has each task's accuracy on val as a share of its unmerged accuracy,
and the CPU seconds of matching and aligning alone.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Iterator, Mapping

from torch import nn

from benchmarks.workloads import Workload, add_workload_arguments, open_workload, run_command
from dataset_manager import open_task
from gemel.alignment.align import METHODS, Alignment, align
from gemel.alignment.matching import match_groups
from gemel.console.tables import table
from gemel.datasets.loaders import TaskData
from gemel.evaluation.eval_method import evaluate
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.sharing.groups import Configuration
from gemel.sharing.tying import tie

BATCH_SIZE = 32
MATCHINGS = ("order", "weights", "activations")


def rows_of(workload: Workload, seed: int, num_batches: int) -> Iterator[list[str]]:
    """One row per way to match layers and to align channels, on `num_batches` batches of train images per task."""
    tasks, device = workload.tasks, workload.device
    data = {
        name: open_task(task, workload.roots, device=device, seed=seed, batch_size=task.batch_size or BATCH_SIZE)
        for name, task in tasks.items()
    }
    batches = {name: list(itertools.islice(part.train, num_batches)) for name, part in data.items()}
    images = {name: [batch for batch, _ in pairs] for name, pairs in batches.items()}
    for matching, method in itertools.product(MATCHINGS, (None, *METHODS)):
        models = nn.ModuleDict({name: copy.deepcopy(task.model).to(device) for name, task in tasks.items()})
        began = time.process_time()
        groups = match_groups(models, matching, images)
        done = align(models, groups, images, method=method, seed=seed) if method else None
        seconds = time.process_time() - began
        shares = _shares(models, groups, workload, data, batches)
        accuracies = [f"{share:.3f}" for share in shares]
        yield [str(seed), matching, method or "-", *accuracies, *_similarities(done), f"{seconds:.1f}"]


def _shares(
    models: nn.ModuleDict,
    groups: Configuration,
    workload: Workload,
    data: Mapping[str, TaskData],
    batches: Mapping[str, list],
) -> list[float]:
    """Accuracy / unmerged accuracy of every task, after all groups are tied to the mean of their weights."""
    tie(models, groups)
    shares = []
    for name, task in workload.tasks.items():
        reestimate_statistics(models[name], batches[name], workload.device)
        shares.append(evaluate(task, data[name].val, models[name]) / task.unmerged_acc)
    return shares


def _similarities(done: Alignment | None) -> list[str]:
    """Mean similarity of the channel spaces before and after aligning, and how many of them were permuted."""
    if not done or not done.spaces:
        return ["-", "-"]
    before, after = (sum(getattr(s, key) for s in done.spaces) / len(done.spaces) for key in ("before", "after"))
    moved = sum(space.num_moved > 0 for space in done.spaces)
    return [f"{before:.2f} -> {after:.2f}", f"{moved} of {len(done.spaces)}"]


def measure(flags: argparse.Namespace) -> None:
    """Prints the table. Raises WorkloadError with every problem of the workload."""
    workload = open_workload(flags)
    rows = [row for seed in flags.seeds for row in rows_of(workload, seed, flags.batches)]
    header = ["seed", "matched by", "aligned by", *workload.tasks, "similarity", "spaces permuted", "CPU s"]
    print(table(header, rows))


def main(arguments: list[str] | None = None) -> int:
    """The command; exit codes as in benchmarks.workloads.run_command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_workload_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="select the images")
    parser.add_argument(
        "--batches", type=int, default=8, help=f"of {BATCH_SIZE} images per task (default: %(default)s)"
    )
    flags = parser.parse_args(arguments)
    return run_command(lambda: measure(flags))


if __name__ == "__main__":
    sys.exit(main())
