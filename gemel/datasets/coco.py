"""The COCO layouts: JSON with images, annotations (boxes [x, y, width, height] in pixels) and categories.

COCO's own layout has annotations/instances_<split>*.json and image folders; Roboflow's has a folder per split with
_annotations.coco.json beside the images. Source of the format: cocodataset.org/#format-data.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemel.datasets.numbering import Numbering, category_labels
from gemel.datasets.records import (
    BYTE_ORDER_MARK,
    IMAGE_SUFFIXES,
    MIN_SIDE,
    SPLIT_FOLDERS,
    Box,
    Fault,
    Layout,
    Objects,
    Split,
    clip_box,
    file_exists,
    header_size,
    is_image,
    is_number,
    names_by_id,
    shown,
    visible,
    without_copies,
)

NAME = "COCO JSON"
SPLIT_FILE = re.compile(r"(?:instances_)?(train|val|test)[^.]*\.json", re.IGNORECASE)
SUFFIXES = sorted(IMAGE_SUFFIXES)
IN_SPLIT = "_annotations.coco.json"
PIXELS = 1.0  # a box that exceeds the image by at most this is clipped
BACKSLASHES = "a backslash in the name of an image was read as a slash"
EMPTY_BOX = "a box without width or height was left out"
UNUSED = "an image that the annotation file does not name was left out"
NO_SIZE = "the size of an image was read from the image, as its entry has none"
BOX = "[x, y, width, height] in pixels, inside the image, neither side negative"


def evidence(folder: Path) -> str | None:
    """The file by which one of the layouts is recognised, relative to the folder; None if it is missing."""
    found = [file for files in _split_files(folder).values() for file in files]
    return found[0].relative_to(folder).as_posix() if found else None


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The annotation files of every split, of which there must be one."""
    found: dict[str, list[Path]] = {split: [] for split in SPLIT_FOLDERS}
    for file in visible(folder / "annotations"):
        if match := SPLIT_FILE.fullmatch(file.name):
            found[match[1].lower()].append(file)
    for split, names in SPLIT_FOLDERS.items():
        found[split] += [file for name in names if (file := folder / name / IN_SPLIT).is_file()]
    return found


def open_layout(folder: Path, numbering: Numbering, turned: bool) -> Layout:
    """The layout of the folder; reads the annotations of the train split.

    turned: whether an image whose size is not stated has the size that its EXIF orientation gives it.
    """
    files = _split_files(folder)
    faults = [
        Fault(paths[0], "", f"also {', '.join(path.name for path in paths[1:])}", f"one annotation file for {split}")
        for split, paths in files.items()
        if len(paths) > 1
    ]
    for split in ("train", "val"):
        if not files[split]:
            where = f"annotations/instances_{split}*.json or {'|'.join(SPLIT_FOLDERS[split])}/{IN_SPLIT}"
            faults.append(Fault(folder, split, "no annotation file", where))
    train = _of_train(files["train"])
    labels, wrong, repairs = category_labels(train.categories, set(train.category_ids.tolist()), numbering)
    if wrong:
        faults.append(Fault(files["train"][0], "categories", *wrong))
    ids = {category: label - numbering.first_label for category, label in labels.items()}
    return Layout(
        NAME,
        {
            split: partial(_split, folder, split, paths[0], train.categories, ids, turned) if paths else Split
            for split, paths in files.items()
            if paths or split != "test"
        },
        images="images that the JSON file names",
        objects="its JSON file",
        class_names=tuple(names_by_id({train.categories[category]: number for category, number in ids.items()})),
        crowds=True,
        faults=faults,
        repairs=repairs,
    )


# ---- one file ---------------------------------------------------------------------------------------------


