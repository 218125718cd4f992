"""What it costs to read a workload's images, beside what its models cost.

    python -m benchmarks.reading --workload mine.py --datasets DIR [--images 64] [--threads 1]

Per task, medians over images of val: their size on disk and as the model gets them, milliseconds to decode one, to
transform it, to take it from memory (merge_workloads.merge_workload, cache_bytes), and of the model's forward pass.
Where decoding costs more than the model, images that are stored in the size that the model wants save the difference.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dataset_manager
from gemel.datasets.cache import SampleCache
from gemel.datasets.folders import load_image, open_split
from gemel.environment import DEVICES
from gemel.environment.device import pick_device
from gemel.forward.modes import device_of, evaluation_mode
from gemel.merging.console import table
from gemel.sample_workload.tasks import DATASETS_ROOT
from gemel.workload import CLASSIFICATION, Task, WorkloadError, load_model_dict, read_workload

HEADER = ("task", "image", "model gets", "decode", "transform", "from memory", "forward", "val in memory")


def timed(function: Callable, *arguments: object) -> tuple[float, Any]:
    """(milliseconds, what the function returned)"""
    began = time.perf_counter()
    found = function(*arguments)
    return 1000 * (time.perf_counter() - began), found


def row_of(task: Task, roots: list[Path], num_images: int) -> list[str]:
    """The cells of one task."""
    dataset = open_split(task, dataset_manager.find_dataset(task, roots), "val")
    indices = torch.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).long().tolist()
    times: dict[str, list[float]] = {"decode": [], "read": [], "memory": [], "forward": []}
    stored, given = [], []
    dataset[indices[0]], load_image(dataset.samples[indices[0]][0])  # whatever is imported or allocated at first
    dataset.cache = SampleCache(1 << 40)
    device = device_of(task.model)
    with evaluation_mode(task.model):
        for index in indices:
            spent, image = timed(load_image, dataset.samples[index][0])
            times["decode"].append(spent)
            stored.append(image.size)
            spent, (image, _) = timed(dataset.__getitem__, index)
            times["read"].append(spent)
            times["memory"].append(timed(dataset.__getitem__, index)[0])
            given.append(tuple(image.shape[:0:-1]))
            batch = image[None].to(device) if task.kind == CLASSIFICATION else [image.to(device)]
            times["forward"].append(timed(_forward, task.model, batch)[0])
    middle = {key: statistics.median(values) for key, values in times.items()}
    whole = dataset.cache.num_bytes / len(indices) * len(dataset)
    sizes = [" x ".join(f"{statistics.median(side):.0f}" for side in zip(*f, strict=True)) for f in (stored, given)]
    costs = (middle["decode"], max(0.0, middle["read"] - middle["decode"]), middle["memory"], middle["forward"])
    return [task.name, *sizes, *(f"{cost:.2f} ms" for cost in costs), f"{whole / (1 << 20):.0f} MiB"]


def _forward(model: torch.nn.Module, batch: object) -> None:
    model(batch)
    if device_of(model).type != "cpu":
        torch.accelerator.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", metavar="FILE.py", help="defines create_model_dict(); default: the embedded one")
    parser.add_argument("--datasets", metavar="DIR", help="as for merge_workloads.py")
    parser.add_argument("--images", type=int, default=64, help="per task (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    flags = parser.parse_args(arguments)
    if min(flags.images, flags.threads) < 1:
        parser.error("--images and --threads: allowed are whole numbers from 1 on")
    torch.set_num_threads(flags.threads)
    roots = [Path(flags.datasets) if flags.datasets else dataset_manager.DEFAULT_ROOT, DATASETS_ROOT]
    try:
        tasks, problems = read_workload(load_model_dict(flags.workload))
        problems += dataset_manager.check(tasks, roots)
        if problems:
            raise WorkloadError(problems)
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return 2
    for task in tasks.values():
        task.model.to(pick_device(flags.device))
    print(table(HEADER, [row_of(task, roots, flags.images) for task in tasks.values()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
