"""Dataset folders and the samples of one split, as torch Datasets.

Classification: <name>_CL/{train,val[,test]}/<class>/*.jpg. Detection: <name>_OD, in one of the layouts of layouts.py.
"""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from gemel.datasets.cache import SampleCache, bytes_of
from gemel.datasets.class_folders import class_names, read_split
from gemel.datasets.layouts import open_layout
from gemel.datasets.records import Layout, Objects, Source, Split
from gemel.datasets.transform_parts import Decoded, TransformParts, apply, decoded, describe, parts_of
from gemel.workload import CLASSIFICATION, Task

PER_BOX = ("labels", "area", "iscrowd")  # keys of a target with one value per box


def find_dataset(task: Task, roots: Sequence[Path]) -> Path | None:
    """The task's dataset folder in the first root that has it; None if no root has it."""
    return next((root / task.dataset for root in map(Path, roots) if (root / task.dataset).is_dir()), None)


def find_datasets(tasks: Mapping[str, Task], roots: Sequence[Path]) -> dict[str, Path]:
    """The dataset folder of every task. Raises ValueError for a task that has none."""
    found = {name: find_dataset(task, roots) for name, task in tasks.items()}
    if missing := [name for name, folder in found.items() if folder is None]:
        raise ValueError(f"{', '.join(missing)}: dataset: found in none of {', '.join(map(str, roots))}")
    return {name: folder for name, folder in found.items() if folder is not None}


def open_split(
    task: Task, folder: Path, split: str, plain: bool = False, layout: Layout | None = None
) -> "FolderDataset":
    """The samples of one split, with the task's train transform for "train" and its val transform otherwise.

    plain: with the val transform for "train" too. layout: of a detection dataset, if it is known already. Crowds are
    left out of "train", as in torchvision's references (coco_utils.py), and marked by "iscrowd" in val and test.
    Raises ValueError if the folder or the split has a fault.
    """
    transform = task.train_transform if split == "train" and not plain else task.val_transform
    if task.kind == CLASSIFICATION:
        return ClassificationFolder(task, read_split(task, folder, split).samples, transform)
    layout = layout or open_layout(task, folder)
    found = layout.splits.get(split, Split)()
    if faults := [*layout.faults, *found.faults]:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{task.name}: dataset: {faults[0]}{more}")
    if split == "train" and not task.labels:
        return UnlabelledDetectionFolder(task, found.samples, transform)
    crowds = None if not layout.crowds else "dropped" if split == "train" else "marked"
    return DetectionFolder(task, found.samples, transform, crowds)


def dataset_class_names(task: Task, folder: Path, layout: Layout | None = None) -> tuple[str, ...]:
    """The class names by class id, without the background; () if the dataset has no names."""
    if task.kind == CLASSIFICATION:
        return tuple(class_names(task, folder))
    return (layout or open_layout(task, folder)).class_names


