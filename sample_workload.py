"""The embedded default workload: street scenes drawn here, small models trained here, a ready task dictionary.

Two fixed cameras, one by day and one at nightfall; for each a classifier of objects cut out and a detector of traffic.
`prepare()` draws and trains what is missing (about two minutes on two cores, once) below sample_data/:

    datasets/<name>_CL, datasets/<name>_OD      as users' own datasets (README, "Datasets")
    weights/<task>.pt, weights/<task>.json      the trained model, and its accuracy on val

All backbones descend from one ancestor, as in practice they do from ImageNet: a classifier of both cameras' crops, and
a detector of both cameras' frames grown from it. Each task starts there and is then trained on its own camera alone, so
their weights differ but are related, as those of fine-tuned models are.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from tqdm import tqdm

import street_scenes
from environment import derive_seed, seeded
from eval_methods import classification_eval, frcnn_eval
from model_architectures import build, load_weights
from street_scenes import CAMERAS, KINDS
from transforms import IMAGENET_MEAN, IMAGENET_STD, classification_transforms, detection_transforms
from workload import CLASSIFICATION, DATASET_SUFFIX, DETECTION

RECIPE = 1  # raise it when drawing or training changes: what was made by another recipe is made again
SEED = 0
SAMPLE_ROOT = Path(__file__).resolve().parent / "sample_data"
DATASETS_ROOT = SAMPLE_ROOT / "datasets"
CROP_SIZE, FRAME_SIZE = 48, 128  # pixels a side
WIDTH = 32  # channels of the first stage, the same in all models
SHALLOW, DEEP = (1, 1, 1, 1), (2, 2, 2, 2)
SPLITS = ("train", "val", "test")


class SampleTask(NamedTuple):
    """One task of the workload, or an ancestor: what it looks at, how it is built, how long it is trained."""

    cameras: tuple[str, ...]
    kind: str
    classes: tuple[str, ...]  # in the order of the class ids
    builder: str
    num_classes: int  # as the builder counts: a detector's includes the background
    kwargs: dict[str, Any]
    epochs: int
    learning_rate: float
    parent: str | None  # the ancestor whose weights it starts from


class Plan(NamedTuple):
    """How much is drawn and trained; the splits are train, val, test."""

    scenes: tuple[int, int, int] = (250, 80, 60)  # per camera, one frame each
    crops: tuple[int, int, int] = (160, 60, 40)  # per camera and class at most, cut out of those scenes
    epochs: float = 1.0  # times those of the task


PLAN = Plan()


def _classifier(cameras: tuple, classes: tuple, layers: tuple, rate: float, parent: str | None) -> SampleTask:
    kwargs = {"layers": layers, "width": WIDTH}
    return SampleTask(cameras, CLASSIFICATION, classes, "slim_resnet", len(classes), kwargs, 8, rate, parent)


def _detector(cameras: tuple, classes: tuple, epochs: int, parent: str) -> SampleTask:
    kwargs = {"backbone": "slim_resnet", "layers": SHALLOW, "width": WIDTH, "out_channels": 64, "min_size": FRAME_SIZE}
    return SampleTask(cameras, DETECTION, classes, "fcos_model", len(classes) + 1, kwargs, epochs, 2e-3, parent)


MAIN, ELM, VEHICLES = ("main_2nd",), ("elm_1st",), ("car", "motorcycle", "truck")
ANCESTORS = {
    "ancestor_resnet18": _classifier(MAIN + ELM, KINDS, DEEP, 2e-3, None),
    "ancestor_fcos": _detector(MAIN + ELM, KINDS, 6, "ancestor_resnet18"),
}
TASKS = {
    "main_2nd_vehicles_resnet10": _classifier(MAIN, VEHICLES, SHALLOW, 1e-3, "ancestor_resnet18"),
    "elm_1st_street_resnet18": _classifier(ELM, KINDS, DEEP, 1e-3, "ancestor_resnet18"),
    "main_2nd_traffic_fcos": _detector(MAIN, KINDS, 8, "ancestor_fcos"),
    "elm_1st_traffic_fcos": _detector(ELM, KINDS, 8, "ancestor_fcos"),
}


def prepare(root: Path = SAMPLE_ROOT, plan: Plan = PLAN) -> None:
    """Draws the datasets and trains the models that are missing below `root`, or were made by another recipe.

    May be interrupted at any time: what is half done has another name and is done again.
    """
    for camera in CAMERAS:
        _draw_camera(Path(root), camera, plan)
    for name in TASKS:
        _train(Path(root), name, plan)


def create_model_dict(root: Path = SAMPLE_ROOT, plan: Plan = PLAN) -> dict[str, dict]:
    """The complete task dictionary, prepared first if need be."""
    prepare(root, plan)
    return {
        name: {
            "model": load_trained(name, root),
            "task": task.kind,
            "eval_method": eval_method(name),
            "transforms": transforms(name),
            "unmerged_acc": unmerged_acc(name, root),
        }
        for name, task in TASKS.items()
    }


def load_trained(name: str, root: Path = SAMPLE_ROOT) -> nn.Module:
    """The trained model of a task that is prepared."""
    return load_weights(_new_model(name), weights_path(name, root))


def weights_path(name: str, root: Path = SAMPLE_ROOT) -> Path:
    """The file with the trained weights of a task, a state dict."""
    return Path(root) / "weights" / f"{name}.pt"


def unmerged_acc(name: str, root: Path = SAMPLE_ROOT) -> float:
    """The accuracy of a task on val, measured by its eval method when it was trained."""
    return json.loads(weights_path(name, root).with_suffix(".json").read_text())["unmerged_acc"]


def transforms(name: str) -> dict[str, Callable]:
    """The train and val transforms of a task."""
    is_classifier = _task(name).kind == CLASSIFICATION
    return classification_transforms(CROP_SIZE) if is_classifier else detection_transforms()


def eval_method(name: str) -> Callable[[nn.Module, Any], float]:
    """The eval method of a task."""
    return classification_eval if _task(name).kind == CLASSIFICATION else frcnn_eval


def _task(name: str) -> SampleTask:
    return {**ANCESTORS, **TASKS}[name]


def _new_model(name: str) -> nn.Module:
    task = _task(name)
    return build(task.builder, task.num_classes, **task.kwargs)


# ---- drawing ------------------------------------------------------------------------------------------------------


def _dataset_folders(root: Path, camera: str) -> dict[str, SampleTask]:
    """The dataset folders for a camera's tasks, below `root`."""
    return {
        root / "datasets" / (name.rsplit("_", 1)[0] + DATASET_SUFFIX[task.kind]): task
        for name, task in TASKS.items()
        if task.cameras == (camera,)
    }


