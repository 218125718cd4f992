"""Measures the peak memory of a fit, and of a whole merge, on random images: each in a process of its own.

    python -m benchmarks.fit_memory [MODEL:COUNT:SIZE ...] [--images 960] [--fit-memory 2048] [--merge]

COUNT models of one torchvision architecture with random weights share all layers; images have SIZE pixels a side. The
default is three and twelve MobileNetV2 at 96 px. A fit is measured above the models, with what is drawn for it.
--merge: a merge of the models instead, whose eval method finds every model right, so that the first trial is kept;
measured in all. MiB are of resident memory. Takes minutes.
"""

import argparse
import copy
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.transforms.functional import to_tensor

from gemel.console.tables import table
from gemel.fitting.memory import FitMemory, predicted_peak
from gemel.fitting.sequential_fit import fit_sequentially
from gemel.fitting.store import TensorStore
from gemel.fitting.teacher_samples import StoredBatches, TeacherSampler
from gemel.forward.modes import to_channels_last
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie
from gemel.thresholds import THRESHOLDS
from merge_workloads import merge_workload

DEFAULT = ("mobilenet_v2:3:96", "mobilenet_v2:12:96")
BATCH, NUM_CLASSES, NUM_VAL = 16, 10, 8
MIB = 1 << 20
HEADER = ("models", "images a task", "bound", "predicted", "above the models", "in all", "in a file", "CPU s")


@dataclass(frozen=True)
class Workload:
    """COUNT models of an architecture, for images of SIZE pixels a side."""

    architecture: str
    count: int
    size: int

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """Raises argparse.ArgumentTypeError for what is no MODEL:COUNT:SIZE."""
        name, _, numbers = text.partition(":")
        count, _, size = numbers.partition(":")
        if name not in zoo.list_models(module=zoo) or not (count.isdecimal() and size.isdecimal() and int(count) > 1):
            allowed = "MODEL:COUNT:SIZE, a torchvision classifier, a count of at least 2 and pixels"
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {allowed}")
        return cls(name, int(count), int(size))

    def build(self) -> nn.ModuleDict:
        """The models, with random weights, laid out as a merge has them."""
        torch.manual_seed(0)
        build = functools.partial(zoo.get_model, self.architecture, weights=None, num_classes=NUM_CLASSES)
        models = nn.ModuleDict({f"task{i}_model": build().eval() for i in range(self.count)})
        return to_channels_last(models, torch.device("cpu"))


def peak_mib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """The memory that this process has now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB


def measure_fit(workload: Workload, num_images: int, fit_memory: int) -> dict[str, float]:
    """Samples and fits everything once, as a merge does; returns figures in MiB and CPU seconds."""
    models = workload.build()
    teachers = {task: copy.deepcopy(model) for task, model in models.items()}
    groups = find_groups(models)
    tie(models, groups)
    before, began = resident_mib(), time.process_time()
    memory = FitMemory(fit_memory, len(models))
    store, drawn = TensorStore(memory.samples), torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        for start in range(0, num_images, BATCH):
            yield torch.rand(min(BATCH, num_images - start), 3, workload.size, workload.size, generator=drawn)

    images = {task: StoredBatches(batches(), store) for task in models}
    sampler = TeacherSampler(teachers, 0, memory, store)
    for task in models:
        sampler.metrics(task, functools.partial(images.__getitem__, task))
    samples = sampler.sample(groups, images, THRESHOLDS.fit.positions)
    fits = fit_sequentially(models, teachers, groups, images, teacher_samples=samples)
    assert all(fit.fitted for fit in fits.values())
    sizes = {task: batches.sizes for task, batches in images.items()}
    peak = peak_mib()
    return {
        "predicted": predicted_peak(sampler.footprints, sizes, sampler.waiting(groups, images)) / MIB,
        "above": peak - before,
        "in all": peak,
        "file": store.file_bytes / MIB,
        "seconds": time.process_time() - began,
    }


def measure_merge(workload: Workload, num_images: int, fit_memory: int) -> dict[str, float]:
    """Merges the models on random images; returns figures in MiB and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(workload.count):
            _write_images(Path(folder) / f"task{i}_CL", num_images, workload.size)
        entries = {task: _entry(model) for task, model in workload.build().items()}
        manifest = merge_workload(
            entries, Path(folder) / "results", datasets=folder, device="cpu", num_threads=1, fit_memory=fit_memory
        )
    assert manifest["memory"]["saved_bytes"] > 0
    return {"in all": peak_mib(), "seconds": manifest["run"]["cpu_seconds"]}


def always_right(model: nn.Module, loader: Any) -> float:
    """An eval method that runs the model and finds it right."""
    with torch.inference_mode():
        for images, _ in loader:
            model(images)
    return 1.0


def _entry(model: nn.Module) -> dict:
    transforms = {"train": to_tensor, "val": to_tensor}
    kind = "image_classification"
    return {"model": model, "task": kind, "eval_method": always_right, "transforms": transforms, "unmerged_acc": 1.0}


def _write_images(folder: Path, num_images: int, size: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    for split, count in (("train", num_images), ("val", NUM_VAL)):
        for i in range(count):
            path = folder / split / f"class{i % NUM_CLASSES}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=drawn)
            Image.fromarray(pixels.numpy()).save(path)


def row_of(text: str, flags: argparse.Namespace) -> list[str]:
    """Measures one workload in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fit_memory", text, "--here", "--images", str(flags.images)]
    command += ["--fit-memory", str(flags.fit_memory), *(["--merge"] if flags.merge else [])]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    keys = ("predicted", "above", "in all", "file", "seconds")
    figures = (f"{found[key]:.0f}" if key in found else "" for key in keys)
    return [text, str(flags.images), str(flags.fit_memory), *figures]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=list(DEFAULT), metavar="MODEL:COUNT:SIZE")
    parser.add_argument("--images", type=int, default=960, help="train images a task (default: %(default)s)")
    parser.add_argument("--fit-memory", type=int, default=THRESHOLDS.fit.memory // MIB, help="MiB (%(default)s)")
    parser.add_argument("--merge", action="store_true", help="a whole merge instead of one fit")
    parser.add_argument("--here", action="store_true", help="in this process, as JSON; one workload")
    flags = parser.parse_args(arguments)
    try:
        workloads = {text: Workload.parse(text) for text in flags.workloads}
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if flags.here:
        torch.set_num_threads(1)
        measure = measure_merge if flags.merge else measure_fit
        print(json.dumps(measure(next(iter(workloads.values())), flags.images, flags.fit_memory * MIB)))
        return 0
    print(table(list(HEADER), [row_of(text, flags) for text in workloads]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
