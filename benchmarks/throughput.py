"""What a joint training step costs beside plain ones: prints one line a ratio, each the median of alternated pairs.

    python -m benchmarks.throughput [--device cpu] [--pixels 96] [--batch 16] [--repeats 9] [--only data]

- Joint step: three models of one architecture, all layers tied, one step of the trainer (optimizer and moving average
  of weights included), over the sum of three plain steps of the same models and batches (torchvision's reference loop:
  zero_grad, forward, cross entropy, backward, AdamW, and the moving average of weights that it has as an option).
- Layout and precision: a plain step of resnet18 in NCHW and float32 over the same with channels-last weights; with
  bfloat16 autocast; with both; and with channels-last weights in the precision that `--precision auto` measures.
- Average: AveragedModel.update_parameters over the trainer's own, for six ResNet-50.
- Data path: samples per second of joint steps on batches that the trainer's loaders make of files, over those of the
  same steps on random tensors that are on the device already; of evaluation, over that of the same images there. "First
  pass" includes decoding, which later passes need not do. JPEG files of 256 x 192 pixels, drawn; named transforms.
- Metric (only with `--only metric`): the share of average precision in the evaluation of detectors.
- Merge (only with `--only merge`): samples per second of the training of a whole merge, over those of the same steps on
  tensors (merge_throughput.py).

Ratios of the device's own time: CPU seconds of one thread, on CUDA seconds after a synchronisation.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torchvision import models as classifiers

import dataset_manager
from benchmarks.merge_throughput import Judge, print_merge
from eval_methods import classification_eval, frcnn_eval
from gemel.datasets.loaders import TaskData
from gemel.environment import DEVICES
from gemel.environment.cores import loader_processes
from gemel.environment.device import pick_device, seconds_of
from gemel.evaluation.coco import by_hotcoco, by_pycocotools, hotcoco, precision_of
from gemel.evaluation.eval_method import evaluate
from gemel.forward.autocast import IN_FLOAT32, WHOLE, Autocast
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie
from gemel.training.batches import Batches
from gemel.training.early_stopping import Progress
from gemel.training.options import TrainingOptions
from gemel.training.precision import autocast_of, measured
from gemel.training.schedule import Schedule
from gemel.training.step import JointStep, Member
from gemel.workload import CLASSIFICATION, DETECTION, Reading, Task, read_workload
from model_architectures import build
from transforms import classification_transforms, detection_transforms

PARTS = ("step", "layout", "average", "data")
METRIC, MERGE = "metric", "merge"  # not among those of a run without --only
NUM_MODELS, CLASSES = 3, 4
CPU = pick_device("cpu")
FILE_SIZE = (256, 192)  # pixels
NUM_FILES = 96  # of a split


class Given:
    """Batches that are one and the same, on the device already."""

    def __init__(self, batch: tuple[Any, Any]):
        self.batch = batch

    def next(self) -> tuple[Any, Any]:
        return self.batch


def ratio(one: Callable[[], object], other: Callable[[], object], device: torch.device, repeats: int) -> tuple:
    """Median and spread of seconds of `one` over those of `other`, which alternate; the first pair warms up."""
    ratios = []
    for _ in range(repeats + 1):
        first = seconds_of(one, device)
        ratios.append(first / seconds_of(other, device))
    found = sorted(ratios[1:])
    return statistics.median(found), found[0], found[-1]


def show(what: str, found: tuple) -> None:
    print(f"{what}: {found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})", flush=True)


def task_of(name: str, model: nn.Module) -> Task:
    nothing: Any = None  # what a step does not read
    return Task(name, model, CLASSIFICATION, nothing, nothing, nothing, 1.0, 1.0, "none", None, Reading())


def joint_step(models: nn.ModuleDict, batches: list, device: torch.device) -> Callable[[], object]:
    """One step of the trainer over all models."""
    tasks = [task_of(name, model) for name, model in models.items()]
    return step_of(models, tasks, list(map(Given, batches)), device)


def step_of(models: nn.ModuleDict, tasks: list[Task], sources: list, device: torch.device) -> Callable[[], object]:
    """One step of the trainer; sources: what gives each task's batches."""
    options = TrainingOptions(warmup_steps=0)
    nothing: Any = None
    pairs = zip(tasks, sources, strict=True)
    members = [Member(task, nothing, source, Progress(1.0, accuracy=1.0)) for task, source in pairs]
    training = JointStep(models, options, Schedule(options, 100, True), device, {})
    training.begin_stage(members)
    return lambda: training.step(members)