def load_image(path: Path, turned: bool = True) -> Image.Image:
    """The image as 8-bit RGB; turned: as its EXIF orientation says, as boxes are usually drawn on the turned image.

    Of a file with several images or pages, the first.
    """
    with Image.open(path) as image:
        image.load()
        if turned:
            ImageOps.exif_transpose(image, in_place=True)
        return (_eight_bits(image) if image.mode.startswith("I") else image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow's own conversion clips at 255, which gives a white image."""
    values = np.asarray(image).astype(np.float32) / 257  # 65535 becomes 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


# ---- samples ----------------------------------------------------------------------------------------------


class SampleError(RuntimeError):
    """A sample cannot be read; the message names task and file."""


class FolderDataset(Dataset):
    """Samples of one split, by index or by (index, seed).

    The random numbers of a transform depend on the seed (on the index if there is no seed), not on the global
    generators or the loader process. So a sample without a seed is always the same. If there is a `cache`, decoded
    images are kept in it, or whole samples where the transform is not known. Subclasses define `load` and `checked`.
    Raises SampleError on any failure.
    """

    has_targets = False  # whether the transform is given (image, target)

    def __init__(self, task: Task, samples: list[tuple], transform: Callable) -> None:
        self.task, self.samples, self.transform = task.name, samples, transform
        self.turned, self.first_label = task.reading.exif_orientation, int(task.background_class)
        self.cache: SampleCache | None = None
        self.parts = parts_of(transform, self.has_targets)

    @property
    def moves_boxes(self) -> bool:
        """Whether the transform is given boxes that must stay with their objects."""
        return False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list) -> list[tuple]:
        """The samples of one batch; keys with seeds use the first seed for the whole batch."""
        batch = self.parts.batch
        if isinstance(keys[0], tuple):
            indices, seed = [index for index, _ in keys], keys[0][1]
            if batch is not None:
                return self._batch(indices, seed)
            with transform_seed(seed):
                return [self._sample(index) for index in indices]
        if batch is None:
            return [self._fixed_sample(index) for index in keys]
        parts = [[index] for index in keys] if batch.is_random else [keys]
        return [sample for part in parts for sample in self._batch(part, part[0])]

    def image_by_image(self) -> "FolderDataset":
        """The same samples without a cache, with the transform called on each image as it is."""
        other = copy.copy(self)
        other.cache, other.parts = None, TransformParts((), (self.transform,), None)
        return other

    def load(self, index: int) -> tuple[Image.Image, Any]:
        """The decoded image, and what the annotations say of it."""
        raise NotImplementedError

    def checked(self, image: Any, target: Any) -> tuple:
        """The sample of what the transform returned. Raises TypeError if that is something else."""
        raise NotImplementedError

    def has_labels(self, index: int) -> bool:
        """Whether accuracy is defined on this sample alone: for a detector, whether the image has objects."""
        return True

    # ---- a transform that works on batches -------------------------------------------------------------------

    def _batch(self, indices: list[int], seed: int) -> list[tuple]:
        assert self.parts.batch is not None
        images = [self._decoded(index) for index in indices]
        targets = [image.own_target() for image in images]
        try:
            changed = self.parts.batch([image.pixels for image in images], targets if self.has_targets else None, seed)
            return [self.checked(image, target) for image, target in zip(changed, targets, strict=True)]
        except Exception as error:  # such as a crop that cannot be resized
            raise self._error(indices[0], error) from error

    def _decoded(self, index: int) -> Decoded:
        """The image after the transform's first steps."""
        if self.cache is not None and (known := self.cache.get(index)) is not None:
            return known
        try:
            found = decoded(*self._after_first_steps(index))
        except Exception as error:  # a broken image may raise anything
            raise self._error(index, error) from error
        if self.cache is not None:
            self.cache.put(index, found, bytes_of([found.pixels, found.target]))
        return found

    def _after_first_steps(self, index: int) -> tuple[Any, Any]:
        image, target = self.load(index)
        if self.has_targets:
            return apply(self.parts.first, image, target)
        return apply(self.parts.first, image), target

    # ---- a transform that is called image by image -----------------------------------------------------------

    def _fixed_sample(self, index: int) -> tuple:
        """A sample that is the same each time."""
        cache = self.cache if self.cache is not None and self.cache.whole else None
        if cache is not None and (known := cache.get(index)) is not None:
            return copy.deepcopy(known)
        with transform_seed(index):
            sample = self._sample(index)
        if cache is not None:
            cache.put(index, copy.deepcopy(sample), bytes_of(sample))
        return sample

    def _sample(self, index: int) -> tuple:
        try:
            if self.cache is None or self.cache.whole or (self.cache.is_full and self.cache.get(index) is None):
                image, target = self._after_first_steps(index)
            else:
                known = self._decoded(index)
                image, target = known.image(), known.own_target()
            if not self.has_targets:
                return self.checked(apply(self.parts.rest, image), target)
            result = apply(self.parts.rest, image, target)
            if not isinstance(result, (tuple, list)) or len(result) != 2:
                raise TypeError(f"the transform returned {describe(result)} instead of (image, target)")
            return self.checked(*result)
        except SampleError:
            raise
        except Exception as error:  # a broken image or a user's transform may raise anything
            raise self._error(index, error) from error

    def _error(self, index: int, error: Exception) -> SampleError:
        return SampleError(f"{self.task}: {self.samples[index][0]}: {type(error).__name__}: {error}")


