"""The project's own layout: {train,val[,test]}/{images,annotations}, one text file per image, paired by file stem.

A text file has a line `class x_center y_center width height` per object, relative to the image's size, as YOLO has it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gemel.datasets.records import (
    AREA,
    MIN_SIDE,
    Box,
    Fault,
    Layout,
    Objects,
    Source,
    Split,
    clip_box,
    image_files,
    read_text,
    visible,
)

NAME = "train/{images,annotations}"
CLASSES_FILE = "classes.txt"  # labelling tools write the class names beside the annotations
OUTSIDE_TOLERANCE = (1e-3, 1e-3)  # x, y: a box that exceeds the image by less is clipped
MAX_CLASS_ID = 1 << 31
FIVE_NUMBERS = "5 numbers: class x_center y_center width height"
INSIDE = "boxes inside the image, relative to its width and height"


@dataclass(frozen=True)
class TextFile:
    """The objects of one image in a text file; without a file, or in an empty file, there are none.

    num_classes: if the dataset states it. polygons: whether a line may also be an outline `class x y x y x y ...`,
    which becomes the box around it.
    """

    file: Path | None
    num_classes: int | None = None
    polygons: bool = False

    def content(self) -> bytes:
        """The bytes of the file, for a fingerprint."""
        return self.file.read_bytes() if self.file else b"None\n"

    def read(self) -> Objects:
        """The objects of the file, with the faults of its lines."""
        objects = Objects()
        if self.file is None:
            return objects
        text, objects.repairs, objects.faults = read_text(self.file)
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                self._add(objects, self.file, f"line {number}", line)
        return objects

    def _add(self, objects: Objects, file: Path, place: str, line: str) -> None:
        """Adds the object of one line, or what is wrong with the line."""
        values, allowed = _numbers(line, self.polygons)
        if values is None:
            objects.faults.append(Fault(file, place, repr(line.strip()[:80]), allowed))
            return
        fault = self._class_fault(values[0])
        if fault is not None:
            objects.faults.append(Fault(file, place, f"class id {line.split()[0][:20]}", fault))
        box = _outline_box(values[1:]) if len(values) > 5 else values[1:]
        x, y, width, height = box
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        inside = clip_box(corners, OUTSIDE_TOLERANCE, objects.repairs)
        empty = width < MIN_SIDE or height < MIN_SIDE
        if empty or inside is None:
            got = f"the box {' '.join(f'{value:g}' for value in box)}"
            objects.faults.append(Fault(file, place, got, AREA if empty else INSIDE))
        elif fault is None:
            objects.boxes.append(Box(place, int(values[0]), inside))

    def _class_fault(self, value: float) -> str | None:
        """Which class ids are allowed, if this is not one of them."""
        if not 0 <= value < MAX_CLASS_ID or not value.is_integer():
            return "class ids that are whole numbers from 0"
        if self.num_classes is not None and value >= self.num_classes:
            return f"class ids 0 to {self.num_classes - 1}, the classes of the dataset"
        return None


def _numbers(line: str, polygons: bool) -> tuple[list[float] | None, str]:
    """(numbers of a line, or None if they are wrong; what is allowed)."""
    words = line.split()
    is_outline = polygons and len(words) >= 7 and len(words) % 2 == 1
    allowed = FIVE_NUMBERS + (", or a class and the x y of 3 or more points" if polygons else "")
    if (len(words) != 5 and not is_outline) or not line.isascii() or "_" in line:  # float() would take 1_0
        return None, allowed
    try:
        values = [float(word) for word in words]
    except ValueError:
        return None, allowed
    return (values, allowed) if all(map(math.isfinite, values)) else (None, "finite numbers")


def _outline_box(points: Sequence[float]) -> list[float]:
    """[x_center, y_center, width, height] of the box around points x, y, x, y, ..."""
    left, right, top, bottom = min(points[::2]), max(points[::2]), min(points[1::2]), max(points[1::2])
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


# ---- the layout -------------------------------------------------------------------------------------------


def evidence(folder: Path) -> str | None:
    """The folder by which this layout is recognised; None if it is missing."""
    return "train/annotations" if (folder / "train" / "annotations").is_dir() else None


def open_layout(folder: Path) -> Layout:
    """The layout of the folder; reads no annotation file."""
    splits = ["train", "val", "test"] if (folder / "test").is_dir() else ["train", "val"]
    return Layout(
        NAME,
        {split: partial(_split, folder / split) for split in splits},
        images="{split}/images/*.jpg",
        objects="{split}/annotations/<stem of the image>.txt",
    )


def _split(split: Path) -> Split:
    images, files = image_files(split / "images"), annotation_files(split / "annotations")
    by_stem = {path.stem: path for path in files}
    samples: list[tuple[Path, Source]] = [(image, TextFile(by_stem.get(image.stem))) for image in images]
    return Split(samples, [*stem_faults(images), *orphan_faults(files, images)], Counter())


def annotation_files(folder: Path) -> list[Path]:
    """The annotation files directly in the folder."""
    return [path for path in visible(folder) if path.suffix.lower() == ".txt" and not path.is_dir()]


def stem_faults(images: Sequence[Path]) -> list[Fault]:
    """A fault for each stem that several images of one folder have: they would share an annotation file."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in images:
        by_stem[path.stem].append(path)
    return [
        Fault(
            paths[0], "", f"the same stem as {', '.join(path.name for path in paths[1:])}", "one image for every stem"
        )
        for paths in by_stem.values()
        if len(paths) > 1
    ]


def orphan_faults(files: Sequence[Path], images: Sequence[Path]) -> list[Fault]:
    """A fault for each annotation file of one folder without an image."""
    stems = {path.stem for path in images}
    return [
        Fault(path, "", f"no image {path.stem}.*", "annotation files named after an image")
        for path in files
        if path.stem not in stems and path.name != CLASSES_FILE
    ]
