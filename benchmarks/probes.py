"""What benchmarks without training need: the unmerged models of a workload, a few train images, and val."""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import dataset_manager
from gemel.datasets.folders import open_split
from gemel.datasets.loaders import collate_detection
from gemel.environment import DEVICES
from gemel.environment.device import pick_device
from gemel.environment.seeds import generator
from gemel.fitting.batch_norm import reestimate_statistics
from gemel.forward.batches import Batch
from gemel.sample_workload.tasks import DATASETS_ROOT
from gemel.workload import CLASSIFICATION, Task, WorkloadError, load_model_dict, read_workload

BATCH_SIZE = {True: 40, False: 4}  # of classifiers and of detectors


@dataclass(frozen=True)
class Probe:
    """A workload, as it was and to be tied."""

    tasks: Mapping[str, Task]
    models: nn.ModuleDict
    teachers: Mapping[str, nn.Module]
    images: Mapping[str, Sequence[Batch]]  # of train, with the val transform
    val: Mapping[str, list]  # batches (images, targets)
    device: torch.device

    def batches(self, task: str, count: int) -> list[Batch]:
        """About the first `count` images, in whole batches."""
        size = len(self.images[task][0])
        return list(self.images[task][: -(-count // size)])

    def reestimate(self, task: str, count: int) -> None:
        """Batch normalisation statistics of the task's model over the first `count` images."""
        batches = [(batch, None) for batch in self.batches(task, count)]
        reestimate_statistics(self.models[task], batches, self.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", metavar="FILE.py", help="defines create_model_dict(); default: the embedded one")
    parser.add_argument("--datasets", metavar="DIR", type=Path, help="as for merge_workloads.py")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def open_probe(flags: argparse.Namespace, num_images: int, num_val: int | None = None) -> Probe:
    """Reads the workload and loads `num_images` train and `num_val` val images per task (None: all) into memory."""
    tasks, problems = read_workload(load_model_dict(flags.workload))
    roots = [flags.datasets or dataset_manager.DEFAULT_ROOT, DATASETS_ROOT]
    problems += dataset_manager.check(tasks, roots)
    if problems:
        raise WorkloadError(problems)
    device = pick_device(flags.device)
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()}).to(device)
    splits = {
        split: {n: load_split(t, roots, split, flags.seed) for n, t in tasks.items()} for split in ("train", "val")
    }
    images = {
        name: [images for images, _ in take(task, splits["train"][name], num_images)] for name, task in tasks.items()
    }
    val = {name: take(task, splits["val"][name], num_val) for name, task in tasks.items()}
    teachers = {name: copy.deepcopy(model).eval() for name, model in models.items()}
    return Probe(tasks, models, teachers, images, val, device)


def load_split(task: Task, roots: Sequence[Path], split: str, seed: int) -> Subset:
    """The split's samples in a random order, untouched by augmentation."""
    dataset = open_split(task, dataset_manager.find_dataset(task, roots), split)
    dataset.transform = task.val_transform
    return Subset(dataset, torch.randperm(len(dataset), generator=generator(seed, "probe", split, task.name)).tolist())


def take(task: Task, samples: Subset, count: int | None) -> list:
    """The first samples, in batches (images, targets) of one size but for the last."""
    kind = task.kind == CLASSIFICATION
    collate = None if kind else collate_detection
    chosen = Subset(samples, range(min(count or len(samples), len(samples))))
    return list(DataLoader(chosen, BATCH_SIZE[kind], collate_fn=collate))


def ranks(values: Sequence[float]) -> Tensor:
    """0 for the smallest and so on; equal values share their mean rank."""
    tensor = torch.tensor(values, dtype=torch.float64)
    smaller, equal = tensor[None] < tensor[:, None], tensor[None] == tensor[:, None]
    return smaller.sum(1) + (equal.sum(1) - 1) / 2


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])
