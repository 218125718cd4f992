"""Classification datasets: {train,val[,test]}/<class>/ with images at any depth, as torchvision's ImageFolder reads.

Labels are the numbers of the sorted class folders of train, or those that the task's `class_ids` gives.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gemel.datasets.layouts import num_outputs
from gemel.datasets.records import (
    NO_IMAGE,
    NO_TEST,
    NOT_DATA,
    Fault,
    files_below,
    image_files,
    is_image,
    names_by_id,
    passed_over,
    split_folder,
    visible,
)
from gemel.workload import Task

NO_LABEL = -1  # of train images without labels
EMPTY_CLASS = "the class {} has no image in {}"
ONLY_ELSEWHERE = "the class {} has a folder in {} alone, and counts among the classes, as the model has {} outputs"


class ClassSplit(NamedTuple):
    """The images of one split with their labels, what is wrong with it, and what of it was passed over."""

    samples: list[tuple[Path, int]]
    faults: list[Fault]
    repairs: Counter


def labelled_split(task: Task) -> str:
    """The split whose class folders define the classes of a classification task."""
    return "train" if task.labels else "val"


def class_labels(task: Task, folder: Path) -> dict[str, int]:
    """Class folder -> label, the same for all splits.

    Folders of the other splits count where all of them together are as many as the outputs of the model: ImageFolder
    then numbered them so when the model was trained on all images.
    """
    if isinstance(task.reading.class_ids, Mapping):
        return dict(task.reading.class_ids)
    names = _class_folders(split_folder(folder, labelled_split(task)))
    every = {name for split in ("train", "val", "test") for name in _class_folders(split_folder(folder, split))}
    if task.labels and len(every) > len(names) and len(every) == num_outputs(task):
        names = sorted(every)
    return {name: label for label, name in enumerate(names)}


def class_names(task: Task, folder: Path) -> list[str]:
    """The class names by label."""
    return names_by_id(class_labels(task, folder))


def read_split(task: Task, folder: Path, split: str) -> ClassSplit:
    """The samples of one split; train images without labels may lie in any folder below train and get NO_LABEL."""
    place = split_folder(folder, split)
    if split == "train" and not task.labels:
        images, others = files_below(place)
        return ClassSplit([(path, NO_LABEL) for path in images], [], passed_over(others, NO_IMAGE))
    labels = class_labels(task, folder)
    found = ClassSplit([], list(_unknown_folders(task, folder, split, labels)), Counter())
    for name, label in sorted(labels.items(), key=lambda item: item[1]):
        images, others = files_below(place / name)
        found.samples.extend((path, label) for path in images)
        found.repairs.update(passed_over(others, NO_IMAGE))
        if not images and split != "test":
            found.repairs[EMPTY_CLASS.format(name, place.name)] += 1
    found.repairs.update(passed_over(image_files(place), "as it lies in no class folder"))
    others = [path for path in visible(place) if path.is_file() and not is_image(path)]
    found.repairs.update(passed_over(others, NO_IMAGE))
    found.repairs.update(_elsewhere(task, folder, split, labels))
    return found


def has_test(task: Task, folder: Path) -> bool:
    """Whether there is a test split: a folder test with an image of some class."""
    place = split_folder(folder, "test")
    names = class_labels(task, folder)
    return any(files_below(place / name)[0] for name in names)


def left_out_test(task: Task, folder: Path) -> Counter:
    """What is to be said of a folder test that is no test split."""
    left_out = split_folder(folder, "test").is_dir() and not has_test(task, folder)
    return Counter({NO_TEST.format("a label"): 1} if left_out else {})


def _class_folders(split: Path) -> list[str]:
    return [path.name for path in visible(split) if path.is_dir() and path.name != NOT_DATA]


def _unknown_folders(task: Task, folder: Path, split: str, labels: Mapping[str, int]) -> Iterator[Fault]:
    """A fault for each class folder that the split has alone, which has no label."""
    place = split_folder(folder, split)
    of = "of class_ids" if isinstance(task.reading.class_ids, Mapping) else f"of {labelled_split(task)}"
    allowed = f"the class folders {of}: {', '.join(labels)}"
    if of == "of train" and (every := num_outputs(task)) is not None:
        allowed += f" (the model has {every} outputs)"
    elif of == "of train":
        allowed += " (or num_classes or class_ids, from which the labels of all classes follow)"
    for name in _class_folders(place) if labels else ():
        if name not in labels:
            yield Fault(place, "", f"a class folder {name!r}", allowed)


def _elsewhere(task: Task, folder: Path, split: str, labels: Mapping[str, int]) -> Counter:
    """The classes that only this split has; said where train, which lacks them, is not."""
    own: Sequence[str] = _class_folders(split_folder(folder, labelled_split(task)))
    here = set(_class_folders(split_folder(folder, split)))
    lacking = [name for name in labels if name in here and name not in own]
    if isinstance(task.reading.class_ids, Mapping) or split == labelled_split(task):
        return Counter()
    return Counter({ONLY_ELSEWHERE.format(name, split, num_outputs(task)): 1 for name in lacking})
