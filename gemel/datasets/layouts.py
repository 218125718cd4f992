"""Recognises the layout of a detection dataset from its files.

A folder with train/annotations has the layout of yolo.py, whatever else it holds. Otherwise exactly one of a yaml file,
COCO JSON and Pascal VOC XML must be found. A folder with none of them and with train/images has the layout of yolo.py.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gemel.datasets import coco as dataset_coco
from gemel.datasets import ultralytics as dataset_ultralytics
from gemel.datasets import voc as dataset_voc
from gemel.datasets import yolo as dataset_yolo
from gemel.datasets.numbering import Numbering
from gemel.datasets.records import NO_TEST, Fault, Layout, Objects, split_folder, visible
from gemel.workload import Task
from model_architectures import num_classes_of

ALLOWED = (
    "one of: train/{images,annotations} with text files, a data.yaml, COCO JSON (annotations/instances_train*.json or "
    "train/_annotations.coco.json), Pascal VOC XML (Annotations/*.xml with ImageSets/Main, or train/*.xml)"
)


def num_outputs(task: Task) -> int | None:
    """How many outputs the model has, the background counted: as the task states, or as the model shows; else None."""
    return task.reading.num_classes or num_classes_of(task.model)


def open_layout(task: Task, folder: Path) -> Layout:
    """The layout of a detection task's dataset; a layout that is not recognised has a fault and no splits.

    How COCO categories and VOC names are numbered depends on the number of outputs of the task's model and on its
    `class_ids`. A test split without any object is left out: accuracy is undefined there.
    """
    layout = _recognised(task, Path(folder))
    if "test" not in layout.splits:
        return layout
    test = layout.splits["test"]()
    if test.faults or any(objects.boxes or objects.faults for objects in _readable(test.samples)):
        return layout
    splits = {split: read for split, read in layout.splits.items() if split != "test"}
    return replace(layout, splits=splits, repairs=layout.repairs + Counter({NO_TEST.format("an object"): 1}))


def _readable(samples: list) -> Iterator[Objects]:
    """What the sources say; a source that cannot be read is a fault that is reported when the split is checked."""
    for _, source in samples:
        try:
            yield source.read()
        except OSError:
            yield Objects(faults=[Fault(source.file, "", "", "")])


def _recognised(task: Task, folder: Path) -> Layout:
    if dataset_yolo.evidence(folder):
        return _numbered_by_file(task, folder, dataset_yolo.open_layout(folder))
    readers = (dataset_ultralytics, dataset_coco, dataset_voc)
    found = [(reader, what) for reader in readers if (what := reader.evidence(folder))]
    if not found and (split_folder(folder, "train") / "images").is_dir():
        return _numbered_by_file(task, folder, dataset_yolo.open_layout(folder))
    if len(found) != 1:
        holds = ", ".join(path.name for path in visible(folder)[:10]) or "nothing"
        got = " and ".join(f"{reader.NAME} ({what})" for reader, what in found)
        got = got or f"no detection dataset (the folder holds {holds})"
        return Layout("unknown", {}, "", "", faults=[Fault(folder, "", got, ALLOWED)])
    reader = found[0][0]
    if reader is dataset_ultralytics:
        return _numbered_by_file(task, folder, reader.open_layout(folder))
    numbering = Numbering(num_outputs(task), int(task.background_class), task.reading.class_ids)
    open_named = dataset_coco.open_layout if reader is dataset_coco else dataset_voc.open_layout
    return open_named(folder, numbering, task.reading.exif_orientation)


def _numbered_by_file(task: Task, folder: Path, layout: Layout) -> Layout:
    """The layout; with a fault if the task numbers classes which the annotation files number already."""
    if task.reading.class_ids is None:
        return layout
    got = "class_ids, though its annotations state class ids"
    return replace(layout, faults=[*layout.faults, Fault(folder, "", got, "class_ids for COCO, VOC and class folders")])
