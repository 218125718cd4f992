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
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from tqdm import tqdm

from environment import derive_seed, seeded
from eval_methods import classification_eval, frcnn_eval
from model_architectures import build, load_weights
from street_scenes import CAMERAS, KINDS, Crops, Frames, write_scenes
from transforms import IMAGENET_MEAN, IMAGENET_STD, classification_transforms, detection_transforms
from workload import CLASSIFICATION, DATASET_SUFFIX, DETECTION

RECIPE = 1  # raise it when drawing or training changes: what was made by another recipe is made again
SEED = 0
SAMPLE_ROOT = Path(__file__).resolve().parent / "sample_data"
DATASETS_ROOT = SAMPLE_ROOT / "datasets"
CROP_SIZE, FRAME_SIZE = 48, 128  # pixels a side
WIDTH = 32  # channels of the first stage, the same in all models
SHALLOW, DEEP = (1, 1, 1, 1), (2, 2, 2, 2)
BATCH_SIZES = {CLASSIFICATION: 32, DETECTION: 4}
MAX_GRADIENT = 5.0  # norm
RECIPE_FILE = ".recipe"  # in a dataset folder; hidden, so no split
SPLITS = ("train", "val", "test")
PARTIAL, PARTIAL_SECONDS = ".partial-", 24 * 3600.0  # names of what is being written; when nobody can be writing it

log = logging.getLogger(__name__)


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
    "ancestor_fcos": _detector(MAIN + ELM, KINDS, 5, "ancestor_resnet18"),
}
TASKS = {
    "main_2nd_vehicles_resnet10": _classifier(MAIN, VEHICLES, SHALLOW, 1e-3, "ancestor_resnet18"),
    "elm_1st_street_resnet18": _classifier(ELM, KINDS, DEEP, 1e-3, "ancestor_resnet18"),
    "main_2nd_traffic_fcos": _detector(MAIN, KINDS, 9, "ancestor_fcos"),
    "elm_1st_traffic_fcos": _detector(ELM, KINDS, 9, "ancestor_fcos"),
}


def prepare(root: Path = SAMPLE_ROOT, plan: Plan = PLAN, processes: int = 2) -> None:
    """Draws the datasets and trains the models that are missing below `root`, or were made by another recipe.

    May be interrupted at any time: what is half done has another name and is done again. Each of the processes computes
    with one thread: the results do not depend on their number, and threads that wait for one another are many times
    slower on a machine that has other things to do.
    """
    stages = _stages(Path(root), plan)
    if not stages:
        return
    _remove_leftovers(Path(root))
    if processes > 1:
        try:
            _work_in_processes(stages, processes)
            return
        except BrokenProcessPool:  # a script without `if __name__ == "__main__"` cannot start any
            log.warning("the sample workload is prepared in this process alone, which takes longer")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in itertools.chain(*stages):
            job()
    finally:
        torch.set_num_threads(num_threads)


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
    """The accuracy of a task on val, measured by its eval method when it was trained. Prepare it first."""
    return json.loads(_stamp(name, root).read_text())["unmerged_acc"]


def transforms(name: str) -> dict[str, Callable]:
    """The train and val transforms of a task."""
    is_classifier = _task(name).kind == CLASSIFICATION
    return classification_transforms(CROP_SIZE) if is_classifier else detection_transforms()


def eval_method(name: str) -> Callable[[nn.Module, Any], float]:
    """The eval method of a task."""
    return classification_eval if _task(name).kind == CLASSIFICATION else frcnn_eval


def _task(name: str) -> SampleTask:
    known = {**ANCESTORS, **TASKS}
    if name not in known:
        raise ValueError(f"sample workload: got the task {name!r}; allowed: {', '.join(TASKS)}")
    return known[name]


def _new_model(name: str) -> nn.Module:
    task = _task(name)
    return build(task.builder, task.num_classes, **task.kwargs)


# ---- who does what, and when --------------------------------------------------------------------------------------


def _stages(root: Path, plan: Plan) -> list[list[Callable[..., None]]]:
    """What is missing, as jobs; those of one stage do not wait for one another, the longest comes first."""
    cameras = [camera for camera in CAMERAS if not _is_drawn(root, camera, plan)]
    missing = set()
    for name in TASKS:
        while name and not _is_trained(root, name, plan):
            missing.add(name)
            name = _task(name).parent
    generations: dict[int, list[str]] = {}
    for name in filter(missing.__contains__, [*ANCESTORS, *TASKS]):
        generations.setdefault(_generation(name), []).append(name)
    stages = [[partial(_draw_camera, root, camera, plan) for camera in cameras]]
    stages += [[partial(_train, root, name, plan) for name in generations[age]] for age in sorted(generations)]
    return [stage for stage in stages if stage]


def _generation(name: str) -> int:
    parent = _task(name).parent
    return 1 + _generation(parent) if parent else 0


def _work_in_processes(stages: list[list[Callable[..., None]]], processes: int) -> None:
    context = multiprocessing.get_context("spawn")  # a fork may inherit locks that nobody will release
    lock = context.RLock()
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(lock,)) as pool:
        for stage in stages:
            futures = [pool.submit(job, position=number % processes) for number, job in enumerate(stage)]
            for future in futures:
                future.result()


def _start_worker(lock: Any) -> None:
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for jobs for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


# ---- drawing ------------------------------------------------------------------------------------------------------