def plain_step(model: nn.Module, batch: tuple, device: torch.device, autocast: Autocast = IN_FLOAT32) -> Callable:
    """One step of torchvision's reference loop, with the moving average of weights that it has as an option."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device.type != "cpu" or None)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=False)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast.within(model):
            output = model(batch[0])
        F.cross_entropy(output, batch[1]).backward()
        optimizer.step()
        average.update_parameters(model)

    return step


def batch_of(settings: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.rand(settings.batch, 3, settings.pixels, settings.pixels, device=device)
    return images, torch.randint(CLASSES, (settings.batch,), device=device)


def print_joint_step(name: str, settings: argparse.Namespace, device: torch.device) -> None:
    models = {f"a{i}_{name}": getattr(classifiers, name)(num_classes=CLASSES).to(device) for i in range(NUM_MODELS)}
    plain = [copy.deepcopy(model) for model in models.values()]
    batches = [batch_of(settings, device) for _ in models]
    tied = nn.ModuleDict(models)
    tie(tied, find_groups(tied))
    steps = [plain_step(model, batch, device) for model, batch in zip(plain, batches, strict=True)]
    found = ratio(joint_step(tied, batches, device), lambda: [step() for step in steps], device, settings.repeats)
    show(f"joint step of {NUM_MODELS} tied {name} / sum of plain steps, {settings.pixels} px", found)


def print_layouts(settings: argparse.Namespace, device: torch.device) -> None:
    batch, model = batch_of(settings, device), classifiers.resnet18(num_classes=CLASSES).to(device)
    reference = plain_step(copy.deepcopy(model), batch, device)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = batch[0].to(memory_format=torch.channels_last)
    in_bfloat16 = Autocast(torch.bfloat16, (WHOLE,))
    ways = {
        "channels-last": plain_step(last, (images, batch[1]), device),
        "bfloat16 autocast": plain_step(copy.deepcopy(model), batch, device, in_bfloat16),
        "both": plain_step(copy.deepcopy(last), (images, batch[1]), device, in_bfloat16),
    }
    chosen, found = copy.deepcopy(last).train(), {}
    found["chosen"] = measured(task_of("chosen", chosen), batch, device, None, 0)
    autocast = autocast_of(task_of("chosen", chosen), found)
    ways[f"channels-last in {found['chosen']['precision']}, as chosen"] = plain_step(chosen, batch, device, autocast)
    for way, step in ways.items():
        show(f"plain step of resnet18 in NCHW and float32 / {way}", ratio(reference, step, device, settings.repeats))


def print_average(settings: argparse.Namespace, device: torch.device) -> None:
    models = nn.ModuleDict({f"a{i}_resnet50": classifiers.resnet50().to(device) for i in range(6)})
    options = TrainingOptions()
    training = JointStep(models, options, Schedule(options, 100, True), device, {})
    training.begin_stage([])
    training.schedule.step = 1
    library = AveragedModel(models, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=True)
    library.update_parameters(models)
    found = ratio(lambda: library.update_parameters(models), training._move_average, device, settings.repeats)
    show("average of six ResNet-50: AveragedModel.update_parameters / the trainer's", found)


# ---- the data path -------------------------------------------------------------------------------------------


def write_files(root: Path) -> None:
    """Drawn datasets: cars_CL with CLASSES classes, cars_OD with one object an image."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(NUM_FILES):
            coarse = random.integers(0, 256, (FILE_SIZE[1] // 8, FILE_SIZE[0] // 8, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize(FILE_SIZE, Image.Resampling.BICUBIC)
            places = [root / "cars_CL" / split / str(number % CLASSES), root / "cars_OD" / split / "images"]
            for folder in places:
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{number}.jpg", quality=90)
            notes = root / "cars_OD" / split / "annotations"
            notes.mkdir(exist_ok=True)
            (notes / f"{number}.txt").write_text(f"{number % CLASSES} 0.5 0.5 0.4 0.4\n")


def entries_of(kind: str, settings: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """A dictionary of NUM_MODELS tasks of one kind and one architecture, on one dataset."""
    entries: dict[str, dict] = {}
    for number in range(NUM_MODELS):
        if kind == CLASSIFICATION:
            model = classifiers.resnet18(num_classes=CLASSES)
            more = {"eval_method": classification_eval, "transforms": classification_transforms(settings.pixels)}
            entry = {**more, "dataset": "cars_CL", "batch_size": settings.batch}
        else:
            sizes = {"layers": (1, 1, 1, 1), "width": 24, "head_convs": 1, "min_size": FILE_SIZE[1]}
            model = build("fcos_model", CLASSES + 1, backbone="slim_resnet", **sizes)
            more = {"eval_method": frcnn_eval, "transforms": detection_transforms()}
            entry = {**more, "dataset": "cars_OD", "batch_size": max(2, settings.batch // 4)}
        entries[f"cars{number}_net"] = {**entry, "model": model.to(device), "task": kind, "unmerged_acc": 1.0}
    return entries


def judged_entries(kind: str, settings: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """The same with eval methods under which one round trains to its end."""
    found = entries_of(kind, settings, device)
    return {name: {**entry, "eval_method": Judge(NUM_FILES)} for name, entry in found.items()}


def tasks_of(kind: str, settings: argparse.Namespace, device: torch.device) -> Mapping[str, Task]:
    tasks, problems = read_workload(entries_of(kind, settings, device))
    assert not problems, problems
    return tasks


def print_data_path(kind: str, root: Path, settings: argparse.Namespace, device: torch.device) -> None:
    """Steps and evaluation on samples from files, over the same on tensors that are on the device."""
    tasks = tasks_of(kind, settings, device)
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    tie(models, find_groups(models))
    num_workers = 0 if device.type == "cpu" else loader_processes(len(tasks))
    options: dict[str, Any] = {"device": device, "seed": 0, "num_workers": num_workers, "cache_bytes": 1 << 30}
    data = {
        name: dataset_manager.open_task(task, [root], batch_size=task.batch_size or 1, **options)
        for name, task in tasks.items()
    }
    given = [Given(_random_batch(data[name], task.batch_size or 1, device)) for name, task in tasks.items()]
    on_tensors = step_of(models, list(tasks.values()), given, device)
    on_files = step_of(models, list(tasks.values()), [Batches(data[name]) for name in tasks], device)
    steps = len(data[next(iter(tasks))].train)
    show(f"data path, training, {kind}, first pass", ratio(on_tensors, on_files, device, steps - 1))
    show(f"data path, training, {kind}", ratio(on_tensors, on_files, device, max(settings.repeats, steps)))
    print_evaluation(next(iter(tasks.values())), next(iter(data.values())), settings, device)


def print_evaluation(task: Task, data: TaskData, settings: argparse.Namespace, device: torch.device) -> None:
    """On the same images: what a detector finds decides what its evaluation costs."""
    batches = [(_moved(images, device), targets) for images, targets in data.val]
    found = ratio(lambda: evaluate(task, batches), lambda: evaluate(task, data.val), device, settings.repeats)
    show(f"data path, evaluation, {task.kind}", found)


def print_metric(root: Path, device: torch.device) -> None:
    """The share that average precision has in the evaluation of two detectors, by library; 100 detections an image."""
    sizes = {"layers": (1, 1, 1, 1), "width": 24, "head_convs": 1, "min_size": FILE_SIZE[1]}
    entries = {}
    for name in ("carsa_net", "carsb_net"):
        model = build("fcos_model", CLASSES + 1, backbone="slim_resnet", score_thresh=0.0, **sizes).to(device)
        more = {"eval_method": frcnn_eval, "transforms": detection_transforms(), "dataset": "cars_OD"}
        entries[name] = {**more, "model": model, "task": DETECTION, "unmerged_acc": 1.0}
    tasks, _ = read_workload(entries)
    for engine in (by_pycocotools, *([by_hotcoco] if hotcoco is not None else [])):
        in_metric: list[float] = []

        def timed(targets: Any, rows: Any, limits: Any, by: Any = engine, seconds: list[float] = in_metric) -> Any:
            found: list[Any] = []
            seconds.append(seconds_of(lambda: found.append(precision_of(targets, rows, limits, by)), CPU))
            return found[0]

        whole = 0.0
        for task in tasks.values():
            data = dataset_manager.open_task(task, [root], device=device, seed=0, batch_size=4, cache_bytes=1 << 30)
            with mock.patch("eval_methods.precision_of", timed):
                evaluate(task, data.val)  # decodes
                whole += seconds_of(partial(evaluate, task, data.val), device)
        metric, count = sum(in_metric[1::2]), len(tasks) * NUM_FILES
        print(
            f"evaluation of 2 detectors, {NUM_FILES} images each: {engine.__name__} takes {metric / whole:.1%}, "
            f"{1e3 * metric / count:.2f} of {1e3 * whole / count:.2f} ms an image",
            flush=True,
        )


def _random_batch(data: TaskData, size: int, device: torch.device) -> tuple[Any, Any]:
    """Random images on the device, of the sizes that the task has, with targets of val; no image of train is read."""
    images, targets = next(iter(data.val))
    if torch.is_tensor(images):
        return torch.rand_like(images[:size]).to(device), targets[:size].to(device)
    return [torch.rand_like(image).to(device) for image in images[:size]], targets[:size]


def _moved(images: Any, device: torch.device) -> Any:
    return images.to(device) if torch.is_tensor(images) else [image.to(device) for image in images]


def print_with_files(kind: str, root: Path, settings: argparse.Namespace, device: torch.device) -> None:
    if "data" in settings.only:
        print_data_path(kind, root, settings, device)
    if METRIC in settings.only and kind == DETECTION:
        print_metric(root, device)
    if MERGE in settings.only:
        make = partial(judged_entries, kind, settings, device)
        print_merge(make, root, device, settings.repeats, f"{NUM_MODELS} tied models, {kind}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", nargs="*", default=["resnet18", "mobilenet_v3_small"])
    parser.add_argument("--without-average", action="store_true", help="six ResNet-50 take 1.5 GiB")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, METRIC, MERGE), default=PARTS, help="what is measured")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = pick_device(settings.device)
    for name in settings.models if "step" in settings.only else ():
        print_joint_step(name, settings, device)
    if "layout" in settings.only:
        print_layouts(settings, device)
    if "average" in settings.only and not settings.without_average:
        print_average(settings, device)
    if {"data", METRIC, MERGE} & set(settings.only):
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder))
            for kind in (CLASSIFICATION, DETECTION):
                print_with_files(kind, Path(folder), settings, device)


if __name__ == "__main__":
    main()
