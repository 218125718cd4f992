"""Small datasets on disk and tasks for them."""

import random

import numpy as np
import torch
from pico import (
    PicoDetector,
    PicoNet,
    classification_entry,
    detection_entry,
)
from PIL import Image
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.transforms import v2

from dataset_manager import check, open_task
from gemel.workload import read_workload

CPU = torch.device("cpu")
TO_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def task_of(name, entry, **transforms):
    if transforms:
        entry = {**entry, "transforms": {**entry["transforms"], **transforms}}
    tasks, problems = read_workload({name: entry})
    assert not problems
    return tasks[name]


def classifier_task(name="cars_pico", **transforms):
    return task_of(name, classification_entry(PicoNet()), **transforms)


def detector_task(name="cars_pico", background_class=True, **transforms):
    return task_of(name, detection_entry(PicoDetector(), background_class=background_class), **transforms)


def opened(task, root, batch_size=4, seed=0, **more):
    return open_task(task, [root], device=CPU, seed=seed, batch_size=batch_size, **more)


def save_image(path, colour=0, size=(20, 10), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, colour, colour)).save(path, **more)


def write_detection_split(split, annotations, size=(20, 10)):
    """annotations: stem -> text, or None for an image without a file."""
    for number, (stem, text) in enumerate(annotations.items()):
        save_image(split / "images" / f"{stem}.png", number, size)
        (split / "annotations").mkdir(exist_ok=True)
        if text is not None:
            (split / "annotations" / f"{stem}.txt").write_text(text)


def random_transform(image):
    """Draws from every global generator."""
    return torch.tensor([torch.rand(()), random.random(), np.random.rand()], dtype=torch.float32).reshape(3, 1, 1)


def lines_of(root, entry, name="cars_pico", **transforms):
    entry = {**entry, "transforms": {**entry["transforms"], **transforms}}
    tasks, problems = read_workload({name: entry})
    assert not problems
    return [str(problem) for problem in check(tasks, [root])]


def classifier_lines(folder, model=None, **transforms):
    return lines_of(folder.parent, classification_entry(model or PicoNet(3)), **transforms)


def detector_lines(folder, model=None, background_class=True, **transforms):
    entry = detection_entry(model or PicoDetector(), background_class=background_class)
    return lines_of(folder.parent, entry, **transforms)


def tiny_fcos(num_classes):
    backbone = nn.Conv2d(3, 32, 8, stride=8)
    backbone.out_channels = 32
    anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    return FCOS(backbone, num_classes, anchor_generator=anchors, min_size=64, max_size=64)
