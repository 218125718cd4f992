"""What is wrong with the datasets of a workload: everything at once, before anything is trained.

Annotation files are read completely and images in an even sample. Then one or two samples of train and of val go
through the task's transforms and its model.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from dataset_folders import (
    IMAGE_SUFFIXES,
    FolderDataset,
    annotation_files,
    class_names,
    describe,
    find_dataset,
    image_files,
    labelled_images,
    load_image,
    open_split,
    paired_files,
    read_annotation,
    visible,
)
from eval_methods import device_of, evaluation_mode, logits_of
from model_architectures import num_classes_of
from workload import CLASSIFICATION, Problem, Task

MAX_LISTED = 10  # problems of one kind and task
MAX_DECODED = 32  # images of one split
OUTSIDE_TOLERANCE = 1e-3  # share of the image by which rounding may push a box over its edge
CLASSES_FILE = "classes.txt"  # labelling tools put the names of the classes beside the annotations
SAMPLE_CONTRACT = {
    True: "image -> float tensor [C, H, W]",
    False: '(image, target) -> (float tensor [C, H, W], {"boxes": XYXY [N, 4], "labels": int64 [N], ...})',
}


def check(tasks: Mapping[str, Task], roots: Sequence[Path]) -> list[Problem]:
    """All problems of the datasets, transforms and class counts of all tasks; [] if everything is right.

    roots: the folders that hold datasets; the first that has a task's dataset is taken. Raises nothing: what a user's
    transform or model raises is a problem as well. Models keep their modes.
    """
    return [problem for task in tasks.values() for problem in _capped(_task_problems(task, roots))]


def _capped(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The first problems of every kind, and how many more there are; a kind is what has the same remedy."""
    kinds: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[problem.allowed].append(problem)
    for allowed, found in kinds.items():
        yield from found[:MAX_LISTED]
        if len(found) > MAX_LISTED:
            yield Problem(found[0].task, "dataset", f"{len(found) - MAX_LISTED} more problems of this kind", allowed)


def _task_problems(task: Task, roots: Sequence[Path]) -> list[Problem]:
    folder = find_dataset(task, roots)
    if folder is None:
        return [_missing_dataset(task, roots)]
    problems = []
    for split in _splits(folder):
        check_split = _classification_problems if task.kind == CLASSIFICATION else _detection_problems
        problems += check_split(task, folder, split)
    outputs = None
    if not problems:
        problems, outputs = _dry_run(task, folder)
    if task.kind == CLASSIFICATION:
        outputs = num_classes_of(task.model) if outputs is None else outputs
        problems += _class_count(task, class_names(folder), outputs)
    return problems


def _splits(folder: Path) -> list[str]:
    return ["train", "val", "test"] if (folder / "test").is_dir() else ["train", "val"]


def _missing_dataset(task: Task, roots: Sequence[Path]) -> Problem:
    roots = [Path(root) for root in roots]
    there = {path.name for root in roots for path in visible(root) if path.is_dir()}
    folded = {name.lower(): name for name in sorted(there)}
    near = [folded[name] for name in difflib.get_close_matches(task.dataset.lower(), folded, 3)]
    looked = [f"{root.absolute()}{'' if root.is_dir() else ' (which does not exist)'}" for root in roots]
    got = f"no folder {task.dataset!r} in {', '.join(looked)}"
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return Problem(task.name, "dataset", got + hint, "a dataset folder, found by the task's name or its 'dataset'")


# ---- images -----------------------------------------------------------------------------------------------


def _classification_problems(task: Task, folder: Path, split: str) -> Iterator[Problem]:
    names = class_names(folder)
    images = [path for path, _ in labelled_images(folder / split, names)]
    yield from _count_problems(task, folder, split, images, "<class>/*.jpg")
    for path in visible(folder / split):
        if path.is_dir() and path.name not in names and names:
            allowed = f"the class folders of train: {', '.join(names)}"
            yield Problem(task.name, f"dataset {split}", f"a class folder {path.name!r}", allowed)
    yield from _image_problems(task, folder, images)


