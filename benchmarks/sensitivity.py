"""Measures how well predicted sensitivity ranks groups by the loss of accuracy that is measured after tying them.

    python -m benchmarks.sensitivity --workload FILE.py --datasets DIR     # classifiers; minutes on one core

For each group of a sample: ties that group alone (to the mean of its weights), re-estimates batch normalisation
statistics, and measures each task on val. Nothing is trained. Measured sensitivity is the drop of accuracy, which is
coarse, and the rise of cross-entropy, which is fine but can fall when an overconfident model becomes less confident.
The table has Spearman's rank correlation of each method of gemel/fitting/sensitivity.py with either, over all pairs of
group and task and within each task.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from benchmarks.probes import Probe, add_arguments, open_probe, spearman
from benchmarks.workloads import run_command
from gemel.console.tables import table
from gemel.environment.seeds import generator
from gemel.fitting.sensitivity import METHODS, Sensitivity, predict_sensitivity
from gemel.forward.batches import run
from gemel.forward.modes import logits_of
from gemel.sharing.groups import Configuration, Group, find_groups
from gemel.sharing.tying import restore_snapshot, take_snapshot, tie
from gemel.workload import CLASSIFICATION, Problem, WorkloadError


def sample_groups(groups: Configuration, count: int, seed: int) -> list[Group]:
    """A random sample of the groups, in a random order."""
    order = torch.randperm(len(groups), generator=generator(seed, "harm", "groups"))
    return [groups[i] for i in order[:count].tolist()]


def quality(probe: Probe, task: str) -> dict[str, float]:
    """Accuracy and negative cross-entropy over the val images: both are lower for a worse model."""
    outputs = torch.cat([logits_of(run(probe.models[task], images)) for images, _ in probe.val[task]])
    labels = torch.cat([labels for _, labels in probe.val[task]]).to(probe.device)
    accuracy = (outputs.argmax(1) == labels).double().mean()
    return {"accuracy": float(accuracy), "cross-entropy": -float(F.cross_entropy(outputs, labels))}


def measured_sensitivity(probe: Probe, groups: Sequence[Group], num_images: int) -> dict[str, Sensitivity]:
    """ "accuracy" or "cross-entropy" -> (group, task) -> how much worse it is with that group alone tied.

    Statistics are re-estimated on `num_images` train images before and after tying.
    """
    snapshot = take_snapshot(probe.models)
    measured: dict[str, Sensitivity] = {"accuracy": {}, "cross-entropy": {}}

    def measure(tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        for task in tasks:
            probe.reestimate(task, num_images)
        return {task: quality(probe, task) for task in tasks}

    before = measure(list(probe.models))
    for group in groups:
        restore_snapshot(snapshot)
        tie(probe.models, (group,))
        for task, after in measure(group.tasks).items():
            for kind in measured:
                measured[kind][group, task] = before[task][kind] - after[kind]
    restore_snapshot(snapshot)
    return measured


def predictions(
    probe: Probe, groups: Sequence[Group], num_images: int, seed: int
) -> dict[str, tuple[Sensitivity, float]]:
    """Method -> (predicted sensitivity of every group and task, CPU seconds)."""
    snapshot = take_snapshot(probe.models)
    tie(probe.models, tuple(groups))
    images = {task: probe.batches(task, num_images) for task in probe.models}
    results = {}
    for method in METHODS:
        began = time.process_time()
        drawn = generator(seed, "harm", method)
        scores = predict_sensitivity(
            probe.models, probe.teachers, tuple(groups), images, method=method, generator=drawn
        )
        results[method] = scores, time.process_time() - began
    restore_snapshot(snapshot)
    return results


def measure(flags: argparse.Namespace) -> None:
    """Prints one row per method and measure. Raises WorkloadError with every problem, detectors among them."""
    probe = open_probe(flags, flags.images, flags.val_images)
    detectors = [task for task in probe.tasks.values() if task.kind != CLASSIFICATION]
    if detectors:
        raise WorkloadError([Problem(task.name, "task", repr(task.kind), CLASSIFICATION) for task in detectors])
    groups = sample_groups(find_groups(probe.models), flags.groups, flags.seed)
    measured = measured_sensitivity(probe, groups, flags.images)
    rows = []
    for method, (predicted, seconds) in predictions(probe, groups, flags.images, flags.seed).items():
        for kind, truth in measured.items():
            parts = [list(truth), *([key for key in truth if key[1] == task] for task in probe.tasks)]
            ranked = [spearman([predicted[k] for k in keys], [truth[k] for k in keys]) for keys in parts]
            rows.append([method, kind, *(f"{value:.2f}" for value in ranked), f"{seconds:.1f}"])
    print(f"{len(groups)} groups, {flags.images} train and {flags.val_images or 'all'} val images per task")
    print(table(["method", "measured by", "all pairs", *probe.tasks, "CPU s"], rows))


def main(arguments: list[str] | None = None) -> int:
    """The command; exit codes as in benchmarks.workloads.run_command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--groups", type=int, default=20, help="sampled groups (default: %(default)s)")
    parser.add_argument("--images", type=int, default=80, help="train images per task (default: %(default)s)")
    parser.add_argument("--val-images", type=int, help="per task (default: all)")
    flags = parser.parse_args(arguments)
    return run_command(lambda: measure(flags))


if __name__ == "__main__":
    sys.exit(main())
