"""Checks the datasets of a workload before anything is trained, and reports all problems at once.

All annotation files are read, and an evenly spread sample of the images. Then one or two samples of train and of val go
through the task's transforms and its model.
"""

import difflib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from gemel.datasets.folders import (
    FolderDataset,
    class_names,
    classification_samples,
    describe,
    find_dataset,
    labelled_split,
    load_image,
    open_split,
    wrong_size,
)
from gemel.datasets.layouts import open_layout
from gemel.datasets.records import IMAGE_SUFFIXES, Fault, Layout, Objects, Source, Split, visible
from gemel.forward.modes import device_of, evaluation_mode, logits_of
from gemel.workload import CLASSIFICATION, Problem, Task
from model_architectures import num_classes_of

MAX_LISTED = 10  # problems of one kind per task
MAX_DECODED = 32  # images per split
SAMPLE_CONTRACT = {
    True: "image -> float tensor [C, H, W]",
    False: '(image, target) -> (float tensor [C, H, W], {"boxes": XYXY [N, 4], "labels": int64 [N], ...})',
}

log = logging.getLogger(__name__)


def check(tasks: Mapping[str, Task], roots: Sequence[Path]) -> list[Problem]:
    """All problems of the datasets, transforms and class counts of all tasks; [] if there are none.

    roots: the folders that hold datasets; a task's dataset is taken from the first that has it. Raises nothing: an
    exception of a user's transform or model is a problem. Models keep their modes. Repairs, such as clipping a box that
    exceeds its image by rounding, are counted and logged as warnings.
    """
    return [problem for task in tasks.values() for problem in _capped(_task_problems(task, roots))]


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


def _task_problems(task: Task, roots: Sequence[Path]) -> list[Problem]:
    """The problems of one task; transforms and model are tried only if its files have none."""
    folder = find_dataset(task, roots)
    if folder is None:
        return [_missing_dataset(task, roots)]
    layout = None if task.kind == CLASSIFICATION else open_layout(task, folder)
    if layout is None:
        problems = [p for split in _splits(folder) for p in _classification_problems(task, folder, split)]
    else:
        problems = _detection_problems(task, folder, layout)
    outputs = None
    if not problems:
        problems, outputs = _dry_run(task, folder, layout)
    if task.kind == CLASSIFICATION:
        outputs = num_classes_of(task.model) if outputs is None else outputs
        problems += _class_count(task, class_names(folder, labelled_split(task)), outputs)
    return problems


def _splits(folder: Path) -> list[str]:
    return ["train", "val", "test"] if (folder / "test").is_dir() else ["train", "val"]


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


def _classification_problems(task: Task, folder: Path, split: str) -> Iterator[Problem]:
    names = class_names(folder, labelled_split(task))
    images = [path for path, _ in classification_samples(task, folder, split)]
    has_labels = task.labels or split != "train"
    yield from _count_problems(task, folder, split, images, f"{split}/<class>/*.jpg" if has_labels else "train/*.jpg")
    for path in visible(folder / split):
        if has_labels and path.is_dir() and path.name not in names and names:
            allowed = f"the class folders of {labelled_split(task)}: {', '.join(names)}"
            yield Problem(task.name, f"dataset {split}", f"a class folder {path.name!r}", allowed)
    yield from _image_problems(task, folder, images)


def _count_problems(task: Task, folder: Path, split: str, images: Sequence[Path], pattern: str) -> Iterator[Problem]:
    needed = 2 if split == "train" else 1
    if len(images) >= needed:
        return
    in_folder = pattern.startswith(f"{split}/")
    beside = ", ".join(path.name for path in visible(folder / split)[:5]) if in_folder and not images else ""
    got = f"{len(images) or 'no'} image{'s' * (len(images) != 1)}"
    got = "no such folder" if in_folder and not (folder / split).is_dir() else got
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
        error = _file_error(path) or (_decode_error(path) if path in sample else None)
        if error:
            yield _as_problem(task, folder, Fault(path, "", error, allowed))
        elif path in sample and sources and (wrong := _wrong_size(path, sources[path])):
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


def _decode_error(path: Path) -> str | None:
    try:
        load_image(path)
    except Exception as error:  # Pillow's decoders raise many types on broken files
        return _message(error)
    return None


def _wrong_size(path: Path, source: Source) -> str | None:
    try:
        objects = source.read()
    except OSError:
        return None
    return wrong_size(load_image(path), objects) if objects.size else None


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# ---- annotations ------------------------------------------------------------------------------------------


def _detection_problems(task: Task, folder: Path, layout: Layout) -> list[Problem]:
    """The problems of all splits; missing images and objects are reported only if nothing else could explain them."""
    splits = {name: open_them() for name, open_them in layout.splits.items()}
    faults = [*layout.faults, *(fault for split in splits.values() for fault in split.faults)]
    problems = [_as_problem(task, folder, fault) for fault in faults]
    repairs = Counter(layout.repairs)
    for name, split in splits.items():
        problems += _split_problems(task, folder, layout, name, split, bool(faults), repairs)
    for repair, count in (+repairs).items():
        log.warning("%s: dataset: %d times: %s", task.name, count, repair)
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
    repairs += split.repairs
    num_boxes = 0
    is_labelled = task.labels or name != "train"
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
        beside = ", ".join(path.name for path in visible(folder / name))
        got = "no image with an object" + (f" (the folder holds {beside})" if beside else "")
        allowed = f"objects in {layout.objects.format(split=name)}: without any, mAP is undefined"
        yield Problem(task.name, f"dataset {name}", got, allowed)
    yield from _image_problems(task, folder, images, dict(split.samples) if is_labelled else None)


def _class_faults(task: Task, layout: Layout, source: Source, objects: Objects) -> Iterator[Fault]:
    """Objects of a class for which the model has no output."""
    outputs = num_classes_of(task.model)
    if outputs is None:
        return
    num_classes = outputs - task.background_class
    for box in objects.boxes:
        if not 0 <= box.class_id < num_classes:
            named = 0 <= box.class_id < len(layout.class_names)
            got = f"class id {box.class_id}{f' ({layout.class_names[box.class_id]})' if named else ''}"
            assert source.file is not None, "objects come from a file"
            yield Fault(source.file, box.place, got, f"class ids 0 to {num_classes - 1}, the classes of the model")


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
    if problems:
        return problems, None
    tried = [_forward(task, image, split) for split, image in first.items()]
    return [problem for problem, _ in tried if problem][:1], tried[-1][1]  # one: both mostly fail for the same reason


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
    """A problem if there are more class folders than outputs of the model."""
    if outputs is None or len(names) <= outputs:
        return []
    got = f"{len(names)} class folders ({', '.join(names[:20])})"
    return [
        Problem(
            task.name, f"dataset {labelled_split(task)}", got, f"at most {outputs}, the number of outputs of the model"
        )
    ]
