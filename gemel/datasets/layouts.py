"""Recognises the layout of a detection dataset from its files.

A folder with train/annotations has the layout of yolo.py, whatever else it holds. Otherwise exactly one of a yaml file,
COCO JSON and Pascal VOC XML must be found. A folder with none of them and with train/images has the layout of yolo.py.
"""

from pathlib import Path

from gemel.datasets import coco as dataset_coco
from gemel.datasets import ultralytics as dataset_ultralytics
from gemel.datasets import voc as dataset_voc
from gemel.datasets import yolo as dataset_yolo
from gemel.datasets.records import Fault, Layout, visible
from gemel.workload import Task
from model_architectures import num_classes_of

ALLOWED = (
    "one of: train/{images,annotations} with text files, a data.yaml, COCO JSON (annotations/instances_train*.json or "
    "train/_annotations.coco.json), Pascal VOC XML (Annotations/*.xml with ImageSets/Main, or train/*.xml)"
)


def open_layout(task: Task, folder: Path) -> Layout:
    """The layout of a detection task's dataset; a layout that is not recognised has a fault and no splits.

    The labels of COCO categories depend on the number of outputs of the task's model.
    """
    folder = Path(folder)
    if dataset_yolo.evidence(folder):
        return dataset_yolo.open_layout(folder)
    readers = (dataset_ultralytics, dataset_coco, dataset_voc)
    found = [(reader, what) for reader in readers if (what := reader.evidence(folder))]
    if not found and (folder / "train" / "images").is_dir():
        return dataset_yolo.open_layout(folder)
    if len(found) != 1:
        holds = ", ".join(path.name for path in visible(folder)[:10]) or "nothing"
        got = " and ".join(f"{reader.NAME} ({what})" for reader, what in found)
        got = got or f"no detection dataset (the folder holds {holds})"
        return Layout("unknown", {}, "", "", faults=[Fault(folder, "", got, ALLOWED)])
    reader = found[0][0]
    if reader is dataset_coco:
        return reader.open_layout(folder, num_classes_of(task.model), int(task.background_class))
    return reader.open_layout(folder)
