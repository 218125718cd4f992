"""The layout of a data.yaml, as Ultralytics reads it and Roboflow exports it.

`train`, `val` and, optionally, `test` are each a folder (searched recursively), a text file with an image per line, or
a list of these. The annotation file of an image has the path of the image with the last "images" replaced by "labels".
Source: docs.ultralytics.com/datasets/detect. Paths may be absolute or outside the dataset folder: images are only read.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from gemel.datasets.records import (
    NO_FILE,
    NO_IMAGE,
    SPLIT_FOLDERS,
    Fault,
    Layout,
    Split,
    file_exists,
    has_image_name,
    is_image,
    passed_over,
    read_text,
    shown,
    visible,
    walk,
)
from gemel.datasets.yolo import MAX_CLASS_ID, TextFile, annotation_files, orphan_faults, stem_faults

NAME = "data.yaml"
SUFFIXES = {".yaml", ".yml"}
PLACE = "a folder of images, a text file with an image per line, or a list of these"
TRAIN_KEY = re.compile(r"^train\s*:", re.MULTILINE)
MAX_YAML, MAX_DEPTH = 1 << 20, 20
MOVED = "the 'path' of the yaml file does not exist here, so the folder of the yaml file was used"
ELSEWHERE = "a path of the yaml file does not exist here, so {} below the dataset's folder was used"
NO_TEST = "the test split was left out, as what the yaml file names does not exist"


@dataclass(frozen=True)
class Description:
    """The content of the yaml file; lines: line number of each key, for messages."""

    file: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def fault(self, key: str, got: str, allowed: str) -> Fault:
        """A fault of one key."""
        place = f"line {self.lines[key]}: {key}" if key in self.lines else key
        return Fault(self.file, place, got, allowed)


def evidence(folder: Path) -> str | None:
    """The name of the yaml file that describes the folder: data.yaml, else any with a key `train`; None without."""
    files = [path for path in visible(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]
    if (folder / NAME) in files:
        return NAME
    found = [path.name for path in files if TRAIN_KEY.search(path.read_text("utf-8", "replace"))]
    return ", ".join(found) or None


def open_layout(folder: Path) -> Layout:
    """The layout of the folder; reads the yaml file, but no annotation file."""
    names = (evidence(folder) or NAME).split(", ")
    if len(names) > 1:
        return _refused([Fault(folder, "", " and ".join(names), "one yaml file that describes the dataset")])
    about, repairs, faults = read_yaml(folder / names[0])
    if faults:
        return _refused(faults)
    class_names, num_classes, faults = _class_names(about)
    keypoints, more = _num_keypoint_values(about)
    root, moved, path_faults = _root(about)
    repairs[MOVED] += moved
    faults += [*more, *path_faults]
    splits: dict[str, Callable[[], Split]] = {}
    for split, keys in SPLIT_FOLDERS.items():  # a key is called as a folder is
        key = next((key for key in keys if about.values.get(key) not in (None, "", [])), None)
        if key and split == "test" and _is_missing(about, root, key):
            repairs[NO_TEST] += 1
        elif key:
            splits[split] = partial(_split, about, root, key, TextFile(None, num_classes, True, keypoints))
        elif split != "test":
            splits[split] = Split
            faults.append(about.fault(split, "nothing", PLACE))
    return Layout(
        NAME,
        splits,
        images="images that the yaml file names",
        objects="text files beside the images, with 'labels' in place of 'images' in their paths",
        class_names=class_names,
        faults=faults,
        repairs=+repairs,
    )


def _refused(faults: Sequence[Fault]) -> Layout:
    """A layout without splits."""
    return Layout(NAME, {}, "", "", faults=faults)


# ---- the yaml file ----------------------------------------------------------------------------------------


def read_yaml(file: Path) -> tuple[Description, Counter, list[Fault]]:
    """The top level of a yaml file with the lines of its keys, repairs, faults; a repeated key is a fault."""
    text, repairs, faults = read_text(file)
    about = Description(file, {}, {})
    if faults:
        return about, repairs, faults
    try:
        if faults := _expansion_faults(file, text):
            return about, repairs, faults
        node = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            got = "an empty file" if node is None else f"a {node.id}"
            return about, repairs, [Fault(file, "", got, "keys such as train, val and names")]
        faults = [*_repeated_keys(file, node)]
        about.lines.update({key.value: key.start_mark.line + 1 for key, _ in node.value if _is_scalar(key)})
        values = SafeConstructor().construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        return about, repairs, [_yaml_fault(file, text, error)]
    about.values.update({key: value for key, value in values.items() if isinstance(key, str)})
    return about, repairs, faults


def _expansion_faults(file: Path, text: str) -> list[Fault]:
    """Refuses aliases, which can expand a small file without limit, and depth, which costs quadratic parser time."""
    if len(text) > MAX_YAML:
        return [Fault(file, "", f"{len(text)} characters", f"at most {MAX_YAML}")]
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            got = "an alias" if depth <= MAX_DEPTH else f"{depth} levels"
            place = f"line {event.start_mark.line + 1}"
            return [Fault(file, place, got, f"YAML without aliases, of at most {MAX_DEPTH} levels")]
    return []


def _yaml_fault(file: Path, text: str, error: Exception) -> Fault:
    """A parser error as a fault, with its line if it is known."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error) or type(error).__name__
    return Fault(file, f"line {line + 1}", " ".join(str(said).split())[:200], "valid YAML")