def _draw_camera(root: Path, camera: str, plan: Plan) -> None:
    """Draws the scenes of one camera, and writes the datasets of its tasks from them."""
    folders = _dataset_folders(root, camera)
    if all(_is_made(folder / ".recipe", plan) for folder in folders):
        return
    with contextlib.ExitStack() as stack:
        partial = {stack.enter_context(_replaced(folder)): task for folder, task in folders.items()}
        for split, scenes, crops in zip(SPLITS, plan.scenes, plan.crops, strict=True):
            rng = np.random.default_rng(derive_seed(SEED, "draw", camera, split))
            left = {folder: dict.fromkeys(task.classes, crops) for folder, task in partial.items()}
            for number in tqdm(range(scenes), f"drawing {camera} {split}", leave=False, mininterval=1):
                scene = street_scenes.draw_scene(CAMERAS[camera], rng)
                for folder, task in partial.items():
                    write = _write_crops if task.kind == CLASSIFICATION else _write_frame
                    write(folder / split, f"{number:04}", scene, CAMERAS[camera], task, left[folder], rng)
        for folder in partial:
            (folder / ".recipe").write_text(_recipe(plan))


def _write_frame(split: Path, stem: str, scene: Scene, task: SampleTask, left: dict, rng: np.random.Generator) -> None:
    """One frame and its annotation file, which is empty where there is nothing to see."""
    lines = []
    for thing in scene.things:
        x1, y1, x2, y2 = (edge / CANVAS for edge in thing.box)
        values = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
        lines.append(f"{task.classes.index(thing.kind)} " + " ".join(f"{value:.6f}" for value in values))
    _write(split / "images" / f"{stem}.jpg", frame(scene, FRAME_SIZE, rng))
    _write(split / "annotations" / f"{stem}.txt", "".join(f"{line}\n" for line in lines).encode())