class ClassificationFolder(FolderDataset):
    """Yields (float tensor [C, H, W], label); samples: (image file, label)."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return load_image(path, self.turned), label

    def checked(self, image: Any, target: Any) -> tuple[Tensor, int]:
        return plain_image(image), target


class DetectionFolder(FolderDataset):
    """Yields (float tensor [C, H, W], target); samples: (image file, source); label = class id + first_label.

    crowds: "dropped", "marked" by the target's "iscrowd", or None if the format has no crowds.
    """

    has_targets = True

    def __init__(self, task: Task, samples: list[tuple], transform: Callable, crowds: str | None = None) -> None:
        super().__init__(task, samples, transform)
        self.crowds = crowds

    @property
    def moves_boxes(self) -> bool:
        return True

    def load(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        path, source = self.samples[index]
        image, objects = load_image(path, self.turned), objects_of(source)
        if wrong := wrong_size(image, objects):
            raise ValueError(f"got {wrong}, as {source.file} states")
        return image, self._target(index, objects, image.width, image.height)

    def checked(self, image: Any, target: Any) -> tuple[Tensor, dict[str, Any]]:
        return plain_image(image), without_empty_boxes(checked_target(target))

    def has_labels(self, index: int) -> bool:
        """Whether the image has objects that count."""
        return any(not box.crowd for box in objects_of(self.samples[index][1]).boxes)

    def _target(self, index: int, objects: Objects, width: int, height: int) -> dict[str, Any]:
        boxes = [box for box in objects.boxes if not (self.crowds == "dropped" and box.crowd)]
        shares = torch.tensor([box.corners for box in boxes], dtype=torch.float64).reshape(-1, 4)
        pixels = (shares * torch.tensor([width, height, width, height])).float()
        target = {
            "boxes": tv_tensors.BoundingBoxes(pixels, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([box.class_id + self.first_label for box in boxes], dtype=torch.int64),
            "image_id": index,
        }
        if self.crowds == "marked":
            target["iscrowd"] = torch.tensor([box.crowd for box in boxes], dtype=torch.int64)
        return target


class UnlabelledDetectionFolder(DetectionFolder):
    """A DetectionFolder whose targets have no objects, whether there are annotations or not."""

    @property
    def moves_boxes(self) -> bool:
        return False

    def load(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        image = load_image(self.samples[index][0], self.turned)
        return image, self._target(index, Objects(), image.width, image.height)

    def checked(self, image: Any, target: Any) -> tuple[Tensor, dict[str, Any]]:
        return plain_image(image), checked_target(target)


def objects_of(source: Source) -> Objects:
    """The objects of one image. Raises ValueError with the first fault, if there is one."""
    objects = source.read()
    if objects.faults:
        raise ValueError(str(objects.faults[0]))
    return objects


def wrong_size(image: Image.Image, objects: Objects) -> str | None:
    """A message if the annotation states another size than the image has; None if the sizes agree."""
    if objects.size in (None, image.size):
        return None
    return f"{image.width} x {image.height} pixels instead of {objects.size[0]} x {objects.size[1]}"


def plain_image(image: object) -> Tensor:
    """The image of a transform as a plain Tensor. Raises TypeError unless it is a float tensor [C, H, W]."""
    if not torch.is_tensor(image) or image.ndim != 3 or not image.is_floating_point():
        raise TypeError(f"the transform returned {describe(image)} as image instead of a float tensor [C, H, W]")
    return image.as_subclass(Tensor)


def checked_target(target: object) -> dict[str, Any]:
    """The target of a transform. Raises TypeError unless it has boxes [N, 4] in XYXY and int64 labels [N]."""
    allowed = 'instead of {"boxes": XYXY [N, 4], "labels": int64 [N], ...}'
    if not isinstance(target, dict) or not all(torch.is_tensor(target.get(key)) for key in ("boxes", "labels")):
        raise TypeError(f"the transform returned {describe(target)} as target {allowed}")
    boxes, labels = target["boxes"], target["labels"]
    layout = getattr(boxes, "format", tv_tensors.BoundingBoxFormat.XYXY)
    fits = boxes.ndim == 2 and boxes.shape[1] == 4 and labels.shape == boxes.shape[:1] and labels.dtype == torch.int64
    if not fits or layout != tv_tensors.BoundingBoxFormat.XYXY:
        got = f"boxes {list(boxes.shape)} in {layout.value} with {labels.dtype} labels {list(labels.shape)}"
        raise TypeError(f"the transform returned {got} {allowed}")
    for key in PER_BOX[1:]:
        if key in target and len(target[key]) != len(boxes):
            raise TypeError(f"the transform returned {len(target[key])} values of {key} for {len(boxes)} boxes")
    return target


def without_empty_boxes(target: dict[str, Any]) -> dict[str, Any]:
    """The target without boxes of width or height 0, which a crop can leave and torchvision refuses in training."""
    boxes = target["boxes"].as_subclass(Tensor)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if keep.all():
        return target
    per_box = {key: target[key][keep] for key in PER_BOX if key in target}
    return {**target, **per_box, "boxes": tv_tensors.wrap(boxes[keep], like=target["boxes"])}


@contextlib.contextmanager
def transform_seed(seed: int) -> Iterator[None]:
    """Seeds the generators that transforms use (torch on the CPU, random, numpy) and restores them.

    Unlike gemel.environment.seeds.seeded it leaves the CUDA generators alone, which would start CUDA in every process.
    """
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