def _dataset_folders(root: Path, camera: str) -> dict[str, SampleTask]:
    """The dataset folders for a camera's tasks, below `root`."""
    return {
        root / "datasets" / (name.rsplit("_", 1)[0] + DATASET_SUFFIX[task.kind]): task
        for name, task in TASKS.items()
        if task.cameras == (camera,)
    }


def _is_drawn(root: Path, camera: str, plan: Plan) -> bool:
    return all(_is_made(folder / RECIPE_FILE, plan) for folder in _dataset_folders(root, camera))


def _draw_camera(root: Path, camera: str, plan: Plan, position: int = 0) -> None:
    """Draws the scenes of one camera, and writes the datasets of its tasks from them."""
    with contextlib.ExitStack() as stack:
        folders = {stack.enter_context(_replaced(f)): task for f, task in _dataset_folders(root, camera).items()}
        for split, scenes, crops in zip(SPLITS, plan.scenes, plan.crops, strict=True):
            rng = np.random.default_rng(derive_seed(SEED, "draw", camera, split))
            outputs = [_output(folder / split, task, crops) for folder, task in folders.items()]
            numbers = tqdm(range(scenes), f"drawing {camera} {split}", leave=False, position=position)
            write_scenes(CAMERAS[camera], numbers, outputs, rng)
        for folder in folders:
            (folder / RECIPE_FILE).write_text(_recipe(plan))


def _output(folder: Path, task: SampleTask, crops: int) -> Frames | Crops:
    if task.kind == CLASSIFICATION:
        return Crops(folder, task.classes, CROP_SIZE, crops)
    return Frames(folder, task.classes, FRAME_SIZE)


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Another path beside `path`, for a folder or a file, which takes its place when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    _remove(unfinished)
    try:
        yield unfinished
        if path.is_dir():  # a folder cannot be exchanged at once; a missing one is drawn again
            _remove(path)
        unfinished.replace(path)
    finally:
        _remove(unfinished)


def _remove_leftovers(root: Path) -> None:
    """What killed processes have left unfinished; of a younger one the process may be alive."""
    for path in root.glob(f"*/{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):  # alive, and has just finished
            if time.time() - path.stat().st_mtime > PARTIAL_SECONDS:
                _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _stamp(name: str, root: Path) -> Path:
    """Written after the weights: without it they are not finished."""
    return weights_path(name, root).with_suffix(".json")


def _recipe(plan: Plan) -> str:
    """What identifies drawings and weights that need not be made again."""
    return hashlib.sha256(repr((RECIPE, SEED, plan, CAMERAS, ANCESTORS, TASKS)).encode()).hexdigest()[:16]


def _is_made(stamp: Path, plan: Plan) -> bool:
    return stamp.is_file() and _recipe(plan) in stamp.read_text()


# ---- training -----------------------------------------------------------------------------------------------------

Samples = tuple[Tensor, list[Tensor], list[Tensor]]  # uint8 images [N, 3, H, W], labels and boxes of each


def _is_trained(root: Path, name: str, plan: Plan) -> bool:
    return weights_path(name, root).is_file() and _is_made(_stamp(name, root), plan)


def _train(root: Path, name: str, plan: Plan, position: int = 0) -> None:
    """Trains a task, whose ancestor is trained, measures it on val, and writes weights and accuracy, in this order."""
    task = _task(name)
    with seeded(SEED, "train", name):
        model = _new_model(name)
        if task.parent:
            _inherit(model, torch.load(weights_path(task.parent, root), weights_only=True))
        epochs = max(1, round(task.epochs * plan.epochs))
        _fit(model, name, _samples(root, task, "train"), epochs, position)
    accuracy = eval_method(name)(model, _val_loader(name, _samples(root, task, "val")))
    with _replaced(weights_path(name, root)) as unfinished, unfinished.open("wb") as file:
        torch.save(model.state_dict(), file)  # given a path, it would store the path's name in the file
    with _replaced(_stamp(name, root)) as unfinished:
        unfinished.write_text(json.dumps({"recipe": _recipe(plan), "unmerged_acc": accuracy}, indent=1))


def _inherit(model: nn.Module, ancestor: dict[str, Tensor]) -> None:
    """Copies what model and ancestor have in common: a detector's backbone is a classifier without its output layer."""
    own = model.state_dict()
    for key, value in ancestor.items():
        for name in (key, f"backbone.body.{key}"):
            if name in own and own[name].shape == value.shape and not name.startswith("fc."):
                own[name].copy_(value)


def _samples(root: Path, task: SampleTask, split: str) -> Samples:
    """All files of one split, of all the cameras that the task looks at, decoded."""
    read = _read_crops if task.kind == CLASSIFICATION else _read_frames
    cameras = [_dataset_folders(root, camera) for camera in task.cameras]
    folders = [folder for camera in cameras for folder, other in camera.items() if other.kind == task.kind]
    samples = [sample for folder in folders for sample in read(folder / split, task.classes)]
    images, labels, boxes = zip(*samples, strict=True)
    return torch.stack(images), list(labels), list(boxes)


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


def _fit(model: nn.Module, name: str, samples: Samples, epochs: int, position: int) -> None:
    """A plain short training: AdamW with one cycle of the learning rate; a trailing smaller batch is left out."""
    task = _task(name)
    loss_of = _classifier_loss if task.kind == CLASSIFICATION else _detector_loss
    num_samples, batch_size = len(samples[0]), BATCH_SIZES[task.kind]
    num_batches = max(1, num_samples // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), task.learning_rate, weight_decay=0.05)
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
