"""Datasets found by task name, and the loaders of one task: `check` first, then `open_task`.

dataset_folders reads the files, dataset_checks says what is wrong with them. The README shows how the folders look.
"""

import logging
import multiprocessing
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from dataset_checks import check
from dataset_folders import ClassificationFolder, FolderDataset, class_names, find_dataset, open_split
from environment import derive_seed, generator
from workload import CLASSIFICATION, Task

__all__ = ["DEFAULT_ROOT", "TaskData", "check", "find_dataset", "open_task", "reseed"]

DEFAULT_ROOT = Path(__file__).resolve().parent.parent / "dataset_formation" / "datasets"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The loaders of one task; a batch never mixes tasks."""

    task: str
    train: DataLoader
    val: DataLoader
    test: DataLoader | None
    class_names: tuple[str, ...]  # in the order of the labels; () for detection, whose format names no classes


def open_task(
    task: Task,
    roots: Sequence[Path],
    *,
    device: torch.device,
    seed: int,
    batch_size: int,
    num_workers: int | None = None,
) -> TaskData:
    """Loaders of one task: train shuffled and augmented by the seed alone, val and test in order.

    num_workers: processes per loader. None is 0: on a CPU computing is the bottleneck and workers would take cores
    from it; with CUDA the caller divides min(8, cores) among its tasks. Raises ValueError if there is no dataset.
    """
    folder = find_dataset(task, roots)
    if folder is None:
        raise ValueError(f"{task.name}: dataset: got no folder {task.dataset!r} in {', '.join(map(str, roots))}")

    def loader(split: str) -> DataLoader:
        dataset = open_split(task, folder, split)
        sampling = _sampling(dataset, split, batch_size, generator(seed, "loader", task.name))
        return DataLoader(
            dataset,
            collate_fn=None if task.kind == CLASSIFICATION else collate_detection,
            generator=generator(seed, "workers", task.name, split),  # else every pass draws from the global generator
            pin_memory=device.type == "cuda",
            **sampling,
            **_worker_options(dataset, num_workers or 0),
        )

    test = loader("test") if (folder / "test").is_dir() else None
    names = tuple(class_names(folder)) if task.kind == CLASSIFICATION else ()
    return TaskData(task.name, loader("train"), loader("val"), test, names)


def reseed(data: TaskData, seed: int, *purpose: object) -> None:
    """Makes the order and the augmentation of what `data.train` yields from now on depend on (seed, purpose) alone."""
    data.train.sampler.generator.manual_seed(derive_seed(seed, *purpose, data.task))


class ShuffledKeys(Sampler):
    """A new order for every pass, as (index, seed for what the transform draws), from one generator."""

    def __init__(self, length: int, generator: torch.Generator):
        self.length, self.generator = length, generator

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.length, generator=self.generator)
        seeds = torch.randint(2**31, (self.length,), generator=self.generator)
        return zip(order.tolist(), seeds.tolist(), strict=True)


def collate_detection(batch: list[tuple]) -> tuple[list[Tensor], list[dict]]:
    """(images, targets) as two lists: the images of a detector differ in size."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _sampling(dataset: FolderDataset, split: str, batch_size: int, order: torch.Generator) -> dict[str, Any]:
    """DataLoader arguments: train is shuffled; val and test are in order, in larger batches as no gradients are kept.

    A trailing train batch of one sample would break BatchNorm, so it is dropped, unless it is all there is.
    """
    if split == "train":
        sampler = ShuffledKeys(len(dataset), order)
        return {"sampler": sampler, "batch_size": batch_size, "drop_last": len(dataset) >= batch_size}
    larger = 2 if isinstance(dataset, ClassificationFolder) else 1
    return {"sampler": SequentialSampler(dataset), "batch_size": larger * batch_size}


def _worker_options(dataset: FolderDataset, num_workers: int) -> dict[str, Any]:
    """DataLoader arguments; workers are never forked from this process: it may hold CUDA and thread pools."""
    if num_workers == 0:
        return {"num_workers": 0}
    try:
        pickle.dumps(dataset)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        log.warning("%s: loads in the main process, since its transforms cannot be pickled: %s", dataset.task, error)
        return {"num_workers": 0}
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    return {"num_workers": num_workers, "persistent_workers": True, "multiprocessing_context": method}
