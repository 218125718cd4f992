"""The project's own layout: {train,val[,test]}/{images,annotations}, one text file per image, paired by file stem.

A text file has a line `class x_center y_center width height` per object, relative to the image's size, as YOLO has it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gemel.datasets.records import (
    AREA,
    MIN_SIDE,
    NO_FILE,
    NO_IMAGE,
    Box,
    Fault,
    Layout,
    Objects,
    Split,
    clip_box,
    files_below,
    is_image,
    passed_over,
    read_text,
    split_folder,
    visible,
    walk,
    without_copies,
)

NAME = "train/{images,annotations}"
CLASSES_FILE = "classes.txt"  # labelling tools write the class names beside the annotations
OUTSIDE_TOLERANCE = (1e-3, 1e-3)  # x, y: a box that exceeds the image by less is clipped
MAX_CLASS_ID = 1 << 31
OUTLINES = "the outline of an object was replaced by the box around it"
BOX_AND_OUTLINE = "a line with a box and the outline of the same object was read by its box"
ROUNDING = 1e-3  # of a box beside its outline
FIVE_NUMBERS = "5 numbers: class x_center y_center width height"
INSIDE = "boxes inside the image, relative to its width and height"


@dataclass(frozen=True)
class TextFile:
    """The objects of one image in a text file; without a file, or in an empty file, there are none.

    num_classes: if the dataset states it. polygons: whether a line may also be an outline `class x y x y x y ...`,
    which becomes the box around it, or a box and behind it such points of the same object. keypoints: numbers that may
    follow the box in a line, and are not read; where there are any, no line is an outline.
    """

    file: Path | None
    num_classes: int | None = None
    polygons: bool = False
    keypoints: int = 0

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
        return without_copies(objects)

    def _add(self, objects: Objects, file: Path, place: str, line: str) -> None:
        """Adds the object of one line, or what is wrong with the line."""
        values, allowed = _numbers(line, self.polygons, self.keypoints)
        if values is None:
            objects.faults.append(Fault(file, place, repr(line.strip()[:80]), allowed))
            return
        fault = self._class_fault(values[0])
        if fault is not None:
            objects.faults.append(Fault(file, place, f"class id {line.split()[0][:20]}", fault))
        box = values[1:5]
        if len(values) > 5 and not self.keypoints:
            has_box = _is_box_of(box, values[5:])
            objects.repairs[BOX_AND_OUTLINE if has_box else OUTLINES] += 1
            box = box if has_box else _outline_box(values[1:])
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


def _numbers(line: str, polygons: bool, keypoints: int) -> tuple[list[float] | None, str]:
    """(numbers of a line, or None if they are wrong; what is allowed)."""
    words = line.split()
    is_longer = polygons and len(words) >= 7 and len(words) % 2 == 1
    allowed = FIVE_NUMBERS + (", or a class and the x y of 3 or more points" if polygons else "")
    if keypoints:
        is_longer = len(words) == 5 + keypoints
        allowed = f"{FIVE_NUMBERS}, and none or {keypoints} of the keypoints, as kpt_shape says"
    if (len(words) != 5 and not is_longer) or not line.isascii() or "_" in line:  # float() would take 1_0
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


def _is_box_of(box: Sequence[float], points: Sequence[float]) -> bool:
    """Whether x_center, y_center, width, height is a box around these points, and no larger than twice what is needed.

    So an outline of which the first two points happen to be that gets a box that is about right, too.
    """
    if len(points) < 6:
        return False
    x, y, width, height = box
    near_x, near_y, near_width, near_height = _outline_box(points)
    gap_x, gap_y = width / 2 - near_width / 2, height / 2 - near_height / 2
    contains = abs(x - near_x) <= gap_x + ROUNDING and abs(y - near_y) <= gap_y + ROUNDING
    return contains and width * height <= 2 * near_width * near_height


# ---- the layout -------------------------------------------------------------------------------------------


def evidence(folder: Path) -> str | None:
    """The folder by which this layout is recognised; None if it is missing."""
    return "train/annotations" if (split_folder(folder, "train") / "annotations").is_dir() else None


def open_layout(folder: Path) -> Layout:
    """The layout of the folder; reads no annotation file."""
    folders = {split: split_folder(folder, split) for split in ("train", "val", "test")}
    return Layout(
        NAME,
        {split: partial(_split, path) for split, path in folders.items() if split != "test" or path.is_dir()},
        images="{split}/images/*.jpg",
        objects="{split}/annotations/<stem of the image>.txt",
    )


def _split(split: Path) -> Split:
    """Images and annotation files of a split, at any depth, paired by their paths without suffix."""
    images, others = files_below(split / "images")
    files = [path for parent, _ in walk(split / "annotations") for path in annotation_files(parent)]
    image_key, file_key = path_below(split / "images"), path_below(split / "annotations")
    by_key = {file_key(path): path for path in files}
    found = Split(faults=[*stem_faults(images, image_key), *orphan_faults(files, images, file_key, image_key)])
    found.samples = [(image, TextFile(by_key.get(image_key(image)))) for image in images]
    found.repairs[NO_FILE] += sum(image_key(image) not in by_key for image in images)
    found.repairs += passed_over(others, NO_IMAGE)
    return found


def path_below(folder: Path) -> Callable[[Path], str]:
    """A function that gives the path of a file below the folder, without its suffix."""
    return lambda path: path.relative_to(folder).with_suffix("").as_posix()


def _stem(path: Path) -> str:
    return path.stem


def annotation_files(folder: Path) -> list[Path]:
    """The annotation files directly in the folder."""
    return [path for path in visible(folder) if path.suffix.lower() == ".txt" and not path.is_dir()]


def stem_faults(images: Sequence[Path], key: Callable[[Path], str] = _stem) -> list[Fault]:
    """A fault for each key that several images have: they would share an annotation file. key: by default the stem."""
    by_key: dict[str, list[Path]] = defaultdict(list)
    for path in images:
        by_key[key(path)].append(path)
    return [
        Fault(
            paths[0], "", f"the same stem as {', '.join(path.name for path in paths[1:])}", "one image for every stem"
        )
        for paths in by_key.values()
        if len(paths) > 1
    ]


def orphan_faults(
    files: Sequence[Path],
    images: Sequence[Path],
    file_key: Callable[[Path], str] = _stem,
    image_key: Callable[[Path], str] = _stem,
) -> list[Fault]:
    """A fault for each annotation file without an image of the same key; keys: by default the stem."""
    keys = {image_key(path) for path in images}
    orphans = [path for path in files if file_key(path) not in keys and path.name != CLASSES_FILE]
    folders = sorted({image.parent for image in images}) if orphans else []
    beside = {path.stem: path.name for folder in folders for path in visible(folder) if not is_image(path)}
    allowed = "annotation files named after an image"
    faults = []
    for path in orphans:
        near = beside.get(path.stem, path.name)
        unread = f", but {near}, which cannot be read" if near != path.name else ""
        faults.append(Fault(path, "", f"no image {file_key(path)}.*{unread}", allowed))
    return faults
