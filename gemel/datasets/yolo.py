"""Annotation files with a line `class x_center y_center width height` per object, in shares of the image.

The layout of the README: {train,val[,test]}/{images,annotations}, paired by file stem.
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
    image_files,
    read_text,
    settle,
    visible,
)

NAME = "train/{images,annotations}"
CLASSES_FILE = "classes.txt"  # labelling tools put the names of the classes beside the annotations
OUTSIDE_TOLERANCE = (1e-3, 1e-3)  # shares of the image by which rounding may push a box over its edge
MAX_CLASS_ID = 1 << 31
FIVE_NUMBERS = "5 numbers: class x_center y_center width height"
INSIDE = "boxes inside the image, in shares of its width and height"


@dataclass(frozen=True)
class TextFile:
    """The objects of one image in a text file; no file, or an empty one, has none.

    num_classes: as the dataset states it, if it does. polygons: a line may also be `class x y x y x y ...`, the outline
    of an object; the box around it is taken.
    """

    file: Path | None
    num_classes: int | None = None
    polygons: bool = False

    def content(self) -> bytes:
        return self.file.read_bytes() if self.file else b"None\n"

    def read(self) -> Objects:
        objects = Objects()
        if self.file is None:
            return objects
        text, objects.repairs, objects.faults = read_text(self.file)
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                self._add(objects, f"line {number}", line)
        return objects

    def _add(self, objects: Objects, place: str, line: str) -> None:
        values, allowed = _numbers(line, self.polygons)
        if values is None:
            objects.faults.append(Fault(self.file, place, repr(line.strip()[:80]), allowed))
            return
        fault = self._class_fault(values[0])
        if fault is not None:
            objects.faults.append(Fault(self.file, place, f"class id {line.split()[0][:20]}", fault))
        box = _outline_box(values[1:]) if len(values) > 5 else values[1:]
        x, y, width, height = box
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        inside = settle(corners, OUTSIDE_TOLERANCE, objects.repairs)
        empty = width < MIN_SIDE or height < MIN_SIDE
        if empty or inside is None:
            got = f"the box {' '.join(f'{value:g}' for value in box)}"
            objects.faults.append(Fault(self.file, place, got, AREA if empty else INSIDE))
        elif fault is None:
            objects.boxes.append(Box(place, int(values[0]), inside))

    def _class_fault(self, value: float) -> str | None:
        if not 0 <= value < MAX_CLASS_ID or not value.is_integer():
            return "class ids that are whole numbers from 0"
        if self.num_classes is not None and value >= self.num_classes:
            return f"class ids 0 to {self.num_classes - 1}, the classes of the dataset"
        return None


def _numbers(line: str, polygons: bool) -> tuple[list[float] | None, str]:
    """The numbers of a line, or None and what is allowed."""
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
    left, right, top, bottom = min(points[::2]), max(points[::2]), min(points[1::2]), max(points[1::2])
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


# ---- the layout of the README -----------------------------------------------------------------------------


def evidence(folder: Path) -> str | None:
    """What shows that a folder has this layout; None if nothing does."""
    return "train/annotations" if (folder / "train" / "annotations").is_dir() else None


def open_layout(folder: Path) -> Layout:
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
    """The annotation files that lie directly in the folder."""
    return [path for path in visible(folder) if path.suffix.lower() == ".txt" and not path.is_dir()]


def stem_faults(images: Sequence[Path]) -> list[Fault]:
    """Images of one folder that would share an annotation file."""
    by_stem = defaultdict(list)
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
    """Annotation files of one folder that belong to none of the images."""
    stems = {path.stem for path in images}
    return [
        Fault(path, "", f"no image {path.stem}.*", "annotation files named after an image")
        for path in files
        if path.stem not in stems and path.name != CLASSES_FILE
    ]