@dataclass
class CocoFile:
    """The content of an annotation file: image i has the rows starts[i] to starts[i + 1] of the arrays.

    boxes: float64 [N, 4], x, y, width, height in pixels; index: position of the annotation in the file.
    """

    categories: dict[int, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    category_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    crowds: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    faults: list[Fault] = field(default_factory=list)
    repairs: Counter = field(default_factory=Counter)


def read(file: Path) -> CocoFile:
    """Parses an annotation file, once until it changes: COCO's own file takes half a minute."""
    try:
        state = file.stat()
        return _read(file, state.st_mtime_ns, state.st_size)
    except OSError as error:
        return CocoFile(faults=[Fault(file, "", f"{type(error).__name__}: {error}", "a file that can be read")])


@lru_cache(maxsize=16)
def _read(file: Path, modified: int, size: int) -> CocoFile:
    coco, content = CocoFile(), file.read_bytes()
    coco.repairs[BYTE_ORDER_MARK] += content.startswith(b"\xef\xbb\xbf")
    try:
        parsed = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        coco.faults.append(Fault(file, f"byte {error.start}", f"0x{content[error.start]:02x}", "UTF-8 text"))
        return coco
    except (ValueError, RecursionError) as error:
        got = " ".join(str(error).split())[:200]
        coco.faults.append(Fault(file, "", got or type(error).__name__, "valid JSON"))
        return coco
    del content
    parts: dict[str, list] = {}
    for part in ("categories", "images", "annotations"):
        value = parsed.get(part) if isinstance(parsed, dict) else None
        if isinstance(value, list):
            parts[part] = value
        else:
            got = "nothing" if isinstance(parsed, dict) and part not in parsed else shown(value)
            coco.faults.append(Fault(file, part, got, "a list"))
    return _Reader(file, coco).read(**parts) if not coco.faults else coco


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary. Raises ValueError if it has a key twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key is repeated among {shown([key for key, _ in pairs])}")
    return found


class _Reader:
    """Fills a CocoFile from the parsed lists; a wrong entry becomes a fault with its place in the file."""

    def __init__(self, file: Path, coco: CocoFile) -> None:
        self.file, self.coco = file, coco
        self.images: dict[int | str, int] = {}  # image id -> index

    def read(self, categories: list, images: list, annotations: list) -> CocoFile:
        for index, entry in enumerate(categories):
            self._category(f"categories[{index}]", entry)
        if not self.coco.categories and not self.coco.faults:
            self._fault("categories", "an empty list", "at least one category")
        names: set[str] = set()
        for index, entry in enumerate(images):
            self._image(f"images[{index}]", entry, names)
        rows: list[tuple] = []
        seen: set[int | str] = set()
        for index, entry in enumerate(annotations):
            row = self._annotation(index, entry, seen)
            if row is not None:
                rows.append(row)
        self._store(rows)
        return self.coco

    def _fault(self, place: str, got: str, allowed: str) -> None:
        self.coco.faults.append(Fault(self.file, place, got, allowed))

    def _category(self, place: str, entry: object) -> None:
        if not isinstance(entry, dict):
            return self._fault(place, shown(entry), "a dictionary with id and name")
        key, name = entry.get("id"), entry.get("name")
        if type(key) is not int or not 0 <= key < 1 << 31:
            self._fault(f"{place}.id", shown(key), "a whole number from 0")
        elif key in self.coco.categories:
            self._fault(f"{place}.id", f"{key} again", "an id of its own for every category")
        elif not isinstance(name, str) or not name:
            self._fault(f"{place}.name", shown(name), "a string")
        else:
            self.coco.categories[key] = name
        return None

    def _image(self, place: str, entry: object, names: set[str]) -> None:
        if not isinstance(entry, dict):
            return self._fault(place, shown(entry), "a dictionary with id and file_name")
        key, name = entry.get("id"), entry.get("file_name")
        if isinstance(name, str) and "\\" in name:  # of Windows
            name = name.replace("\\", "/")
            self.coco.repairs[BACKSLASHES] += 1
        if type(key) is not int and type(key) is not str:
            self._fault(f"{place}.id", shown(key), "a whole number or a string")
        elif key in self.images:
            self._fault(f"{place}.id", f"{shown(key)} again", "an id of its own for every image")
        elif not isinstance(name, str) or not name or "\0" in name:
            self._fault(f"{place}.file_name", shown(name), "the name of an image")
        elif name in names:
            self._fault(f"{place}.file_name", f"{shown(name)} again", "one entry for every image")
        else:
            self.images[key] = len(self.coco.names)
            names.add(name)
            self.coco.names.append(name)
            self.coco.sizes.append(self._size(place, entry))
        return None

    def _size(self, place: str, entry: dict) -> tuple[int, int] | None:
        """(width, height) that the entry states; None if it states none, or a wrong one, which is a fault."""
        width, height = entry.get("width"), entry.get("height")
        if width is None and height is None:
            return None
        if is_number(width) and is_number(height) and min(width, height) >= 1 and width % 1 == height % 1 == 0:
            return int(width), int(height)
        got = f"width {shown(width)}, height {shown(height)}"
        self._fault(place, got, "width and height in pixels, whole numbers from 1, or neither")
        return None

    def _annotation(self, index: int, entry: object, seen: set[int | str]) -> tuple | None:
        """(image, x, y, width, height, category id, crowd, index), the box in pixels; None if the entry has a fault."""
        place = f"annotations[{index}]"
        if not isinstance(entry, dict):
            self._fault(place, shown(entry), "a dictionary with image_id, category_id and bbox")
            return None
        if wrong := self._wrong_value(entry, seen):
            key, got, allowed = wrong
            self._fault(f"{place}.{key}", got, allowed)
            return None
        image, crowd = self.images[entry["image_id"]], entry.get("iscrowd") or 0
        return image, *entry["bbox"], entry["category_id"], crowd, index

    def _wrong_value(self, entry: dict, seen: set[int | str]) -> tuple[str, str, str] | None:
        """(key, what it is, what is allowed) of the first wrong value of an annotation; adds its id to `seen`."""
        key, image, category = entry.get("id"), entry.get("image_id"), entry.get("category_id")
        box, crowd = entry.get("bbox"), entry.get("iscrowd") or 0
        if type(key) is not int and type(key) is not str:
            return "id", shown(key), "a whole number or a string"
        if key in seen:
            return "id", f"{shown(key)} again", "an id of its own for every annotation"
        seen.add(key)
        if type(image) not in (int, str) or image not in self.images:
            return "image_id", shown(image), "the id of an entry of images"
        if type(category) is not int or category not in self.coco.categories:
            return "category_id", shown(category), "the id of an entry of categories"
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            return "bbox", shown(box), "4 finite numbers: x, y, width, height in pixels"
        if type(crowd) not in (int, bool) or crowd not in (0, 1):
            return "iscrowd", shown(crowd), "0 or 1"
        return None

    def _store(self, rows: list[tuple]) -> None:
        """Stores the rows by image, otherwise in the order of the file."""
        coco = self.coco
        table = np.array(rows, dtype=np.float64).reshape(-1, 8)
        table = table[np.argsort(table[:, 0], kind="stable")]
        coco.starts = np.searchsorted(table[:, 0], np.arange(len(coco.names) + 1))
        coco.boxes, coco.category_ids = table[:, 1:5].copy(), table[:, 5].astype(np.int64)
        coco.crowds, coco.index = table[:, 6].astype(bool), table[:, 7].astype(np.int64)


def _of_train(files: Sequence[Path]) -> CocoFile:
    """What the train split states, whose categories count for all splits; empty if they have a fault."""
    coco = read(files[0]) if files else CocoFile()
    return CocoFile() if any(fault.place.startswith("categories") for fault in coco.faults) else coco


# ---- one split --------------------------------------------------------------------------------------------


class CocoObjects(NamedTuple):
    """The objects of one image, which were read with the whole file."""

    file: Path
    size: tuple[int, int] | None
    rows: np.ndarray  # float64 [N, 7]: x1, y1, x2, y2 relative to the image, class id, crowd, index of the annotation

    def content(self) -> bytes:
        """Boxes, class ids and crowds, for a fingerprint."""
        return self.rows[:, :6].tobytes()

    def read(self) -> Objects:
        """The objects; they have no faults, as those of the file are known already."""
        boxes = [
            Box(f"annotations[{int(index)}]", int(class_id), (x1, y1, x2, y2), bool(crowd))
            for x1, y1, x2, y2, class_id, crowd, index in self.rows.tolist()
        ]
        return without_copies(Objects(boxes, size=self.size))


def _split(
    folder: Path, split: str, file: Path, names: Mapping[int, str], ids: Mapping[int, int], turned: bool
) -> Split:
    coco = read(file)
    found = Split(faults=list(coco.faults), repairs=Counter(coco.repairs))
    wrong = [category for category, name in coco.categories.items() if names.get(category) != name]
    if wrong:
        if names:  # without names the train file has the fault
            got = f"{wrong[0]}: {shown(coco.categories[wrong[0]])}"
            found.faults.append(Fault(file, "categories", got, "the ids and names of the train split's categories"))
        return found
    images = _image_folder(folder, split, file, coco.names)
    paths = _image_paths(images, file, coco.names, found)
    rows, starts = _rows(file, coco, _sizes(file, coco, paths, found, turned), ids, found)
    for index, path in enumerate(paths):
        if path is not None:
            found.samples.append((path, CocoObjects(file, coco.sizes[index], rows[starts[index] : starts[index + 1]])))
    found.repairs = +found.repairs
    return found


def _image_folder(folder: Path, split: str, file: Path, names: Sequence[str]) -> Path:
    """The folder that image names are relative to: that of Roboflow's file, else the first that holds an image."""
    if file.name == IN_SPLIT:
        return file.parent
    stem = file.stem.removeprefix("instances_")  # such as train2017
    parts = dict.fromkeys((stem, *SPLIT_FOLDERS[split]))
    tried = [folder / part for part in (*parts, *(f"images/{part}" for part in parts), "images", ".")]
    for path in tried:
        if any(file_exists(path / name) for name in names[:20]):
            return path
    return next(path for path in tried if path.is_dir())


def _image_paths(images: Path, file: Path, names: Sequence[str], found: Split) -> list[Path | None]:
    """The file of every image, None if it is missing; each folder is listed once, which is fast for many images."""
    listed: dict[str, set[str]] = {}
    paths: list[Path | None] = []
    for index, name in enumerate(names):
        parent, base = os.path.split(os.path.normpath(os.path.join(images, name)))
        if parent not in listed:
            listed[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        if base in listed[parent] and is_image(Path(base)):
            paths.append(Path(parent, base))
            continue
        got = f"{'no image' if base not in listed[parent] else 'the file'} {shown(name)}"
        found.faults.append(
            Fault(file, f"images[{index}].file_name", got, f"images ({', '.join(SUFFIXES)}) that exist")
        )
        paths.append(None)
    named = {str(path) for path in paths}
    beside = (name for name in listed.get(str(images), ()) if is_image(Path(name)))
    found.repairs[UNUSED] += sum(os.path.join(images, name) not in named for name in beside)
    return paths


def _sizes(file: Path, coco: CocoFile, paths: Sequence[Path | None], found: Split, turned: bool) -> np.ndarray:
    """float64 [images, 2]: width and height that the file states, else those of the image; NaN if neither is known."""
    sizes = list(coco.sizes)
    for index, path in enumerate(paths):
        if sizes[index] is None and path is not None:
            sizes[index] = header_size(path, turned)
            found.repairs[NO_SIZE] += 1
            if sizes[index] is None:
                got = "no width and height, and an image that cannot be read"
                found.faults.append(Fault(file, f"images[{index}]", got, "images that can be decoded"))
    return np.array([size or (math.nan, math.nan) for size in sizes], dtype=np.float64).reshape(-1, 2)


def _rows(file: Path, coco: CocoFile, sizes: np.ndarray, ids: Mapping[int, int], found: Split) -> tuple:
    """(rows of CocoObjects of all images, index at which the rows of each image start).

    Boxes without width or height are left out: COCO's own files have a few, and torchvision's references leave them out
    too (coco_utils.py).
    """
    image = np.repeat(np.arange(len(coco.names)), np.diff(coco.starts))
    low, extent, size = coco.boxes[:, :2], coco.boxes[:, 2:], sizes[image]
    corners = np.concatenate([low / size, (low + extent) / size], axis=1)
    negative = np.any(extent < 0, axis=1)
    empty = (extent / size < MIN_SIDE).any(1) & ~negative
    found.repairs[EMPTY_BOX] += int(empty.sum())
    leaving = (corners[:, :2] < 0).any(1) | (corners[:, 2:] > 1).any(1)
    keep = ~(negative | empty)
    for row in np.flatnonzero(negative | leaving & keep).tolist():
        tolerance = (PIXELS / size[row]).tolist()
        inside = None if negative[row] else clip_box(corners[row].tolist(), tolerance, found.repairs)
        keep[row] = inside is not None
        if inside is not None:
            corners[row] = inside
            continue
        width, height = size[row]
        got = f"{shown(coco.boxes[row].tolist())} in an image of {width:g} x {height:g}"
        found.faults.append(Fault(file, f"annotations[{coco.index[row]}].bbox", got, BOX))
    class_ids = np.array([ids.get(category, -1) for category in coco.category_ids.tolist()], dtype=np.float64)
    rows = np.column_stack([corners, class_ids, coco.crowds, coco.index])[keep]
    return rows, np.searchsorted(image[keep], np.arange(len(coco.names) + 1))
