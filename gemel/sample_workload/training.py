"""Trains the models of the embedded default with a short plain training, and measures their accuracy."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from tqdm import tqdm

from gemel.environment.seeds import seeded
from gemel.sample_workload.artifacts import SEED, is_current, recipe_digest, replacement_of
from gemel.sample_workload.datasets import dataset_folders
from gemel.sample_workload.tasks import (
    FRAME_SIZE,
    TASKS,
    Plan,
    SampleTask,
    new_model,
    stamp_path,
    task_named,
    weights_path,
)
from gemel.workload import CLASSIFICATION, DETECTION

BATCH_SIZES = {CLASSIFICATION: 32, DETECTION: 4}
MAX_GRADIENT = 5.0  # norm
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as in transforms.py

Samples = tuple[Tensor, list[Tensor], list[Tensor]]  # uint8 images [N, 3, H, W]; labels and boxes per image


class Methods(NamedTuple):
    """How tasks of one kind are evaluated, as in their dictionary entries."""

    eval_method: Callable[[nn.Module, Any], float]
    transform: Callable  # of val


def is_trained(root: Path, name: str, plan: Plan) -> bool:
    """Whether the weights of a task are complete and were trained by this plan."""
    return weights_path(name, root).is_file() and is_current(stamp_path(name, root), plan)


def train(root: Path, name: str, plan: Plan, methods: Mapping[str, Methods], position: int = 0) -> None:
    """Trains a task from its trained ancestor, measures it on val, and writes first the weights, then the accuracy.

    An ancestor is not measured: it is no task. position: line of the progress bar.
    """
    task = task_named(name)
    with seeded(SEED, "train", name):
        model = new_model(name)
        if task.parent:
            _inherit(model, torch.load(weights_path(task.parent, root), weights_only=True))
        epochs = max(1, round(task.epochs * plan.epochs))
        model.to(memory_format=torch.channels_last)  # a fifth quicker
        _fit(model, name, _samples(root, task, "train"), epochs, position)
        model.to(memory_format=torch.contiguous_format)
    stamp: dict[str, Any] = {"recipe": recipe_digest(plan)}
    if name in TASKS:
        own = methods[task.kind]
        stamp["unmerged_acc"] = own.eval_method(model, _val_loader(task, own.transform, _samples(root, task, "val")))
    with replacement_of(weights_path(name, root)) as unfinished, unfinished.open("wb") as file:
        torch.save(model.state_dict(), file)  # a path would be stored in the file
    with replacement_of(stamp_path(name, root)) as unfinished:
        unfinished.write_text(json.dumps(stamp, indent=1))


def _inherit(model: nn.Module, ancestor: dict[str, Tensor]) -> None:
    """Copies the weights of an ancestor classifier or detector, without output layers, into the model."""
    own = model.state_dict()
    for key, value in ancestor.items():
        for name in (key, f"backbone.body.{key}"):
            if name in own and own[name].shape == value.shape and not name.startswith("fc."):
                own[name].copy_(value)


def _samples(root: Path, task: SampleTask, split: str) -> Samples:
    """All decoded images of one split, of all cameras of the task."""
    read = _read_crops if task.kind == CLASSIFICATION else _read_frames
    cameras = [dataset_folders(root, camera) for camera in task.cameras]
    folders = [folder for camera in cameras for folder, other in camera.items() if other.kind == task.kind]
    samples = [sample for folder in folders for sample in read(folder / split, task.classes)]
    images, labels, boxes = zip(*samples, strict=True)
    return torch.stack(images), list(labels), list(boxes)


def _read_crops(split: Path, classes: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(image, label, no boxes) of every crop."""
    for path in sorted(split.glob("*/*.jpg")):
        yield _read_image(path), torch.tensor(classes.index(path.parent.name)), torch.empty(0, 4)


