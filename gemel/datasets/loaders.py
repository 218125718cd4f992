"""The loaders of one task: order and augmentation from a seed, restarts, images without augmentation."""

import logging
import math
import multiprocessing
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler, Subset

from gemel.datasets.folders import ClassificationFolder, FolderDataset
from gemel.datasets.records import header_size
from gemel.environment.seeds import derive_seed, generator
from gemel.forward.batches import Batch

MAX_PLAIN_IMAGES = 480  # benchmarks/LOG.md, 2026-11-28 Half as many images

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The loaders of one task; a batch never mixes tasks."""

    task: str
    train: DataLoader
    val: DataLoader
    test: DataLoader | None
    screen: DataLoader  # a fixed, evenly spread subset of val; val itself if that is small
    plain: DataLoader  # train without augmentation, in order
    class_names: tuple[str, ...]  # by class id, without the background; () if the dataset has no names


def num_samples(loader: DataLoader) -> int:
    """Samples in a pass of the loader."""
    dataset: Any = loader.dataset
    return len(dataset)


def batch_size_of(loader: DataLoader) -> int:
    """Samples in a batch of the loader."""
    if isinstance(loader.batch_sampler, SameSizeBatches):
        return loader.batch_sampler.batch_size
    return loader.batch_size or 1


def reseed(data: TaskData, seed: int, *purpose: object) -> None:
    """Reseeds `data.train`: its order and augmentation from now on depend on (seed, purpose, task) alone."""
    sampler: Any = data.train.sampler  # a ShuffledKeys
    sampler.generator.manual_seed(derive_seed(seed, *purpose, data.task))


def plain_images(
    data: TaskData,
    num_pixels: int,
    seed: int,
    *purpose: object,
    batch_pixels: int = 0,
    max_batch: float = math.inf,
    max_images: int = MAX_PLAIN_IMAGES,
) -> list[Batch]:
    """Batches of train images without labels and augmentation: a random sample of the task's inputs by (seed, purpose).

    The number of images is such that they have `num_pixels` pixels in total, at least one batch and at most
    `max_images`. A batch has the task's batch size or, if all images have the same size, as many images as have
    `batch_pixels` pixels in total, whichever is larger, but no more than `max_batch` images. No batch mixes image sizes
    (see SameSizeBatches).
    """
    dataset: Any = data.plain.dataset
    batch_size = batch_size_of(data.plain)
    order = torch.randperm(len(dataset), generator=generator(seed, *purpose, data.task)).tolist()
    height, width = dataset[order[0]][0].shape[-2:]
    wanted = min(len(order), max(batch_size, min(max_images, num_pixels // (height * width))))
    images = [dataset[index][0] for index in order[:wanted]]
    if all(image.shape[-2:] == (height, width) for image in images):
        batch_size = max(batch_size, batch_pixels // (height * width))
    batch_size = int(min(batch_size, max_batch))
    batches = SameSizeBatches([tuple(image.shape[-2:]) for image in images], batch_size)
    parts = [[images[i] for i in indices] for indices in batches]
    return [*parts] if data.plain.collate_fn is collate_detection else [torch.stack(part) for part in parts]


def restarted(loader: DataLoader, **changes: Any) -> DataLoader:
    """A new loader with new processes over the same samples in the same order; changes: other DataLoader arguments."""
    options: dict[str, Any] = {
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
    options |= changes
    if not options["num_workers"]:
        options = {k: v for k, v in options.items() if k not in ("persistent_workers", "multiprocessing_context")}
    if isinstance(loader.batch_sampler, SameSizeBatches):
        size = changes.get("batch_size", loader.batch_sampler.batch_size)
        options["batch_sampler"] = SameSizeBatches(loader.batch_sampler.sizes, size)
        for key in ("batch_size", "sampler", "drop_last"):
            del options[key]
    return DataLoader(loader.dataset, **options)


def screening_subset(val: DataLoader, num_images: int) -> DataLoader:
    """A loader of `num_images` evenly spread samples of val; val itself if it has no more, or they have no objects."""
    dataset: Any = val.dataset
    length = len(dataset)
    if length <= num_images:
        return val
    chosen = torch.linspace(0, length - 1, num_images).long().tolist()
    if not any(dataset.has_labels(index) for index in chosen):
        return val  # a detector's accuracy on images without objects is undefined
    subset = Subset(dataset, chosen)
    if isinstance(val.batch_sampler, SameSizeBatches):
        sizes = [val.batch_sampler.sizes[index] for index in chosen]
        batches = SameSizeBatches(sizes, val.batch_sampler.batch_size)
        return DataLoader(subset, batch_sampler=batches, collate_fn=val.collate_fn)
    return DataLoader(subset, sampler=SequentialSampler(subset), batch_size=val.batch_size, collate_fn=val.collate_fn)


def repeats(dataset: FolderDataset, num_images: int = 4, num_draws: int = 4) -> bool:
    """Whether random augmentation, if there is any, has so few outcomes for an image (a flip: two) that they recur."""
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
    """Keys (index, seed of the augmentation) in a new random order for every pass, drawn from one generator.

    skip: number of samples at the start of the next pass to leave out, to resume within a pass.
    """

    def __init__(self, length: int, generator: torch.Generator) -> None:
        self.length, self.generator, self.skip = length, generator, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.length, generator=self.generator)
        seeds = torch.randint(2**31, (self.length,), generator=self.generator)
        skip, self.skip = self.skip, 0
        return zip(order[skip:].tolist(), seeds[skip:].tolist(), strict=True)


class SameSizeBatches(Sampler):
    """Batches of at most batch_size samples, in order, whose images all have one size.

    Detectors pad the images of a batch to the largest, and what they find in an image depends on its padding: so no
    image's result depends on the images beside it. sizes: (height, width) of every sample's image.
    """

    def __init__(self, sizes: Sequence[tuple[int, ...] | None], batch_size: int) -> None:
        self.sizes, self.batch_size = sizes, batch_size
        of_size: dict[Any, list[int]] = {}
        for index, size in enumerate(sizes):
            of_size.setdefault(size, []).append(index)
        self.batches = [
            indices[start : start + batch_size]
            for indices in of_size.values()
            for start in range(0, len(indices), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def image_sizes(dataset: FolderDataset, num_samples: int = 4) -> list[tuple[int, int] | None]:
    """The sizes of the images as they are stored, or (None, ...) if the transform brings a few of them to one size."""
    sizes = [header_size(sample[0], dataset.turned) for sample in dataset.samples]
    first = {size: index for index, size in reversed([*enumerate(sizes)])}
    shown = [tuple(dataset[index][0].shape) for index in list(first.values())[:num_samples]] if len(first) > 1 else []
    return sizes if len(set(shown)) > 1 else [None] * len(sizes)


def collate_detection(batch: list[tuple]) -> tuple[list[Tensor], list[dict]]:
    """(images, targets) as two lists: the images of a detector differ in size."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def sampling(dataset: FolderDataset, split: str, batch_size: int, order: torch.Generator) -> dict[str, Any]:
    """DataLoader arguments: train is shuffled; val and test are in order, those of classifiers in larger batches.

    Of a detector, no batch of val and test mixes image sizes.

    The last train batch is dropped if it is smaller (a batch of one sample fails in BatchNorm), unless it is the only
    one.
    """
    if split == "train":
        sampler = ShuffledKeys(len(dataset), order)
        return {"sampler": sampler, "batch_size": batch_size, "drop_last": len(dataset) >= batch_size}
    if isinstance(dataset, ClassificationFolder):
        return {"sampler": SequentialSampler(dataset), "batch_size": 2 * batch_size}
    sizes = image_sizes(dataset)
    if len(set(sizes)) > 1:
        return {"batch_sampler": SameSizeBatches(sizes, batch_size)}
    return {"sampler": SequentialSampler(dataset), "batch_size": batch_size}


def worker_options(dataset: FolderDataset, num_workers: int) -> dict[str, Any]:
    """DataLoader arguments for loader processes, which are never forked from this one: it may hold CUDA and threads."""
    if num_workers == 0:
        return {"num_workers": 0}
    try:
        content = pickle.dumps(dataset)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        log.warning("%s: loads in the main process, as its transforms cannot be pickled: %s", dataset.task, error)
        return {"num_workers": 0}
    if b"__main__" in content and not hasattr(sys.modules["__main__"], "__file__"):
        log.warning("%s: loads in the main process, as its transforms are defined in a notebook", dataset.task)
        return {"num_workers": 0}
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return {"num_workers": num_workers, "persistent_workers": True, "multiprocessing_context": "spawn"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.transforms.v2"])  # imported once: it takes seconds
    return {"num_workers": num_workers, "persistent_workers": True, "multiprocessing_context": context}


def with_half_batches(loader: DataLoader) -> DataLoader | None:
    """A new loader with half the batch size; None if a batch is a single image already."""
    size = batch_size_of(loader)
    return restarted(loader, batch_size=size // 2) if size > 1 else None