def _repeated_keys(file: Path, node: yaml.MappingNode) -> Iterator[Fault]:
    """A fault for each repeated key: a second `train`, or class id in `names`, would silently replace the first."""
    seen: set[str] = set()
    for key, value in node.value:
        if _is_scalar(key):
            if key.value in seen:
                yield Fault(file, f"line {key.start_mark.line + 1}", f"{shown(key.value)} again", "every key once")
            seen.add(key.value)
            if key.value == "names" and isinstance(value, yaml.MappingNode):
                yield from _repeated_keys(file, value)


def _is_scalar(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode)


def _class_names(about: Description) -> tuple[tuple[str, ...], int | None, list[Fault]]:
    """(class names by class id, number of classes, faults), from `names` or `nc`; () if there is only `nc`."""
    names, count = about.values.get("names"), about.values.get("nc")
    faults = []
    if count is not None and (type(count) is not int or not 0 < count < MAX_CLASS_ID):
        faults.append(about.fault("nc", shown(count), "the number of classes"))
        count = None
    if names is None:
        if count is None and not faults:
            faults.append(about.fault("names", "nothing", "the names of the classes, or their number as nc"))
        return (), count, faults
    if isinstance(names, dict):
        names = {int(key) if _is_id(key) else key: name for key, name in names.items()}
        if set(names) != set(range(len(names))) or any(type(key) is not int for key in names):
            faults.append(about.fault("names", shown(list(names)), "the class ids 0, 1, 2, ... without gaps"))
            return (), count, faults
        names = [names[key] for key in range(len(names))]
    if not isinstance(names, list) or not names:
        return (), count, [*faults, about.fault("names", shown(names), "a list, or a mapping from class ids")]
    wrong = [name for name in names if type(name) not in (str, int, float) or name == ""]
    if wrong:
        got = f"the name {shown(wrong[0])}"
        return (), count, [*faults, about.fault("names", got, "strings (in quotes: 'no', 'null')")]
    if count is not None and count != len(names):
        faults.append(about.fault("nc", str(count), f"{len(names)}, the number of names"))
    return tuple(map(str, names)), len(names), faults


def _is_id(key: object) -> bool:
    """Whether a key of `names` is a class id that is written as text, such as '0'."""
    return isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key


def _num_keypoint_values(about: Description) -> tuple[int, list[Fault]]:
    """(numbers of keypoints behind the box in a line, faults), from `kpt_shape`: [keypoints, 2 or 3 values of each]."""
    shape = about.values.get("kpt_shape")
    if shape is None:
        return 0, []
    whole = isinstance(shape, list) and len(shape) == 2 and all(type(value) is int for value in shape)
    if whole and 0 < shape[0] < 10_000 and shape[1] in (2, 3):
        return shape[0] * shape[1], []
    return 0, [about.fault("kpt_shape", shown(shape), "[number of keypoints, 2 or 3]")]


# ---- paths ------------------------------------------------------------------------------------------------


def _root(about: Description) -> tuple[Path, bool, list[Fault]]:
    """(folder that the splits are relative to, whether `path` was ignored, faults).

    `path` is relative to the yaml file's folder or its parent. If it does not exist, for example because it is that of
    the machine where the dataset was made, the yaml file's folder is used.
    """
    path, own = about.values.get("path"), about.file.parent
    if path in (None, ""):
        return own, False, []
    if not isinstance(path, str) or "\0" in path:
        return own, False, [about.fault("path", shown(path), "the dataset's folder")]
    found = [joined for base in (own, own.parent) if (joined := _joined(base, path)).is_dir()]
    return (found[0], False, []) if found else (own, True, [])


def _joined(base: Path, path: str) -> Path:
    return Path(os.path.normpath(base / path))


