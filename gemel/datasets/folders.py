"""Datasets as folders, and the samples of one split.

<name>_CL/{train,val[,test]}/<class>/*.jpg; how the files of a detection dataset lie, dataset_layouts finds out.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from gemel.datasets.cache import SampleCache
from gemel.datasets.layouts import open_layout
from gemel.datasets.records import Layout, Objects, Source, Split, image_files, visible
from gemel.workload import CLASSIFICATION, Task

NO_LABEL = -1
PER_BOX = ("labels", "area", "iscrowd")  # entries of a target with one value per box


def find_dataset(task: Task, roots: Sequence[Path]) -> Path | None:
    """The task's dataset folder in the first root that has it."""
    return next((root / task.dataset for root in map(Path, roots) if (root / task.dataset).is_dir()), None)


def open_split(
    task: Task, folder: Path, split: str, plain: bool = False, layout: Layout | None = None
) -> "FolderDataset":
    """The dataset of one split of the folder, with the task's train transform for "train", else its val transform.

    plain: with the val transform in any case. layout: of a detection dataset, where it was recognised before. Crowds
    are left out of "train", as torchvision's references do (coco_utils.py), and marked by "iscrowd" in the others.
    Raises ValueError if what `dataset_checks` refuses is wrong with the folder.
    """
    transform = task.train_transform if split == "train" and not plain else task.val_transform
    if task.kind == CLASSIFICATION:
        return ClassificationFolder(task.name, classification_samples(task, folder, split), transform)
    layout = layout or open_layout(task, folder)
    found = layout.splits.get(split, Split)()
    if faults := [*layout.faults, *found.faults]:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{task.name}: dataset: {faults[0]}{more}")
    if split == "train" and not task.labels:
        return UnlabelledDetectionFolder(task.name, found.samples, transform, int(task.background_class))
    crowds = None if not layout.crowds else "dropped" if split == "train" else "marked"
    return DetectionFolder(task.name, found.samples, transform, int(task.background_class), crowds)


def dataset_class_names(task: Task, folder: Path, layout: Layout | None = None) -> tuple[str, ...]:
    """The names of the classes by class id, without the background; () where the dataset has none."""
    if task.kind == CLASSIFICATION:
        return tuple(class_names(folder, labelled_split(task)))
    return (layout or open_layout(task, folder)).class_names


def labelled_split(task: Task) -> str:
    """The split whose class folders name the classes."""
    return "train" if task.labels else "val"


def class_names(folder: Path, split: str = "train") -> list[str]:
    """The classes of a dataset in the order of the labels: the class folders of one split, for every split."""
    return [path.name for path in visible(folder / split) if path.is_dir()]


def classification_samples(task: Task, folder: Path, split: str) -> list[tuple[Path, int]]:
    """(image, label) of one split; images without labels lie in train or any folder below it, and are labelled -1."""
    if split == "train" and not task.labels:
        below = [path for path in sorted((folder / split).rglob("*")) if path.is_dir()]
        return [(path, NO_LABEL) for place in [folder / split, *below] for path in image_files(place)]
    return labelled_images(folder / split, class_names(folder, labelled_split(task)))