def _write_crops(split: Path, stem: str, scene: Scene, task: SampleTask, left: dict, rng: np.random.Generator) -> None:
    """The objects of a scene that are still wanted, one file each. left: how many more per class; counted down."""
    for number, thing in enumerate(scene.things):
        if left.get(thing.kind, 0) > 0:
            left[thing.kind] -= 1
            _write(split / thing.kind / f"{stem}_{number}.jpg", crop(scene, thing, CROP_SIZE, rng))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """An empty folder with another name, which takes the place of `folder` when the block has ended well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
    partial.chmod(0o755)  # mkdtemp's 0700 would stay
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name, which it then exchanges for its own."""
    with _replaced(path.with_name(f"{path.name}.folder")) as partial:
        write(partial / path.name)
        (partial / path.name).replace(path)


def _recipe(plan: Plan) -> str:
    """What identifies drawings and weights that need not be made again."""
    return hashlib.sha256(repr((RECIPE, SEED, plan, CAMERAS, ANCESTORS, TASKS)).encode()).hexdigest()[:16]


def _is_made(stamp: Path, plan: Plan) -> bool:
    return stamp.is_file() and _recipe(plan) in stamp.read_text()


# ---- training -----------------------------------------------------------------------------------------------------

Samples = tuple[Tensor, list[Tensor], list[Tensor]]  # uint8 images [N, 3, H, W], labels and boxes of each


def _train(root: Path, name: str, plan: Plan) -> None:
    """Trains a task (its ancestors first), measures it on val, and writes weights and accuracy, in this order."""
    weights, stamp = weights_path(name, root), weights_path(name, root).with_suffix(".json")
    if _is_made(stamp, plan) and weights.is_file():
        return
    task = _task(name)
    if task.parent:
        _train(root, task.parent, plan)
    with seeded(SEED, "train", name):
        model = _new_model(name)
        if task.parent:
            _inherit(model, torch.load(weights_path(task.parent, root), weights_only=True))
        _fit(model, name, _samples(root, task, "train"), max(1, round(task.epochs * plan.epochs)))
    accuracy = eval_method(name)(model, _val_loader(name, _samples(root, task, "val")))
    weights.parent.mkdir(parents=True, exist_ok=True)
    _replace_file(weights, lambda partial: torch.save(model.state_dict(), partial))
    record = json.dumps({"recipe": _recipe(plan), "unmerged_acc": accuracy}, indent=1)
    _replace_file(stamp, lambda partial: partial.write_text(record))


def _replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    write(partial)
    partial.replace(path)


def _inherit(model: nn.Module, ancestor: dict[str, Tensor]) -> None:
    """Copies what model and ancestor have in common: a detector's backbone is a classifier without its output layer."""
    own = model.state_dict()
    for key, value in ancestor.items():
        for name in (key, f"backbone.body.{key}"):
            if name in own and own[name].shape == value.shape and not name.startswith("fc."):
                own[name].copy_(value)


def _samples(root: Path, task: SampleTask, split: str) -> Samples:
    """All files of one split, of all the cameras that the task looks at, decoded."""
    images, labels, boxes = [], [], []
    for camera in task.cameras:
        for folder, other in _dataset_folders(root, camera).items():
            if other.kind == task.kind:
                read = _read_crops if task.kind == CLASSIFICATION else _read_frames
                for sample in read(folder / split, task.classes):
                    for column, value in zip((images, labels, boxes), sample, strict=True):
                        column.append(value)
    return torch.stack(images), labels, boxes