def _read_frames(split: Path, classes: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(image, labels, boxes XYXY in pixels) of every frame."""
    for path in sorted(split.glob("images/*.jpg")):
        text = (split / "annotations" / f"{path.stem}.txt").read_text()
        rows = torch.tensor([[float(word) for word in line.split()] for line in text.splitlines()]).reshape(-1, 5)
        corners = torch.cat([rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2], 1).clamp(0, 1)
        yield _read_image(path), rows[:, 0].long() + 1, corners * FRAME_SIZE


def _read_image(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _val_loader(task: SampleTask, transform: Callable, samples: Samples, batch_size: int = 32) -> list[tuple]:
    """The batches that a data loader would yield, with the val transform of the task."""
    batches: list[tuple] = []
    for images, labels, boxes in _batches(samples, torch.arange(len(samples[0])), batch_size):
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        if task.kind == CLASSIFICATION:
            batches.append((torch.stack([transform(picture) for picture in pictures]), torch.stack(labels)))
        else:
            pairs = [transform(p, t) for p, t in zip(pictures, _targets(labels, boxes), strict=True)]
            batches.append(([image for image, _ in pairs], [target for _, target in pairs]))
    return batches


def _targets(labels: list[Tensor], boxes: list[Tensor]) -> list[dict]:
    """Detection targets as the project's datasets have them."""
    size = (FRAME_SIZE, FRAME_SIZE)
    return [
        {"boxes": tv_tensors.BoundingBoxes(b, format="XYXY", canvas_size=size), "labels": lab, "image_id": number}
        for number, (lab, b) in enumerate(zip(labels, boxes, strict=True))
    ]


def _batches(samples: Samples, order: Tensor, batch_size: int) -> Iterator[Samples]:
    images, labels, boxes = samples
    for indices in order.split(batch_size):
        yield images[indices], [labels[i] for i in indices], [boxes[i] for i in indices]


def _fit(model: nn.Module, name: str, samples: Samples, epochs: int, position: int) -> None:
    """Trains with AdamW and a one-cycle schedule of the learning rate; a last smaller batch is left out."""
    task = task_named(name)
    loss_of = _classifier_loss if task.kind == CLASSIFICATION else _detector_loss
    num_samples, batch_size = len(samples[0]), BATCH_SIZES[task.kind]
    num_batches = max(1, num_samples // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), task.learning_rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.learning_rate, total_steps=epochs * num_batches)
    model.train()
    for _ in tqdm(range(epochs), f"training {name}", leave=False, position=position):
        order = torch.randperm(num_samples)[: num_batches * batch_size]
        for images, labels, boxes in _batches(samples, order, batch_size):
            optimizer.zero_grad()
            loss_of(model, _augmented(images), labels, boxes).backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
            optimizer.step()
            schedule.step()


def _augmented(images: Tensor) -> Tensor:
    """Float images in [0, 1] with random brightness and contrast."""
    gain = torch.empty(len(images), 3, 1, 1).uniform_(0.8, 1.2)
    return (images / 255 * gain + torch.empty(len(images), 1, 1, 1).uniform_(-0.08, 0.08)).clamp(0, 1)


def _classifier_loss(model: nn.Module, images: Tensor, labels: list[Tensor], boxes: list[Tensor]) -> Tensor:
    """Cross-entropy after a random flip, zoom and shift of every image."""
    number = len(images)
    zoom = torch.empty(number, 1, 1).uniform_(0.8, 1.1)
    mirrored = zoom * torch.where(torch.rand(number, 1, 1) < 0.5, -1, 1)
    shift = torch.empty(number, 2, 1).uniform_(-0.15, 0.15)
    straight = torch.zeros(number, 1, 1)
    rows = [torch.cat([mirrored, straight], 2), torch.cat([straight, zoom], 2)]
    grid = nn.functional.affine_grid(torch.cat([torch.cat(rows, 1), shift], 2), list(images.shape), align_corners=False)
    images = nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return nn.functional.cross_entropy(model((images - mean) / std), torch.stack(labels))


def _detector_loss(model: nn.Module, images: Tensor, labels: list[Tensor], boxes: list[Tensor]) -> Tensor:
    """The sum of the detector's losses after a random flip."""
    if torch.rand(()) < 0.5:
        images = images.flip(-1)
        boxes = [torch.stack([FRAME_SIZE - b[:, 2], b[:, 1], FRAME_SIZE - b[:, 0], b[:, 3]], 1) for b in boxes]
    targets = [{"boxes": b, "labels": lab} for lab, b in zip(labels, boxes, strict=True)]
    return sum(model(list(images), targets).values())