def _count_problems(task: Task, folder: Path, split: str, images: Sequence[Path], pattern: str) -> Iterator[Problem]:
    needed = 2 if split == "train" else 1
    if len(images) >= needed:
        return
    beside = ", ".join(path.name for path in visible(folder / split)[:5])
    got = f"{len(images) or 'no'} image{'s' * (len(images) != 1)}" if (folder / split).is_dir() else "no such folder"
    got += f" (the folder holds {beside})" if beside and not images else ""
    allowed = f"at least {needed} image{'s' * (needed > 1)} as {split}/{pattern} ({', '.join(sorted(IMAGE_SUFFIXES))})"
    yield Problem(task.name, f"dataset {split}", got, allowed)


def _image_problems(task: Task, folder: Path, images: Sequence[Path]) -> Iterator[Problem]:
    """Files without a byte, and those of an even sample that do not decode."""
    allowed = "images that can be decoded"
    sample = set(_evenly(images, MAX_DECODED))
    for path in images:
        error = _file_error(path) or (_decode_error(path) if path in sample else None)
        if error:
            yield Problem(task.name, f"dataset {path.relative_to(folder).as_posix()}", error, allowed)


def _evenly(items: Sequence, count: int) -> list:
    """At most `count` items, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _file_error(path: Path) -> str | None:
    try:
        return None if path.stat().st_size else "an empty file"
    except OSError as error:  # such as a link to nowhere
        return _message(error)


def _decode_error(path: Path) -> str | None:
    try:
        load_image(path)
    except Exception as error:  # Pillow's decoders raise many types on broken files
        return _message(error)
    return None


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# ---- annotations ------------------------------------------------------------------------------------------


def _detection_problems(task: Task, folder: Path, split: str) -> Iterator[Problem]:
    images = image_files(folder / split / "images")
    yield from _count_problems(task, folder, split, images, "images/*.jpg")
    yield from _pairing_problems(task, folder, split, images)
    num_boxes = 0
    for annotation in filter(None, (annotation for _, annotation in paired_files(folder / split))):
        name = f"dataset {annotation.relative_to(folder).as_posix()}"
        try:
            boxes, bad = read_annotation(annotation)
        except OSError as error:
            yield Problem(task.name, name, _message(error), "annotation files that can be read")
            continue
        num_boxes += len(boxes) + len(bad)
        yield from _line_problems(task, name, boxes, bad)
    if images and not num_boxes:
        beside = ", ".join(path.name for path in visible(folder / split))
        got = f"no image with an object (the folder holds {beside})"
        allowed = f"objects in {split}/annotations/<stem of the image>.txt: without any, mAP is undefined"
        yield Problem(task.name, f"dataset {split}", got, allowed)
    yield from _image_problems(task, folder, images)


def _pairing_problems(task: Task, folder: Path, split: str, images: Sequence[Path]) -> Iterator[Problem]:
    by_stem = defaultdict(list)
    for path in images:
        by_stem[path.stem].append(path.name)
    for names in by_stem.values():
        if len(names) > 1:
            key = f"dataset {split}/images/{names[0]}"
            yield Problem(task.name, key, f"the same stem as {', '.join(names[1:])}", "one image for every stem")
    for path in annotation_files(folder / split):
        if path.stem not in by_stem and path.name != CLASSES_FILE:
            key = f"dataset {split}/annotations/{path.name}"
            yield Problem(task.name, key, f"no image {path.stem}.*", "annotation files named after an image")


def _line_problems(task: Task, name: str, boxes: list, bad: list) -> Iterator[Problem]:
    outputs = num_classes_of(task.model)
    num_classes = None if outputs is None else outputs - task.background_class
    for line in bad:
        yield Problem(task.name, f"{name} line {line.line}", line.got, line.allowed)
    for row in boxes:
        key = f"{name} line {row.line}"
        if num_classes is not None and row.class_id >= num_classes:
            allowed = f"class ids 0 to {num_classes - 1}, the classes of the model"
            yield Problem(task.name, key, f"class id {row.class_id}", allowed)
        x, y, width, height = row.box
        box = f"the box {' '.join(f'{value:g}' for value in row.box)}"
        if width <= 0 or height <= 0:
            yield Problem(task.name, key, box, "boxes with a width and a height above 0")
        elif max(abs(x - 0.5) + width / 2, abs(y - 0.5) + height / 2) > 0.5 + OUTSIDE_TOLERANCE:
            yield Problem(task.name, key, box, "boxes inside the image, in shares of its width and height")


# ---- transforms and model ---------------------------------------------------------------------------------


def _dry_run(task: Task, folder: Path) -> tuple[list[Problem], int | None]:
    """Problems of the transforms and of the model's forward pass, and a classifier's number of outputs."""
    problems: list[Problem] = []
    allowed = SAMPLE_CONTRACT[task.kind == CLASSIFICATION]
    first = {}
    for split in ("train", "val"):
        dataset = open_split(task, folder, split)
        try:
            samples = [dataset[index][0] for index in _telling_samples(dataset)]
        except RuntimeError as error:
            problems.append(Problem(task.name, f"transforms {split}", _message(error.__cause__ or error), allowed))
            continue
        shapes = {str(list(image.shape)) for image in samples}
        if task.kind == CLASSIFICATION and len(shapes) > 1:
            got = f"images of {' and '.join(sorted(shapes))}"
            problems.append(Problem(task.name, f"transforms {split}", got, "one size for all images of a batch"))
        first[split] = samples[0]
    if problems:
        return problems, None
    tried = [_forward(task, image, split) for split, image in first.items()]
    return [problem for problem, _ in tried if problem][:1], tried[-1][1]  # one: they fail for the same reason mostly


def _telling_samples(dataset: FolderDataset) -> list[int]:
    """Of a detector one with objects and one without, if there is; of a classifier the widest and the tallest image."""
    indices = _evenly(range(len(dataset)), MAX_DECODED)
    if isinstance(dataset.samples[0][1], int):
        aspects = {}
        for index in indices:
            with Image.open(dataset.samples[index][0]) as image:  # reads the header only
                aspects[index] = image.width / image.height
        return list(dict.fromkeys([min(aspects, key=aspects.get), max(aspects, key=aspects.get)]))
    objects = (bool(read_annotation(annotation)[0]) for _, annotation in dataset.samples)
    found: dict[bool, int] = {}
    for index, has_objects in enumerate(objects):
        found.setdefault(has_objects, index)
        if len(found) == 2:
            break
    return list(found.values())


def _forward(task: Task, image: torch.Tensor, split: str) -> tuple[Problem | None, int | None]:
    """What goes wrong in eval mode with one image of the split, and a classifier's number of outputs."""
    is_classifier = task.kind == CLASSIFICATION
    allowed = (
        "a classifier that maps [N, C, H, W] to [N, classes]" if is_classifier else "a detector of [C, H, W] images"
    )
    of = f"for one {split} image {list(image.shape)}"
    image = image.to(device_of(task.model))
    try:
        # Not in inference mode: a model may keep a tensor, such as its grid, that it then cannot be trained with.
        with evaluation_mode(task.model), torch.inference_mode(False), torch.no_grad():
            output = task.model(image[None] if is_classifier else [image])
    except Exception as error:  # a user's model may raise anything
        return Problem(task.name, "model", f"{_message(error)} {of}", allowed), None
    if not is_classifier:
        return None, None
    scores = logits_of(output)
    if not torch.is_tensor(scores) or scores.ndim != 2 or len(scores) != 1:
        return Problem(task.name, "model", f"{describe(scores)} {of}", allowed), None
    return None, scores.shape[1]


def _class_count(task: Task, names: list[str], outputs: int | None) -> list[Problem]:
    if outputs is None or len(names) <= outputs:
        return []
    got = f"{len(names)} class folders ({', '.join(names[:20])})"
    return [Problem(task.name, "dataset train", got, f"at most {outputs}, the number of outputs of the model")]
