"""Checks the datasets of a workload before anything is trained, and reports all problems at once.

All annotation files are read, and an evenly spread sample of the images. Then one or two samples of train and of val go
through the task's transforms and its model.
"""

import difflib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from gemel.datasets.class_folders import class_names, has_test, labelled_split, left_out_test, read_split
from gemel.datasets.flat_images import other_colours
from gemel.datasets.folders import (
    FolderDataset,
    describe,
    find_dataset,
    load_image,
    open_split,
    wrong_size,
)
from gemel.datasets.image_notes import image_notes
from gemel.datasets.layouts import num_outputs, open_layout
from gemel.datasets.marked_boxes import misplaced
from gemel.datasets.records import (
    IMAGE_SUFFIXES,
    NO_FILE,
    Fault,
    Layout,
    Objects,
    Source,
    Split,
    header_size,
    split_folder,
    visible,
)
from gemel.forward.modes import device_of, evaluation_mode, logits_of
from gemel.workload import CLASSIFICATION, Problem, Task

MAX_LISTED = 10  # problems of one kind per task
MAX_DECODED = 32  # images per split
SAMPLE_CONTRACT = {
    True: "image -> float tensor [C, H, W]",
    False: '(image, target) -> (float tensor [C, H, W], {"boxes": XYXY [N, 4], "labels": int64 [N], ...})',
}

log = logging.getLogger(__name__)


def check(tasks: Mapping[str, Task], roots: Sequence[Path], notes: dict[str, list[str]] | None = None) -> list[Problem]:
    """All problems of the datasets, transforms and class counts of all tasks; [] if there are none.

    roots: the folders that hold datasets; a task's dataset is taken from the first that has it. notes: gets, by task,
    what is no problem but should be known, such as files that were passed over and boxes that were clipped, each with
    its count; without it this is logged as warnings. Raises nothing: an exception of a user's transform or model is a
    problem. Models keep their modes.
    """
    problems: list[Problem] = []
    for name, task in tasks.items():
        repairs: Counter[str] = Counter()
        problems += _capped(_task_problems(task, roots, repairs))
        lines = [f"{count} times: {what}" for what, count in (+repairs).items()]
        if notes is not None:
            notes[name] = lines
        for line in lines if notes is None else ():
            log.warning("%s: dataset: %s", name, line)
    return problems