def _read_crops(split: Path, classes: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for path in sorted(split.glob("*/*.jpg")):
        yield _read_image(path), torch.tensor(classes.index(path.parent.name)), torch.empty(0, 4)


def _read_frames(split: Path, classes: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for path in sorted(split.glob("images/*.jpg")):
        text = (split / "annotations" / f"{path.stem}.txt").read_text()
        rows = torch.tensor([[float(word) for word in line.split()] for line in text.splitlines()]).reshape(-1, 5)
        corners = torch.cat([rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2], 1).clamp(0, 1)
        yield _read_image(path), rows[:, 0].long() + 1, corners * FRAME_SIZE


def _read_image(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _val_loader(name: str, samples: Samples, batch_size: int = 32) -> list[tuple]:
    """What a data loader would yield: the val transform of the task on every image."""
    transform, batches = transforms(name)["val"], []
    for images, labels, boxes in _batches(samples, torch.arange(len(samples[0])), batch_size):
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        if _task(name).kind == CLASSIFICATION:
            batches.append((torch.stack([transform(picture) for picture in pictures]), torch.stack(labels)))
        else:
            pairs = [transform(p, t) for p, t in zip(pictures, _targets(labels, boxes), strict=True)]
            batches.append(([image for image, _ in pairs], [target for _, target in pairs]))
    return batches


def _targets(labels: list[Tensor], boxes: list[Tensor]) -> list[dict]:
    size = (FRAME_SIZE, FRAME_SIZE)
    return [
        {"boxes": tv_tensors.BoundingBoxes(b, format="XYXY", canvas_size=size), "labels": lab, "image_id": number}
        for number, (lab, b) in enumerate(zip(labels, boxes, strict=True))
    ]


def _batches(samples: Samples, order: Tensor, batch_size: int) -> Iterator[Samples]:
    images, labels, boxes = samples
    for indices in order.split(batch_size):
        yield images[indices], [labels[i] for i in indices], [boxes[i] for i in indices]


def _fit(model: nn.Module, name: str, samples: Samples, epochs: int) -> None:
    """A plain short training: AdamW with one cycle of the learning rate."""
    task = _task(name)
    step_loss = _classifier_loss if task.kind == CLASSIFICATION else _detector_loss
    batch_size = 32 if task.kind == CLASSIFICATION else 4
    batches = len(samples[0]) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), task.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.learning_rate, total_steps=epochs * batches)
    model.train()
    with tqdm(total=epochs * batches, desc=f"training {name}", leave=False, mininterval=1) as progress:
        for _ in range(epochs):
            order = torch.randperm(len(samples[0]))[: batches * batch_size]
            for images, labels, boxes in _batches(samples, order, batch_size):
                loss = step_loss(model, _augmented(images), labels, boxes)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                progress.update()


def _augmented(images: Tensor) -> Tensor:
    """Floats in [0, 1] with brightness and contrast a little off."""
    gain = torch.empty(len(images), 3, 1, 1).uniform_(0.8, 1.2)
    return (images / 255 * gain + torch.empty(len(images), 1, 1, 1).uniform_(-0.08, 0.08)).clamp(0, 1)


def _classifier_loss(model: nn.Module, images: Tensor, labels: list[Tensor], boxes: list[Tensor]) -> Tensor:
    if torch.rand(()) < 0.5:
        images = images.flip(-1)
    top, left = torch.randint(0, 9, (2,)).tolist()
    images = nn.functional.pad(images, (4, 4, 4, 4), "reflect")[..., top : top + CROP_SIZE, left : left + CROP_SIZE]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return nn.functional.cross_entropy(model((images - mean) / std), torch.stack(labels))


def _detector_loss(model: nn.Module, images: Tensor, labels: list[Tensor], boxes: list[Tensor]) -> Tensor:
    if torch.rand(()) < 0.5:
        images = images.flip(-1)
        boxes = [torch.stack([FRAME_SIZE - b[:, 2], b[:, 1], FRAME_SIZE - b[:, 0], b[:, 3]], 1) for b in boxes]
    targets = [{"boxes": b, "labels": lab} for lab, b in zip(labels, boxes, strict=True)]
    return sum(model(list(images), targets).values())
