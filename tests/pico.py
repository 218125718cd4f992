"""Pico models and datasets: the same code paths as real ones, in milliseconds."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.ops import box_iou

from eval_methods import classification_eval, frcnn_eval

SIZE = 16
CPU = torch.device("cpu")
COLOURS = [(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)]


class PicoNet(nn.Module):
    """Two (or more) convolutions, a norm, a linear layer."""

    def __init__(self, num_classes: int = 3, extra: int = 0, width: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.more = nn.Sequential(*[nn.Conv2d(width, width, 3, padding=1) for _ in range(extra)])
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images):
        features = F.relu(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        return self.fc(self.more(features).mean((2, 3)))


class Mixed(PicoNet):
    """Besides layers that can be fitted an attention, whose parameters are read without calling it, and a lone one."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, images):
        features = self.conv2(torch.relu(self.bn1(self.conv1(images)))).mean((2, 3))
        return self.fc(self.attention(features, features, features)[0])


class PicoDetector(nn.Module):
    """Two anchors, the left and the right half of the image, each with scores and a box; class 0 is background."""

    def __init__(self, num_classes: int = 3, width: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.scores = nn.Linear(width, num_classes)
        self.offsets = nn.Linear(width, 4)
        self.num_classes = num_classes

    def forward(self, images, targets=None):
        features = F.relu(self.conv2(F.relu(self.bn1(self.conv1(torch.stack(list(images)))))))
        halves = torch.stack([half.mean((2, 3)) for half in features.chunk(2, dim=3)], 1)
        scores, offsets = self.scores(halves), self.offsets(halves)
        size = images[0].shape[-1]
        anchors = torch.tensor([[0, 0, size / 2, size], [size / 2, 0, size, size]], device=features.device)
        if self.training:
            return self._losses(anchors, scores, offsets, targets)
        boxes, best = anchors + offsets, scores.softmax(-1)[..., 1:].max(-1)
        return [
            {"boxes": b, "scores": s, "labels": label + 1}
            for b, s, label in zip(boxes, best.values, best.indices, strict=True)
        ]

    def _losses(self, anchors, scores, offsets, targets):
        labels = torch.zeros(scores.shape[:2], dtype=torch.int64, device=scores.device)
        box_loss = offsets.sum() * 0
        for i, target in enumerate(targets):
            for box, label in zip(target["boxes"].as_subclass(torch.Tensor), target["labels"], strict=True):
                anchor = int(box_iou(box[None], anchors).argmax())
                labels[i, anchor] = label
                box_loss = box_loss + F.smooth_l1_loss(anchors[anchor] + offsets[i, anchor], box)
        return {
            "classification": F.cross_entropy(scores.flatten(0, 1), labels.flatten()),
            "boxes": box_loss / len(targets),
        }


def to_tensor(image, target=None):
    """Either kind's transform: PIL image -> float tensor, quicker on pico images than torchvision's."""
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return tensor if target is None else (tensor, target)


def classification_entry(model: nn.Module, unmerged_acc: float = 1.0, **more) -> dict:
    return {
        "model": model,
        "task": "image_classification",
        "eval_method": classification_eval,
        "transforms": {"train": to_tensor, "val": to_tensor},
        "unmerged_acc": unmerged_acc,
        **more,
    }


def detection_entry(model: nn.Module, unmerged_acc: float = 0.5, **more) -> dict:
    entry = classification_entry(model, unmerged_acc, **more)
    return {**entry, "task": "object detection", "eval_method": frcnn_eval}


def write_classification(
    root: Path, name: str, classes: int = 3, images: int = 8, seed: int = 0, splits=("train", "val")
):
    """Noisy images whose mean colour tells the class."""
    generator = torch.Generator().manual_seed(seed)
    for split in splits:
        for label in range(classes):
            folder = root / name / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(images):
                noise = torch.randint(-60, 61, (SIZE, SIZE, 3), generator=generator)
                pixels = (noise + torch.tensor(COLOURS[label])).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root / name


def write_detection(root: Path, name: str, classes: int = 2, images: int = 18, seed: int = 0, splits=("train", "val")):
    """One coloured rectangle in the left or right half of each image; every sixth image is empty."""
    generator = torch.Generator().manual_seed(seed)
    for split in splits:
        for part in ("images", "annotations"):
            (root / name / split / part).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            pixels = torch.randint(90, 130, (SIZE, SIZE, 3), generator=generator).to(torch.uint8)
            label = i % classes
            left = int(torch.randint(0, 2, (1,), generator=generator)) * SIZE // 2 + 1
            if i % 6 != 5:
                pixels[2 : SIZE - 2, left : left + 6] = torch.tensor(COLOURS[label], dtype=torch.uint8)
                line = f"{label} {(left + 3) / SIZE} 0.5 {6 / SIZE} {(SIZE - 4) / SIZE}\n"
                (root / name / split / "annotations" / f"frame{i}.txt").write_text(line)
            Image.fromarray(pixels.numpy()).save(root / name / split / "images" / f"frame{i}.png")
    return root / name


def fit(model: nn.Module, loader, steps: int, lr: float = 0.01) -> nn.Module:
    """A plain training loop for classifiers and detectors, from the loader of a task."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for _, (images, targets) in zip(range(steps), _forever(loader), strict=False):
        if torch.is_tensor(images):
            loss = F.cross_entropy(model(images), targets)
        else:
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _forever(loader):
    while True:
        yield from loader


def boxes(*rows, size: int = SIZE):
    return tv_tensors.BoundingBoxes(torch.tensor(rows).reshape(-1, 4), format="XYXY", canvas_size=(size, size))


def merger_of(tasks, data, results_path, **options):
    """A Merger over the tasks, on the CPU; options: as merge_workload takes them. Nothing is measured or written."""
    from gemel.environment.clock import Clock
    from gemel.options import read_options
    from merger import Merger

    chosen, problems = read_options(options)
    assert not problems, problems
    mark = {"options": {}, "tasks": {}}
    return Merger(tasks, data, chosen, torch.device("cpu"), Path(results_path), Clock(), {}, mark)


def thresholds(**changes):
    """The measured thresholds with some of them changed, whatever part they belong to."""
    from gemel.thresholds import THRESHOLDS

    parts = {}
    for name, part in vars(THRESHOLDS).items():
        own = {key: value for key, value in changes.items() if hasattr(part, key)}
        parts[name] = dataclasses.replace(part, **own)
        changes = {key: value for key, value in changes.items() if key not in own}
    assert not changes, f"no thresholds of these names: {', '.join(changes)}"
    return dataclasses.replace(THRESHOLDS, **parts)


def same_state(first: dict, second: dict) -> bool:
    """Whether two state dicts are equal, bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
