"""Compares the rules for the weights of tied layers by the accuracy that they give before any training.

    python -m benchmarks.initial_weights --workload FILE.py --datasets DIR --images 80 160 320

Ties every group of the workload at once and re-estimates batch normalisation statistics. The table has each task's
accuracy on val as a share of its unmerged accuracy, and the CPU seconds that the rule took.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.probes import Probe, add_arguments, open_probe
from benchmarks.workloads import run_command
from gemel.environment.seeds import generator
from gemel.evaluation.eval_method import evaluate
from gemel.fitting.batch_norm import match_statistics
from gemel.fitting.least_squares import FitSettings, fit_least_squares
from gemel.fitting.sequential_fit import fit_sequentially
from gemel.fitting.teacher_samples import sample_teachers
from gemel.merging.console import table
from gemel.sharing.groups import Configuration, find_groups
from gemel.sharing.initial_weights import INITIAL_WEIGHTS
from gemel.sharing.tying import restore_snapshot, take_snapshot, tie

Method = Callable[[Probe, Configuration, int], None]  # (probe, groups, images per task); the models are untied


def without_images(rule: str, match: bool = False) -> Method:
    """A rule that needs no images, by name; then statistics, re-estimated or (match) matched to the unmerged model."""

    def method(probe: Probe, groups: Configuration, num_images: int) -> None:
        tie(probe.models, groups, rule)
        for task in probe.models:
            batches = [(batch, None) for batch in probe.batches(task, num_images)]
            if match:
                match_statistics(probe.models[task], probe.teachers[task], batches, probe.device)
            else:
                probe.reestimate(task, num_images)

    return method


def staged(num_stages: int, **options: Any) -> Method:
    """Least squares in stages by depth, from the mean; statistics are re-estimated after each stage."""

    def method(probe: Probe, groups: Configuration, num_images: int) -> None:
        def statistics(stage: int = 0) -> None:
            for task in probe.models:
                probe.reestimate(task, num_images)

        tie(probe.models, groups)
        statistics()
        images = {task: probe.batches(task, num_images) for task in probe.models}
        settings, drawn = FitSettings(num_stages=num_stages, **options), generator(0, "fit")
        fit_least_squares(
            probe.models, probe.teachers, groups, images, settings=settings, generator=drawn, after_stage=statistics
        )

    return method


def sequential(rule: str = "mean", **options: Any) -> Method:
    """A sequential fit, from a rule that needs no images."""

    def method(probe: Probe, groups: Configuration, num_images: int) -> None:
        tie(probe.models, groups, rule)
        images = {task: probe.batches(task, num_images) for task in probe.models}
        asked = sample_teachers(probe.teachers, groups, images, generator=generator(0, "fit"))
        fit_sequentially(probe.models, probe.teachers, groups, images, teacher_samples=asked, **options)

    return method


METHODS: dict[str, Method] = {
    **{rule: without_images(rule) for rule in INITIAL_WEIGHTS},
    "mean, matched statistics": without_images("mean", match=True),
    "least squares, inputs of the unmerged models": staged(1, teacher_inputs=True),
    **{f"least squares, stages: {n}": staged(n) for n in (1, 2, 4, 8)},
    **{f"sequential fit, ridge {ridge:g}": sequential(ridge=ridge) for ridge in (0.01, 0.03, 0.1, 0.3)},
    "sequential fit, from first": sequential("first"),
}


def measure(flags: argparse.Namespace) -> None:
    """Prints one row per number of images and method. Raises WorkloadError with every problem of the workload."""
    probe = open_probe(flags, max(flags.images))
    groups, snapshot = find_groups(probe.models), take_snapshot(probe.models)
    unmerged = {name: evaluate(task, probe.val[name]) for name, task in probe.tasks.items()}
    rows = []
    for num_images in flags.images:
        for name in flags.methods:
            restore_snapshot(snapshot)
            began = time.process_time()
            METHODS[name](probe, groups, num_images)
            seconds = time.process_time() - began
            shares = [evaluate(task, probe.val[t]) / unmerged[t] for t, task in probe.tasks.items()]
            rows.append(
                [name, str(num_images), *(f"{share:.3f}" for share in (*shares, min(shares))), f"{seconds:.1f}"]
            )
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(table(["weights of all groups", "images", *probe.tasks, "worst", "CPU s"], rows))


def main(arguments: list[str] | None = None) -> int:
    """The command; exit codes as in benchmarks.workloads.run_command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--images", type=int, nargs="+", default=[160], help="train images per task (default: 160)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    flags = parser.parse_args(arguments)
    return run_command(lambda: measure(flags))


if __name__ == "__main__":
    sys.exit(main())
