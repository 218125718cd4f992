"""How well cheap scores predict which tied layers hurt which task: rank correlation with the harm that is then seen.

    python -m benchmarks.sensitivity --workload FILE.py --datasets DIR     # classifiers; minutes on one core

For a sample of groups: tie that group alone (mean of its weights), re-estimate batch normalisation statistics, and
measure each task on val. Nothing is trained. Sensitivity is seen as the drop of accuracy, which is coarse, and as the rise of
cross-entropy, which is fine but falls where an overconfident model becomes less so. The table has Spearman's rank
correlation of each score of sharing/harm.py with either, over all pairs of group and task and within each task.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from benchmarks.probes import Probe, add_arguments, open_probe, spearman
from gemel.environment.seeds import generator
from gemel.fitting.sensitivity import METHODS, Sensitivity, predict_sensitivity
from gemel.forward.batches import run
from gemel.forward.modes import logits_of
from gemel.merging.console import table
from gemel.sharing.groups import Configuration, Group, find_groups
from gemel.sharing.tying import restore_snapshot, take_snapshot, tie
from gemel.workload import CLASSIFICATION


def sample_groups(groups: Configuration, count: int, seed: int) -> list[Group]:
    """A random sample, in a random order."""
    order = torch.randperm(len(groups), generator=generator(seed, "harm", "groups"))
    return [groups[i] for i in order[:count].tolist()]


def quality(probe: Probe, task: str) -> dict[str, float]:
    """Of what is lower when a model is worse: accuracy and negative cross-entropy, over the val images of the probe."""
    outputs = torch.cat([logits_of(run(probe.models[task], images)) for images, _ in probe.val[task]])
    labels = torch.cat([labels for _, labels in probe.val[task]]).to(probe.device)
    accuracy = (outputs.argmax(1) == labels).double().mean()
    return {"accuracy": float(accuracy), "cross-entropy": -float(F.cross_entropy(outputs, labels))}


def measured_sensitivity(probe: Probe, groups: Sequence[Group], num_images: int) -> dict[str, Sensitivity]:
    """Kind of harm -> (group, task) -> how much worse with that group alone tied, statistics re-estimated."""
    snapshot, harm = take_snapshot(probe.models), {"accuracy": {}, "cross-entropy": {}}

    def measure(tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        for task in tasks:
            probe.reestimate(task, num_images)
        return {task: quality(probe, task) for task in tasks}

    before = measure(list(probe.models))
    for group in groups:
        restore_snapshot(snapshot)
        tie(probe.models, (group,))
        for task, after in measure(group.tasks).items():
            for kind in harm:
                harm[kind][group, task] = before[task][kind] - after[kind]
    restore_snapshot(snapshot)
    return harm


def predictions(
    probe: Probe, groups: Sequence[Group], num_images: int, seed: int
) -> dict[str, tuple[Sensitivity, float]]:
    """Method -> (its scores, CPU seconds)."""
    snapshot = take_snapshot(probe.models)
    tie(probe.models, tuple(groups))
    images = {task: probe.batches(task, num_images) for task in probe.models}
    results = {}
    for method in METHODS:
        began = time.process_time()
        options = {"method": method, "generator": generator(seed, "harm", method)}
        harm = predict_sensitivity(probe.models, probe.teachers, tuple(groups), images, **options)
        results[method] = harm, time.process_time() - began
    restore_snapshot(snapshot)
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--groups", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=80, help="train images per task (default: %(default)s)")
    parser.add_argument("--val-images", type=int, help="per task (default: all)")
    flags = parser.parse_args(arguments)
    probe = open_probe(flags, flags.images, flags.val_images)
    if wrong := [name for name, task in probe.tasks.items() if task.kind != CLASSIFICATION]:
        parser.error(f"{', '.join(wrong)}: cross-entropy is measured of classifiers only")
    groups = sample_groups(find_groups(probe.models), flags.groups, flags.seed)
    seen = measured_sensitivity(probe, groups, flags.images)
    rows = []
    for method, (harm, seconds) in predictions(probe, groups, flags.images, flags.seed).items():
        for kind, truth in seen.items():
            parts = [list(truth), *([key for key in truth if key[1] == task] for task in probe.tasks)]
            ranked = [spearman([harm[k] for k in keys], [truth[k] for k in keys]) for keys in parts]
            rows.append([method, kind, *(f"{value:.2f}" for value in ranked), f"{seconds:.1f}"])
    print(f"{len(groups)} groups, {flags.images} train and {flags.val_images or 'all'} val images per task")
    print(table(["score", "harm seen in", "all pairs", *probe.tasks, "CPU s"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
