"""A task's dataset: finds it by its name, checks it, and opens one loader per split.

Call `check` first, then `open_task`. gemel/datasets/ reads the files; docs/datasets.md shows the layouts.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from gemel.datasets import class_folders
from gemel.datasets.cache import CacheBudget, SampleCache
from gemel.datasets.checks import check
from gemel.datasets.folders import dataset_class_names, find_dataset, open_split
from gemel.datasets.layouts import open_layout
from gemel.datasets.loaders import TaskData, collate_detection, sampling, screening_subset, worker_options
from gemel.environment.seeds import generator
from gemel.workload import CLASSIFICATION, Task

__all__ = ["DEFAULT_ROOT", "check", "find_dataset", "open_task"]

DEFAULT_ROOT = Path(__file__).resolve().parent.parent / "dataset_formation" / "datasets"


def open_task(
    task: Task,
    roots: Sequence[Path],
    *,
    device: torch.device,
    seed: int,
    batch_size: int,
    num_workers: int | None = None,
    screening_images: int = 256,
    cache_bytes: int = 0,
) -> TaskData:
    """The loaders of one task: train shuffled and augmented by the seed alone, val and test in order.

    batch_size: of train; classifiers are evaluated with twice as many. num_workers: processes per loader; None: 0,
    since on a CPU the computation is the bottleneck and loader processes would take cores from it (with CUDA the caller
    divides min(8, cores) among its tasks). screening_images: size of the subset of val that is evaluated first; it
    never decides that a task is at target. cache_bytes: memory for images of val and train that are kept after they
    were decoded. Raises ValueError if the dataset is not found or has a fault.
    """
    folder = find_dataset(task, roots)
    if folder is None:
        raise ValueError(f"{task.name}: dataset: got no folder {task.dataset!r} in {', '.join(map(str, roots))}")

    budget = CacheBudget(cache_bytes)
    layout = None if task.kind == CLASSIFICATION else open_layout(task, folder)

    def loader(split: str, plain: bool = False) -> DataLoader:
        dataset = open_split(task, folder, split, plain, layout)
        if cache_bytes and split != "test":
            dataset.cache = SampleCache(budget, whole=plain or split == "val")
        order = generator(seed, "loader", task.name)
        order_and_size = sampling(dataset, "plain" if plain else split, batch_size, order)
        return DataLoader(
            dataset,
            collate_fn=None if task.kind == CLASSIFICATION else collate_detection,
            generator=generator(seed, "workers", task.name, split, plain),  # not the global generator
            pin_memory=device.type == "cuda",
            **order_and_size,
            **worker_options(dataset, num_workers or 0),
        )

    has_test = class_folders.has_test(task, folder) if layout is None else "test" in layout.splits
    test = loader("test") if has_test else None
    names = dataset_class_names(task, folder, layout)
    val = loader("val")
    screen, plain = screening_subset(val, screening_images), loader("train", plain=True)
    return TaskData(task.name, loader("train"), val, test, screen, plain, names)