def _entries(about: Description, root: Path, key: str, repairs: Counter | None = None) -> Iterator[Path | Fault]:
    """The folders and list files of one split, or faults of its entries; repairs: counts paths of another machine."""
    value = about.values[key]
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, str) or not entry or "\0" in entry:
            yield about.fault(key, shown(entry), PLACE)
            continue
        tried = [_joined(root, entry)]
        if entry.startswith("../"):  # Roboflow writes ../train/images for train/images, and Ultralytics accepts it
            tried.append(_joined(root, entry[3:]))
        found = _first_there(tried)
        if found is None and (found := _first_there(_tails(root, entry, key))) and repairs is not None:
            repairs[ELSEWHERE.format(found.relative_to(root).as_posix())] += 1
        yield found or about.fault(key, f"{shown(entry)}, which does not exist in {root}", PLACE)


def _first_there(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_dir() or file_exists(path)), None)


def _tails(root: Path, entry: str, key: str) -> Iterator[Path]:
    """What a path of another machine, or of Windows, may mean here: its longest end that names the split."""
    names = next(folders for folders in SPLIT_FOLDERS.values() if key in folders)
    parts = [part for part in entry.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        tail = parts[start:]
        if any(part.lower().startswith(names) for part in tail):
            yield root.joinpath(*tail)
            for name in names:  # such as valid for val
                yield root.joinpath(*(name if part.lower() in names else part for part in tail))


def _is_missing(about: Description, root: Path, key: str) -> bool:
    """Whether the entries of a split are texts, none of which exists here."""
    value = about.values[key]
    texts = all(isinstance(entry, str) for entry in (value if isinstance(value, list) else [value]))
    return texts and all(isinstance(entry, Fault) for entry in _entries(about, root, key))


def _split(about: Description, root: Path, key: str, lines: TextFile) -> Split:
    """Finds the images of one split and their annotation files; lines: how each of these files is read."""
    split, images = Split(), []
    for entry in _entries(about, root, key, split.repairs):
        if isinstance(entry, Fault):
            split.faults.append(entry)
        elif entry.is_dir():
            images += _folder_images(entry, split)
        elif entry.suffix.lower() == ".txt":
            images += _listed_images(entry, root, split)
        else:
            split.faults.append(about.fault(key, shown(entry.name), PLACE))
    split.faults += _repeated_images(images)
    files = _label_files(images)
    split.samples = [(image, replace(lines, file=files.get(image))) for image in images]
    split.repairs[NO_FILE] += len(images) - len(files)
    return split


def _folder_images(folder: Path, split: Split) -> list[Path]:
    """The images in a folder and its subfolders; an annotation file without an image is a fault."""
    images = []
    others: list[Path] = []
    for parent, files in walk(folder):
        here = [path for path in files if has_image_name(path)]
        labels = label_file(parent / "any.jpg").parent
        split.faults += stem_faults(here)
        split.faults += orphan_faults(annotation_files(labels), here) if labels != parent else []
        images += here
        others += [path for path in files if not has_image_name(path) and path.suffix.lower() != ".txt"]
    split.repairs += passed_over(others, NO_IMAGE)
    return images


def _listed_images(file: Path, root: Path, split: Split) -> list[Path]:
    """The images of a text file, a path per line: absolute, or relative to the file's or the dataset's folder."""
    text, repairs, faults = read_text(file)
    split.repairs += repairs
    split.faults += faults
    images = []
    for number, line in enumerate(text.split("\n"), start=1):
        name = line.strip()
        if not name:
            continue
        tried = [_joined(base, name) for base in (file.parent, root)]
        found = next((path for path in tried if file_exists(path)), None)
        if found is None or not is_image(found):
            got = f"no image {shown(name)}" if found is None else shown(name)
            split.faults.append(Fault(file, f"line {number}", got, "paths of images that exist"))
        else:
            images.append(found)
    return images


def _repeated_images(images: Sequence[Path]) -> Iterator[Fault]:
    """A fault for each image that a split has more than once."""
    for path, count in Counter(images).items():
        if count > 1:
            yield Fault(path, "", f"the image {count} times in a split", "every image once")


def label_file(image: Path) -> Path:
    """The annotation file of an image: the last folder "images" of its path is replaced by "labels", if it has one."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, 0, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _label_files(images: Iterable[Path]) -> dict[Path, Path]:
    """The annotation file of every image that has one; the suffix may be written in capitals."""
    listed: dict[Path, dict[str, Path]] = {}
    found = {}
    for image in images:
        file = label_file(image)
        if file.parent not in listed:
            there = sorted(annotation_files(file.parent), key=lambda path: path.suffix == ".txt")
            listed[file.parent] = {path.stem: path for path in there}
        if file.stem in listed[file.parent]:
            found[image] = listed[file.parent][file.stem]
    return found
