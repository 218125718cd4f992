"""Compares the memory that a merge predicts with what it takes: small workloads, each in a process of its own.

    python -m benchmarks.memory_use [--only NAME ...] [--device cpu] [--there MIB]

Models have random weights, images are random. The eval method finds every model right when it first sees it, then below
its target at every other call, so that trials are trained a little and then kept; where only weights are fitted it
finds all right, and where every trial fails all wrong. A line per workload: what was predicted before the first round
(for fits alone where nothing was trained), what was used at most (resident memory of the process; on CUDA allocated
tensors), and their ratio, in all and without what the process had before the merge.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from torchvision import models as zoo
from torchvision.transforms.functional import to_tensor

from benchmarks.fit_memory import MIB, resident_mib
from gemel.console.tables import table
from gemel.environment import DEVICES
from gemel.environment.events import listening
from gemel.forward.modes import evaluation_mode
from gemel.merging import memory_need
from gemel.merging.memory_need import FITS
from merge_workloads import merge_workload
from model_architectures import build

CLASSES, NUM_VAL = 4, 8
TIME_BUDGET = 150.0  # seconds: the first rounds are the largest
HEADER = ("workload", "predicted", "used", "ratio", "of these the process before", "ratio without", "largest parts")


RIGHT, ALTERNATING, WRONG = "right", "alternating", "wrong"  # what the eval method finds, after the unmerged model


class Workload(NamedTuple):
    """Models by name and number, and how they are merged."""

    models: dict[str, int]  # a torchvision classifier, or "fcos" -> how many
    pixels: int  # a side of an image
    images: int  # of train, a task
    options: dict[str, Any]
    finds: str = ALTERNATING


WORKLOADS = {
    "classifiers_tied": Workload({"resnet18": 6}, 64, 64, {"strategy": "all"}),
    "classifiers_mixed": Workload({"resnet18": 2, "resnet34": 2, "mobilenet_v2": 2}, 96, 64, {"strategy": "gemel"}),
    "detectors": Workload({"fcos": 3}, 192, 32, {"strategy": "gemel"}),
    "fits": Workload({"mobilenet_v2": 6}, 96, 240, {"strategy": "adaptive"}, RIGHT),
    "failing": Workload({"resnet18": 4}, 32, 32, {"strategy": "adaptive"}, WRONG),
    "apart": Workload({"resnet18": 3, "mobilenet_v2": 2}, 48, 64, {"strategy": "adaptive"}, RIGHT),
}


class Judge:
    """An eval method that runs the model and says what it was told to."""

    def __init__(self, finds: str):
        self.finds, self.calls = finds, 0

    def __call__(self, model: nn.Module, loader: Any) -> float:
        with evaluation_mode(model):
            for images, _ in loader:
                model(images)
        self.calls += len(loader.dataset) == NUM_VAL  # not those that try what the model can do on a few images
        is_wrong = self.calls > 1 if self.finds == WRONG else self.finds == ALTERNATING and self.calls % 2 == 0
        return 0.5 if is_wrong else 1.0


def transform(image: Image.Image, target: dict | None = None) -> Any:
    """Of classifiers and of detectors."""
    return to_tensor(image) if target is None else (to_tensor(image), target)


def entry_of(kind: str, workload: Workload) -> dict:
    """The entry of one task."""
    common = {"eval_method": Judge(workload.finds), "transforms": {"train": transform, "val": transform}}
    if kind == "fcos":
        model = build("fcos_model", CLASSES + 1, backbone="resnet18", min_size=workload.pixels)
        return {**common, "model": model, "task": "object_detection", "unmerged_acc": 1.0, "dataset": "drawn_OD"}
    model = zoo.get_model(kind, weights=None, num_classes=CLASSES)
    return {**common, "model": model, "task": "image_classification", "unmerged_acc": 1.0, "dataset": "drawn_CL"}


def write_images(root: Path, workload: Workload) -> None:
    """Random images as a dataset of classes and as one of boxes."""
    drawn = torch.Generator().manual_seed(0)
    for split, count in (("train", workload.images), ("val", NUM_VAL)):
        for number in range(count):
            pixels = torch.randint(256, (workload.pixels, workload.pixels, 3), dtype=torch.uint8, generator=drawn)
            image = Image.fromarray(pixels.numpy())
            boxes = root / "drawn_OD" / split
            for folder in (root / "drawn_CL" / split / str(number % CLASSES), boxes / "images"):
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{number}.png")
            (boxes / "annotations").mkdir(exist_ok=True)
            (boxes / "annotations" / f"{number}.txt").write_text(f"{number % CLASSES} 0.5 0.5 0.4 0.4\n")


def measure(name: str, device: str, there: int | None = None) -> dict[str, Any]:
    """Merges a workload in this process; bytes predicted and used, those that were there before, those that waited.

    there: MiB that are taken to be there.
    """
    if there is not None:
        memory_need.memory_there = lambda device: there * MIB  # type: ignore[assignment]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), workload)
        before = resident_mib() * MIB if device == "cpu" else 0.0
        entries = {
            f"{kind.replace('_', '')}{number}_net": entry_of(kind, workload)
            for kind, count in workload.models.items()
            for number in range(count)
        }
        options: dict[str, Any] = {
            "datasets": folder,
            "device": device,
            "num_threads": 1,
            "max_epochs": 2,
            "quiet": True,
        }
        options["time_budget"] = TIME_BUDGET
        waited: list[int] = []
        with listening(lambda kind, fields: waited.append(fields["bytes"]) if kind == "models wait" else None):
            manifest = merge_workload(entries, Path(folder) / "results", **options, **workload.options)
    used = next(one for one in manifest["run"]["memory_use"] if one["memory_of"] == device)
    seconds, rounds = manifest["run"]["cpu_seconds"], manifest["run"]["rounds"]
    steps = sum(row["steps"] for row in rounds)
    trained = steps > 0 or not rounds and workload.finds == ALTERNATING
    return {
        **used,
        "before": before,
        "cpu_seconds": seconds,
        "rounds": len(rounds),
        "steps": steps,
        "trained": trained,
        "waited": max(waited, default=0),
    }


def row_of(name: str, device: str, there: int | None) -> list[str]:
    """The cells of one workload, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_use", "--only", name, "--device", device, "--here"]
    command += [] if there is None else ["--there", str(there)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    phases = found["predicted_by_phase"]
    predicted = max(phases.values()) if found["trained"] else phases[FITS]
    used, before = found["used_bytes"], found["before"]
    mib: Callable[[float], str] = lambda size: f"{size / MIB:.0f}"  # noqa: E731
    parts = ", ".join(f"{what} {mib(size)}" for what, size in found["parts"].items())
    without = f"{(predicted - before) / (used - before):.2f}"
    print(f"{name}: {found['rounds']} rounds, {found['steps']} steps, {found['cpu_seconds']:.0f} CPU s: {parts}")
    if there is not None:
        print(f"{name}: with {there} MiB, models of {mib(found['waited'])} MiB waited")
    row = [name, mib(predicted), mib(used), f"{predicted / used:.2f}", mib(before), without]
    print(*row, flush=True)
    return row


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="workloads")
    parser.add_argument("--device", choices=[name for name in DEVICES if name != "auto"], default="cpu")
    parser.add_argument("--here", action="store_true", help="in this process, as JSON; one workload")
    help_of = "MiB that are taken to be there: with less than is predicted, models of tasks that are apart wait"
    parser.add_argument("--there", type=int, help=help_of)
    flags = parser.parse_args(arguments)
    if flags.here:
        print(json.dumps(measure(flags.only[0], flags.device, flags.there)))
        return 0
    print(table(list(HEADER[:-1]), [row_of(name, flags.device, flags.there) for name in flags.only]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