def _capped(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The first problems of every kind, and the number of further ones; a kind has one text of what is allowed."""
    kinds: dict[str, list[Problem]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for problem in problems:
        counts[problem.allowed] += 1
        if counts[problem.allowed] <= MAX_LISTED:
            kinds[problem.allowed].append(problem)
    for allowed, found in kinds.items():
        yield from found
        if more := counts[allowed] - len(found):
            yield Problem(found[0].task, "dataset", f"{more} more problems of this kind", allowed)


def _task_problems(task: Task, roots: Sequence[Path], repairs: Counter) -> list[Problem]:
    """The problems of one task; transforms and model are tried only if its files have none."""
    folder = find_dataset(task, roots)
    if folder is None:
        return [_missing_dataset(task, roots)]
    layout = None if task.kind == CLASSIFICATION else open_layout(task, folder)
    if layout is None:
        splits = ["train", "val", *(["test"] if has_test(task, folder) else [])]
        repairs += left_out_test(task, folder)
        problems = [p for split in splits for p in _classification_problems(task, folder, split, repairs)]
    else:
        problems = _detection_problems(task, folder, layout, repairs)
    outputs = None
    if not problems:
        problems, outputs = _dry_run(task, folder, layout)
        repairs += _other_colours(task, folder, layout) if not problems else Counter()
    if task.kind == CLASSIFICATION:
        problems += _class_count(task, class_names(task, folder), outputs)
    return problems


def _missing_dataset(task: Task, roots: Sequence[Path]) -> Problem:
    """The problem of a dataset that is not found, with folders of similar names."""
    roots = [Path(root) for root in roots]
    there = {path.name for root in roots for path in visible(root) if path.is_dir()}
    folded = {name.lower(): name for name in sorted(there)}
    near = [folded[name] for name in difflib.get_close_matches(task.dataset.lower(), folded, 3)]
    looked = [f"{root.absolute()}{'' if root.is_dir() else ' (which does not exist)'}" for root in roots]
    got = f"no folder {task.dataset!r} in {', '.join(looked)}"
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return Problem(task.name, "dataset", got + hint, "a dataset folder, found by the task's name or its 'dataset'")


# ---- images -----------------------------------------------------------------------------------------------


def _classification_problems(task: Task, folder: Path, split: str, repairs: Counter) -> Iterator[Problem]:
    found = read_split(task, folder, split)
    images = [path for path, _ in found.samples]
    has_labels = task.labels or split != "train"
    yield from _count_problems(task, folder, split, images, f"{split}/<class>/*.jpg" if has_labels else "train/*.jpg")
    yield from (_as_problem(task, folder, fault) for fault in found.faults)
    repairs += found.repairs
    repairs += image_notes(images, task.reading.exif_orientation)
    yield from _image_problems(task, folder, images)


def _count_problems(task: Task, folder: Path, split: str, images: Sequence[Path], pattern: str) -> Iterator[Problem]:
    needed = 2 if split == "train" else 1
    if len(images) >= needed:
        return
    in_folder = pattern.startswith(f"{split}/")
    place = split_folder(folder, split)
    beside = ", ".join(path.name for path in visible(place)[:5]) if in_folder and not images else ""
    got = f"{len(images) or 'no'} image{'s' * (len(images) != 1)}"
    got = "no such folder" if in_folder and not place.is_dir() else got
    got += f" (the folder holds {beside})" if beside else ""
    allowed = f"at least {needed} image{'s' * (needed > 1)} as {pattern} ({', '.join(sorted(IMAGE_SUFFIXES))})"
    yield Problem(task.name, f"dataset {split}", got, allowed)


def _image_problems(
    task: Task, folder: Path, images: Sequence[Path], sources: Mapping[Path, Source] | None = None
) -> Iterator[Problem]:
    """Empty files; and in an evenly spread sample, files that cannot be decoded or do not have the stated size."""
    allowed = "images that can be decoded"
    sample = set(_evenly_spread(images, MAX_DECODED))
    for path in images:
        error = _file_error(path) or (_decode_error(task, path) if path in sample else None)
        if error:
            yield _as_problem(task, folder, Fault(path, "", error, allowed))
        elif path in sample and sources and (wrong := _wrong_size(task, path, sources[path])):
            file = sources[path].file
            allowed_size = f"the size that {file.name if file else 'its annotation'} states"
            yield _as_problem(task, folder, Fault(path, "", wrong, allowed_size))


def _evenly_spread(items: Sequence, count: int) -> list:
    """At most `count` items, evenly spread, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _file_error(path: Path) -> str | None:
    try:
        return None if path.stat().st_size else "an empty file"
    except OSError as error:  # such as a broken link
        return _message(error)


def _decode_error(task: Task, path: Path) -> str | None:
    try:
        load_image(path, task.reading.exif_orientation)
    except Exception as error:  # Pillow's decoders raise many types on broken files
        return _message(error)
    return None


def _wrong_size(task: Task, path: Path, source: Source) -> str | None:
    """What is wrong with the stated size, and whether that comes of turning the image, or of not turning it."""
    try:
        objects = source.read()
    except OSError:
        return None
    turned = task.reading.exif_orientation
    wrong = wrong_size(load_image(path, turned), objects) if objects.size else None
    if wrong and header_size(path, not turned) == objects.size:
        wrong += f", as its EXIF orientation is {'' if turned else 'not '}followed (exif_orientation: {not turned})"
    return wrong


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# ---- annotations ------------------------------------------------------------------------------------------


def _detection_problems(task: Task, folder: Path, layout: Layout, repairs: Counter) -> list[Problem]:
    """The problems of all splits; missing images and objects are reported only if nothing else could explain them."""
    splits = {name: open_them() for name, open_them in layout.splits.items()}
    faults = [*layout.faults, *(fault for split in splits.values() for fault in split.faults)]
    problems = [_as_problem(task, folder, fault) for fault in faults]
    repairs += layout.repairs
    for name, split in splits.items():
        problems += _split_problems(task, folder, layout, name, split, bool(faults), repairs)
    return problems


def _as_problem(task: Task, folder: Path, fault: Fault) -> Problem:
    """A fault as a problem of the task, with the file relative to the dataset folder."""
    inside = fault.file.is_relative_to(folder)
    file = fault.file.relative_to(folder).as_posix() if inside else str(fault.file)
    key = " ".join(word for word in ("dataset", "" if file == "." else file, fault.place) if word)
    return Problem(task.name, key, fault.got, fault.allowed)


def _split_problems(
    task: Task, folder: Path, layout: Layout, name: str, split: Split, has_faults: bool, repairs: Counter
) -> Iterator[Problem]:
    images = [image for image, _ in split.samples]
    if not has_faults:
        yield from _count_problems(task, folder, name, images, layout.images.format(split=name))
    is_labelled = task.labels or name != "train"
    repairs += split.repairs if is_labelled else Counter({**split.repairs, NO_FILE: 0})
    repairs += image_notes(images, task.reading.exif_orientation)
    num_boxes = 0
    for _, source in split.samples if is_labelled else ():
        try:
            objects = source.read()
        except OSError as error:
            fault = Fault(source.file or folder, "", _message(error), "annotation files that can be read")
            yield _as_problem(task, folder, fault)
            has_faults = True
            continue
        repairs += objects.repairs
        num_boxes += sum(not box.crowd for box in objects.boxes) + len(objects.faults)
        for fault in [*objects.faults, *_class_faults(task, layout, source, objects)]:
            yield _as_problem(task, folder, fault)
    if images and is_labelled and not num_boxes and not has_faults:
        beside = ", ".join(path.name for path in visible(split_folder(folder, name)))
        got = "no image with an object" + (f" (the folder holds {beside})" if beside else "")
        allowed = f"objects in {layout.objects.format(split=name)}: without any, mAP is undefined"
        yield Problem(task.name, f"dataset {name}", got, allowed)
    yield from _image_problems(task, folder, images, dict(split.samples) if is_labelled else None)


def _class_faults(task: Task, layout: Layout, source: Source, objects: Objects) -> Iterator[Fault]:
    """Objects of a class for which the model has no output."""
    outputs = num_outputs(task)
    num_classes = math.inf if outputs is None else outputs - task.background_class
    for box in objects.boxes:
        if not 0 <= box.class_id < num_classes:
            named = 0 <= box.class_id < len(layout.class_names)
            got = f"class id {box.class_id}{f' ({layout.class_names[box.class_id]})' if named else ''}"
            allowed = "class ids from 0" if outputs is None else f"class ids 0 to {num_classes - 1}"
            assert source.file is not None, "objects come from a file"
            yield Fault(source.file, box.place, got, f"{allowed}, the classes of the model")


# ---- transforms and model ---------------------------------------------------------------------------------


def _dry_run(task: Task, folder: Path, layout: Layout | None) -> tuple[list[Problem], int | None]:
    """Tries transforms and model: their problems, and the number of outputs if the task is a classification."""
    problems: list[Problem] = []
    allowed = SAMPLE_CONTRACT[task.kind == CLASSIFICATION]
    first = {}
    for split in ("train", "val"):
        dataset = open_split(task, folder, split, layout=layout)
        try:
            samples = [dataset[index][0] for index in _samples_to_try(dataset)]
        except RuntimeError as error:
            problems.append(Problem(task.name, f"transforms {split}", _message(error.__cause__ or error), allowed))
            continue
        shapes = {str(list(image.shape)) for image in samples}
        if task.kind == CLASSIFICATION and len(shapes) > 1:
            got = f"images of {' and '.join(sorted(shapes))}"
            problems.append(Problem(task.name, f"transforms {split}", got, "one size for all images of a batch"))
        first[split] = samples[0]
        problems += _marked_box_problems(task, dataset, split)
    if problems:
        return problems, None
    tried = [_forward(task, image, split) for split, image in first.items()]
    return [problem for problem, _ in tried if problem][:1], tried[-1][1]  # one: both mostly fail for the same reason


def _other_colours(task: Task, folder: Path, layout: Layout | None) -> Counter:
    """What is to be said of a train transform that gives colours other values than the val transform does."""
    dataset = open_split(task, folder, "train", layout=layout)
    size = header_size(dataset.samples[0][0], dataset.turned)
    if size is None or task.train_transform is task.val_transform:
        return Counter()
    said = other_colours(task.train_transform, task.val_transform, size, dataset.has_targets)
    return Counter({said: len(dataset)} if said else {})


def _marked_box_problems(task: Task, dataset: FolderDataset, split: str) -> Iterator[Problem]:
    """A transform that moves the objects of an image and not their boxes, or the other way round."""
    size = header_size(dataset.samples[0][0], dataset.turned)
    if task.kind == CLASSIFICATION or size is None or not dataset.moves_boxes:
        return
    if (got := misplaced(dataset.transform, size, dataset.first_label)) is not None:
        allowed = "a transform of (image, target) that moves the boxes with the image, as XYXY in pixels of its result"
        yield Problem(task.name, f"transforms {split}", got, allowed)


def _samples_to_try(dataset: FolderDataset) -> list[int]:
    """For a detector an image with objects and one without; for a classifier the widest and the tallest image."""
    indices = _evenly_spread(range(len(dataset)), MAX_DECODED)
    if isinstance(dataset.samples[0][1], int):
        aspects: dict[int, float] = {}
        for index in indices:
            with Image.open(dataset.samples[index][0]) as image:  # reads the header only
                aspects[index] = image.width / image.height
        return list(dict.fromkeys([min(aspects, key=aspects.__getitem__), max(aspects, key=aspects.__getitem__)]))
    objects = (bool(source.read().boxes) for _, source in dataset.samples)
    found: dict[bool, int] = {}
    for index, has_objects in enumerate(objects):
        found.setdefault(has_objects, index)
        if len(found) == 2:
            break
    return list(found.values())


def _forward(task: Task, image: torch.Tensor, split: str) -> tuple[Problem | None, int | None]:
    """Runs the model on one image in eval mode: the problem, if there is one, and a classifier's number of outputs."""
    is_classifier = task.kind == CLASSIFICATION
    allowed = (
        "a classifier that maps [N, C, H, W] to [N, classes]" if is_classifier else "a detector of [C, H, W] images"
    )
    of = f"for one {split} image {list(image.shape)}"
    image = image.to(device_of(task.model))
    try:
        # Not in inference mode: a tensor that the model caches there, such as a grid, could not be used in training.
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
    """A problem if there are more classes than outputs of the model, or other outputs than the task states."""
    stated = task.reading.num_classes
    problems = []
    if outputs is not None and stated is not None and outputs != stated:
        problems.append(
            Problem(task.name, "num_classes", str(stated), f"{outputs}, the number of outputs of the model")
        )
    outputs = num_outputs(task) if outputs is None else outputs
    if outputs is not None and len(names) > outputs:
        if isinstance(task.reading.class_ids, Mapping):
            beyond = {name: number for name, number in task.reading.class_ids.items() if number >= outputs}
            allowed = f"class ids 0 to {outputs - 1}, as the model has {outputs} outputs"
            return [*problems, Problem(task.name, "class_ids", str(beyond), allowed)]
        got = f"{len(names)} class folders ({', '.join(names[:20])})"
        allowed = f"at most {outputs}, the number of outputs of the model"
        problems.append(Problem(task.name, f"dataset {labelled_split(task)}", got, allowed))
    return problems
