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
from torch.utils.data import DataLoader, Sampler, SequentialSampler, Subset

from dataset_cache import SampleCache
from dataset_checks import check
from dataset_folders import ClassificationFolder, FolderDataset, dataset_class_names, find_dataset, open_split
from dataset_layouts import open_layout
from environment import derive_seed, generator
from workload import CLASSIFICATION, Task

__all__ = [
    "DEFAULT_ROOT",
    "TaskData",
    "check",
    "find_dataset",
    "open_task",
    "plain_images",
    "repeats",
    "reseed",
    "restarted",
]

DEFAULT_ROOT = Path(__file__).resolve().parent.parent / "dataset_formation" / "datasets"

MOST_PLAIN_IMAGES = 960  # more do not change what is measured or fitted on them

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The loaders of one task; a batch never mixes tasks."""

    task: str
    train: DataLoader
    val: DataLoader
    test: DataLoader | None
    screen: DataLoader  # a fixed subset of val, evenly spread; val itself where that is small
    plain: DataLoader  # train without augmentation, in order
    class_names: tuple[str, ...]  # by class id, without the background; () where the dataset names none


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
    """Loaders of one task: train shuffled and augmented by the seed alone, val and test in order.

    screening_images: size of the subset of val that is evaluated first; it never decides that a task is at its target.
    cache_bytes: of samples of val, and of train without augmentation, that stay in memory once they were read.
    num_workers: processes per loader. None is 0: on a CPU computing is the bottleneck and workers would take cores
    from it; with CUDA the caller divides min(8, cores) among its tasks. Raises ValueError if there is no dataset.
    """
    folder = find_dataset(task, roots)
    if folder is None:
        raise ValueError(f"{task.name}: dataset: got no folder {task.dataset!r} in {', '.join(map(str, roots))}")

    layout = None if task.kind == CLASSIFICATION else open_layout(task, folder)

    def loader(split: str, plain: bool = False) -> DataLoader:
        dataset = open_split(task, folder, split, plain, layout)
        if cache_bytes and (plain or split == "val"):
            dataset.cache = SampleCache(cache_bytes // 2)
        order = generator(seed, "loader", task.name)
        sampling = _sampling(dataset, "plain" if plain else split, batch_size, order)
        return DataLoader(
            dataset,
            collate_fn=None if task.kind == CLASSIFICATION else collate_detection,
            generator=generator(
                seed, "workers", task.name, split, plain
            ),  # else every pass draws from the global generator
            pin_memory=device.type == "cuda",
            **sampling,
            **_worker_options(dataset, num_workers or 0),
        )

    has_test = (folder / "test").is_dir() if layout is None else "test" in layout.splits
    test = loader("test") if has_test else None
    names = dataset_class_names(task, folder, layout)
    val = loader("val")
    screen, plain = _screen(val, screening_images), loader("train", plain=True)
    return TaskData(task.name, loader("train"), val, test, screen, plain, names)


def reseed(data: TaskData, seed: int, *purpose: object) -> None:
    """Makes the order and the augmentation of what `data.train` yields from now on depend on (seed, purpose) alone."""
    data.train.sampler.generator.manual_seed(derive_seed(seed, *purpose, data.task))


def plain_images(
    data: TaskData, num_pixels: int, seed: int, *purpose: object, batch_pixels: int = 0
) -> list[Tensor] | list[list[Tensor]]:
    """Batches of images of train without labels and augmentation: a sample of the task's inputs, by (seed, purpose).

    As many as have `num_pixels` pixels together, at least a batch, at most MOST_PLAIN_IMAGES. Batches are of the task's
    size or, where all images have the same size and more fit in, of as many images as have `batch_pixels` pixels.
    """
    dataset, batch_size = data.plain.dataset, data.plain.batch_size
    order = torch.randperm(len(dataset), generator=generator(seed, *purpose, data.task)).tolist()
    height, width = dataset[order[0]][0].shape[-2:]
    wanted = min(len(order), max(batch_size, min(MOST_PLAIN_IMAGES, num_pixels // (height * width))))
    images = [dataset[index][0] for index in order[:wanted]]
    if all(image.shape[-2:] == (height, width) for image in images):
        batch_size = max(batch_size, batch_pixels // (height * width))
    batches = [images[start : start + batch_size] for start in range(0, wanted, batch_size)]
    return batches if data.plain.collate_fn is collate_detection else [torch.stack(batch) for batch in batches]


def restarted(loader: DataLoader, **changes: Any) -> DataLoader:
    """A new loader over the same samples in the same order, with processes of its own; changes: such as batch_size."""
    options = {
        "batch_size": loader.batch_size,
        "sampler": loader.sampler,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "drop_last": loader.drop_last,
        "generator": loader.generator,
    }
    if loader.num_workers:
        options["persistent_workers"] = loader.persistent_workers
        options["multiprocessing_context"] = loader.multiprocessing_context
    return DataLoader(loader.dataset, **{**options, **changes})


def _screen(val: DataLoader, num_images: int) -> DataLoader:
    length = len(val.dataset)
    if length <= num_images:
        return val
    chosen = torch.linspace(0, length - 1, num_images).long().tolist()
    if not any(val.dataset.has_labels(index) for index in chosen):
        return val  # a detector's accuracy on images without objects is undefined
    subset = Subset(val.dataset, chosen)
    return DataLoader(subset, sampler=SequentialSampler(subset), batch_size=val.batch_size, collate_fn=val.collate_fn)


def repeats(dataset: FolderDataset, num_images: int = 4, num_draws: int = 4) -> bool:
    """Whether the transform, if it draws at all, has so few outcomes for an image (a flip has two) that they recur."""
    for index in range(min(num_images, len(dataset))):
        outcomes: list[Tensor] = []
        for seed in range(num_draws):
            image = dataset[(index, seed)][0]
            if not any(torch.equal(image, other) for other in outcomes):
                outcomes.append(image)
        if 2 * len(outcomes) > num_draws:
            return False
    return True


class ShuffledKeys(Sampler):
    """A new order for every pass, as (index, seed for what the transform draws), from one generator.

    skip: samples that the next pass leaves out at its beginning, to go on within a pass.
    """

    def __init__(self, length: int, generator: torch.Generator):
        self.length, self.generator, self.skip = length, generator, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.length, generator=self.generator)
        seeds = torch.randint(2**31, (self.length,), generator=self.generator)
        skip, self.skip = self.skip, 0
        return zip(order[skip:].tolist(), seeds[skip:].tolist(), strict=True)


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
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return {"num_workers": num_workers, "persistent_workers": True, "multiprocessing_context": "spawn"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2"])  # once, not in every worker: seconds each
    return {"num_workers": num_workers, "persistent_workers": True, "multiprocessing_context": context}
