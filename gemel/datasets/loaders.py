"""The loaders of one task, and what is drawn from them: order by seed, restarts, images without labels."""

import logging
import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler, Subset

from gemel.datasets.folders import ClassificationFolder, FolderDataset
from gemel.environment.seeds import derive_seed, generator

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


def screening_subset(val: DataLoader, num_images: int) -> DataLoader:
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


def sampling(dataset: FolderDataset, split: str, batch_size: int, order: torch.Generator) -> dict[str, Any]:
    """DataLoader arguments: train is shuffled; val and test are in order, in larger batches as no gradients are kept.

    A trailing train batch of one sample would break BatchNorm, so it is dropped, unless it is all there is.
    """
    if split == "train":
        sampler = ShuffledKeys(len(dataset), order)
        return {"sampler": sampler, "batch_size": batch_size, "drop_last": len(dataset) >= batch_size}
    larger = 2 if isinstance(dataset, ClassificationFolder) else 1
    return {"sampler": SequentialSampler(dataset), "batch_size": larger * batch_size}


def worker_options(dataset: FolderDataset, num_workers: int) -> dict[str, Any]:
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


def smaller(loader: DataLoader) -> DataLoader | None:
    """The loader with half its batch size; None if a batch is a single image already."""
    return restarted(loader, batch_size=loader.batch_size // 2) if loader.batch_size > 1 else None