def labelled_images(split: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """(image, label) of one split; a class that the split lacks shifts no label."""
    return [(path, label) for label, name in enumerate(names) for path in image_files(split / name)]


def load_image(path: Path) -> Image.Image:
    """RGB, 8 bits a channel, turned the way its EXIF orientation says: boxes are usually drawn on that view."""
    with Image.open(path) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return (_eight_bits(image) if image.mode.startswith("I") else image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled down; Pillow's own conversion would cut it off at 255, which leaves a white picture."""
    values = np.asarray(image).astype(np.float32) / 257  # 65535 becomes 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


# ---- samples ----------------------------------------------------------------------------------------------


class SampleError(RuntimeError):
    """A sample cannot be read; the message names task and file."""


class FolderDataset(Dataset):
    """Samples of one split, by index or by (index, seed).

    What a transform draws depends on the seed (without one: on the index), never on the global generators or on the
    worker process that happens to load the sample. So a sample without a seed is always the same, and stays in memory
    if there is a `cache`. Any failure is a SampleError.
    """

    def __init__(self, task: str, samples: list[tuple], transform: Callable):
        self.task, self.samples, self.transform = task, samples, transform
        self.cache: SampleCache | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list) -> list[tuple]:
        """The samples of one batch; those with seeds share one seeding, since the loader asks for them together."""
        if not isinstance(keys[0], tuple):
            return [self._fixed_sample(index) for index in keys]
        with _own_draws(keys[0][1]):
            return [self._sample(index) for index, _ in keys]

    def _fixed_sample(self, index: int) -> tuple:
        if self.cache is not None and (known := self.cache.get(index)) is not None:
            return known
        with _own_draws(index):
            sample = self._sample(index)
        if self.cache is not None:
            self.cache.put(index, sample)
        return sample

    def _sample(self, index: int) -> tuple:
        try:
            return self.read(index)
        except Exception as error:  # a broken image or a user's transform may raise anything
            path = self.samples[index][0]
            raise SampleError(f"{self.task}: {path}: {type(error).__name__}: {error}") from error

    def has_labels(self, index: int) -> bool:
        """Whether a sample says anything about accuracy; an image without objects says it only beside others."""
        return True


class ClassificationFolder(FolderDataset):
    """(float tensor [C, H, W], label); samples: (image, label)."""

    def read(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return plain_image(self.transform(load_image(path))), label


class DetectionFolder(FolderDataset):
    """(float tensor [C, H, W], target); samples: (image, source of its objects); label = class id + first_label.

    crowds: "dropped", "marked" by the target's "iscrowd", or None if the format has none.
    """

    def __init__(
        self, task: str, samples: list[tuple], transform: Callable, first_label: int, crowds: str | None = None
    ):
        super().__init__(task, samples, transform)
        self.first_label, self.crowds = first_label, crowds

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        path, source = self.samples[index]
        image, objects = load_image(path), objects_of(source)
        if wrong := wrong_size(image, objects):
            raise ValueError(f"got {wrong}, as {source.file} states")
        result = self.transform(image, self._target(index, objects, image.width, image.height))
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise TypeError(f"the transform returned {describe(result)} instead of (image, target)")
        return plain_image(result[0]), without_empty_boxes(checked_target(result[1]))

    def has_labels(self, index: int) -> bool:
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
    """As DetectionFolder; whatever annotations there are, the targets have no objects."""

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = load_image(self.samples[index][0])
        result = self.transform(image, self._target(index, Objects(), image.width, image.height))
        return plain_image(result[0]), checked_target(result[1])


def objects_of(source: Source) -> Objects:
    """The objects of one image. Raises ValueError with what is wrong first, if anything is."""
    objects = source.read()
    if objects.faults:
        raise ValueError(str(objects.faults[0]))
    return objects


def wrong_size(image: Image.Image, objects: Objects) -> str | None:
    """The size of an image, if its annotation states another, so that its boxes would lie elsewhere."""
    if objects.size in (None, image.size):
        return None
    return f"{image.width} x {image.height} pixels instead of {objects.size[0]} x {objects.size[1]}"


def plain_image(image: object) -> Tensor:
    """A transform's image without its tv_tensor type. Raises TypeError unless it is a float tensor [C, H, W]."""
    if not torch.is_tensor(image) or image.ndim != 3 or not image.is_floating_point():
        raise TypeError(f"the transform returned {describe(image)} as image instead of a float tensor [C, H, W]")
    return image.as_subclass(Tensor)


def checked_target(target: object) -> dict[str, Any]:
    """A transform's target. Raises TypeError unless it has boxes [N, 4] in XYXY and int64 labels [N]."""
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
    """The target without boxes of no width or height (a crop leaves them), which torchvision refuses in training."""
    boxes = target["boxes"].as_subclass(Tensor)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if keep.all():
        return target
    per_box = {key: target[key][keep] for key in PER_BOX if key in target}
    return {**target, **per_box, "boxes": tv_tensors.wrap(boxes[keep], like=target["boxes"])}


def describe(value: object) -> str:
    """A value in a few words, for messages."""
    if torch.is_tensor(value):
        return f"a {value.dtype} tensor {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(repr, value)) or 'no keys'}"
    return f"an object of type {type(value).__name__}"


@contextlib.contextmanager
def _own_draws(seed: int) -> Iterator[None]:
    """Seeds what transforms draw from (torch on the CPU, random, numpy) and restores it.

    Not environment.seeded: that also keeps the CUDA generators, which would start CUDA in every worker process.
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
