"""What lining up channels and matching layers is worth: accuracy right after everything is tied, before any training.

    python -m benchmarks.alignment --workload mine.py --datasets DIR     # minutes; prints a table

Every group is tied to the mean weights, batch normalisation statistics are re-estimated, nothing is trained. Per task:
accuracy on val as a share of the unmerged accuracy. CPU seconds are those of matching and aligning alone.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Mapping

import torch
from torch import nn

import dataset_manager
from dataset_manager import open_task
from gemel.alignment.align import METHODS, Alignment, align
from gemel.alignment.matching import match_groups
from gemel.datasets.loaders import TaskData
from gemel.environment import DEVICES
from gemel.environment.device import pick_device
from gemel.evaluation.eval_method import evaluate
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.merging.console import table
from gemel.sample_workload.tasks import DATASETS_ROOT
from gemel.sharing.groups import Configuration
from gemel.sharing.tying import tie
from gemel.workload import Task, WorkloadError, load_model_dict, read_workload

BATCH_SIZE = 32
MATCHINGS = ("order", "weights", "activations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", metavar="FILE.py", help="defines create_model_dict(); default: the embedded one")
    parser.add_argument("--datasets", metavar="DIR", help="as for merge_workloads.py")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="which images are looked at")
    parser.add_argument(
        "--batches", type=int, default=8, help=f"of {BATCH_SIZE} images per task (default: %(default)s)"
    )
    flags = parser.parse_args()
    tasks, problems = read_workload(load_model_dict(flags.workload))
    if problems:
        raise SystemExit(str(WorkloadError(problems)))
    roots = [flags.datasets] if flags.datasets else [dataset_manager.DEFAULT_ROOT, DATASETS_ROOT]
    device = pick_device(flags.device)
    rows = [row for seed in flags.seeds for row in _rows(tasks, roots, device, seed, flags.batches)]
    print(table(["seed", "matched by", "aligned by", *tasks, "likeness", "spaces moved", "CPU s"], rows))


def _rows(tasks: Mapping[str, Task], roots: list, device: torch.device, seed: int, num_batches: int):
    data = {
        name: open_task(task, roots, device=device, seed=seed, batch_size=task.batch_size or BATCH_SIZE)
        for name, task in tasks.items()
    }
    batches = {name: list(itertools.islice(part.train, num_batches)) for name, part in data.items()}
    images = {name: [batch for batch, _ in pairs] for name, pairs in batches.items()}
    for by, method in itertools.product(MATCHINGS, (None, *METHODS)):
        models = nn.ModuleDict({name: copy.deepcopy(task.model).to(device) for name, task in tasks.items()})
        began = time.process_time()
        groups = match_groups(models, by, images)
        done = align(models, groups, images, method=method, seed=seed) if method else None
        seconds = time.process_time() - began
        shares = _judge(models, groups, tasks, data, batches, device)
        yield [str(seed), by, method or "-", *[f"{share:.3f}" for share in shares], *_summary(done), f"{seconds:.1f}"]


def _judge(
    models: nn.ModuleDict,
    groups: Configuration,
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    batches: Mapping[str, list],
    device: torch.device,
) -> list[float]:
    tie(models, groups)
    shares = []
    for name, task in tasks.items():
        reestimate_statistics(models[name], batches[name], device)
        shares.append(evaluate(task, data[name].val, models[name]) / task.unmerged_acc)
    return shares


def _summary(done: Alignment | None) -> list[str]:
    """Mean likeness of the spaces before and after, and how many of them moved."""
    if not done or not done.spaces:
        return ["-", "-"]
    before, after = (sum(getattr(s, key) for s in done.spaces) / len(done.spaces) for key in ("before", "after"))
    moved = sum(space.num_moved > 0 for space in done.spaces)
    return [f"{before:.2f} -> {after:.2f}", f"{moved} of {len(done.spaces)}"]


if __name__ == "__main__":
    main()
