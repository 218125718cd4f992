"""Datasets as folders: what lies where, annotation files, and the samples of one split.

<name>_CL/{train,val[,test]}/<class>/*.jpg and <name>_OD/{train,val[,test]}/{images,annotations}; images and annotations
are paired by stem.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from workload import CLASSIFICATION, Task

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def find_dataset(task: Task, roots: Sequence[Path]) -> Path | None:
    """The task's dataset folder in the first root that has it."""
    return next((root / task.dataset for root in map(Path, roots) if (root / task.dataset).is_dir()), None)


def open_split(task: Task, folder: Path, split: str, plain: bool = False) -> "FolderDataset":
    """The dataset of one split of the folder, with the task's train transform for "train", else its val transform.

    plain: with the val transform in any case.
    """
    transform = task.train_transform if split == "train" and not plain else task.val_transform
    if task.kind == CLASSIFICATION:
        return ClassificationFolder(task.name, labelled_images(folder / split, class_names(folder)), transform)
    return DetectionFolder(task.name, paired_files(folder / split), transform, int(task.background_class))


def visible(folder: Path) -> list[Path]:
    """What the folder holds, sorted by name, without hidden entries; [] if there is no such folder."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def image_files(folder: Path) -> list[Path]:
    """The images that lie directly in the folder."""
    return [path for path in visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()]


def class_names(folder: Path) -> list[str]:
    """The classes of a dataset in the order of the labels: the class folders of train, for every split."""
    return [path.name for path in visible(folder / "train") if path.is_dir()]


def labelled_images(split: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """(image, label) of one split; a class that the split lacks shifts no label."""
    return [(path, label) for label, name in enumerate(names) for path in image_files(split / name)]


def paired_files(split: Path) -> list[tuple[Path, Path | None]]:
    """(image, its annotation file or None) of one split, paired by stem."""
    annotations = {path.stem: path for path in annotation_files(split)}
    return [(image, annotations.get(image.stem)) for image in image_files(split / "images")]


def annotation_files(split: Path) -> list[Path]:
    """The annotation files of one split."""
    return [path for path in visible(split / "annotations") if path.suffix.lower() == ".txt" and not path.is_dir()]


class AnnotatedBox(NamedTuple):
    """One line of an annotation file; the box is (x centre, y centre, width, height) in shares of the image."""

    line: int
    class_id: int
    box: tuple[float, float, float, float]


class BadLine(NamedTuple):
    """A line of an annotation file that does not parse."""

    line: int
    got: str
    allowed: str


def read_annotation(path: Path | None) -> tuple[list[AnnotatedBox], list[BadLine]]:
    """The boxes of one annotation file, and its lines that are none; no file, or an empty one, has no boxes."""
    boxes, bad = [], []
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path else ""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            parsed = _parse_line(number, line)
            (boxes if isinstance(parsed, AnnotatedBox) else bad).append(parsed)
    return boxes, bad


def _parse_line(number: int, line: str) -> AnnotatedBox | BadLine:
    words, got = line.split(), repr(line.strip()[:80])
    if len(words) != 5:
        return BadLine(number, got, "5 numbers: class x_center y_center width height")
    try:
        values = [float(word) for word in words]
    except ValueError:
        return BadLine(number, got, "5 numbers: class x_center y_center width height")
    if not all(map(math.isfinite, values)):
        return BadLine(number, got, "finite numbers")
    if values[0] < 0 or not values[0].is_integer():
        return BadLine(number, f"class id {words[0]}", "class ids that are whole numbers from 0")
    return AnnotatedBox(number, int(values[0]), tuple(values[1:]))


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
    worker process that happens to load the sample. Any failure is a SampleError.
    """

    def __init__(self, task: str, samples: list[tuple], transform: Callable):
        self.task, self.samples, self.transform = task, samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list) -> list[tuple]:
        """The samples of one batch: the loader asks for them together, so they share one seeding."""
        keys = [key if isinstance(key, tuple) else (key, key) for key in keys]
        with _own_draws(keys[0][1]):
            return [self._sample(index) for index, _ in keys]

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
    """(float tensor [C, H, W], target); samples: (image, annotation file or None); label = class id + first_label."""

    def __init__(self, task: str, samples: list[tuple], transform: Callable, first_label: int):
        super().__init__(task, samples, transform)
        self.first_label = first_label

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        path, annotation = self.samples[index]
        image = load_image(path)
        result = self.transform(image, self._target(index, annotation, image.width, image.height))
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise TypeError(f"the transform returned {describe(result)} instead of (image, target)")
        return plain_image(result[0]), without_empty_boxes(checked_target(result[1]))

    def has_labels(self, index: int) -> bool:
        return bool(read_annotation(self.samples[index][1])[0])

    def _target(self, index: int, annotation: Path | None, width: int, height: int) -> dict[str, Any]:
        rows, bad = read_annotation(annotation)
        if bad:
            raise ValueError(f"{annotation} line {bad[0].line}: got {bad[0].got}; allowed: {bad[0].allowed}")
        shares = torch.tensor([row.box for row in rows], dtype=torch.float32).reshape(-1, 4)
        centre, size = shares[:, :2], shares[:, 2:]
        corners = torch.cat([centre - size / 2, centre + size / 2], 1).clamp(0, 1)
        pixels = corners * torch.tensor([width, height, width, height])
        return {
            "boxes": tv_tensors.BoundingBoxes(pixels, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([row.class_id + self.first_label for row in rows], dtype=torch.int64),
            "image_id": index,
        }


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
    return target


def without_empty_boxes(target: dict[str, Any]) -> dict[str, Any]:
    """The target without boxes of no width or height (a crop leaves them), which torchvision refuses in training."""
    boxes = target["boxes"].as_subclass(Tensor)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if keep.all():
        return target
    per_box = {key: target[key][keep] for key in ("labels", "area", "iscrowd") if key in target}
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
