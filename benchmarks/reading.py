"""Compares the time to read a workload's images with the time of its models' forward passes.

    python -m benchmarks.reading --workload mine.py --datasets DIR [--images 64] [--threads 1]

Per task, medians over val images: their size on disk and after the transform; milliseconds to decode one, to transform
it, to read it from the sample cache (merge_workload, option cache_bytes), and of the model's forward pass. Where
decoding costs more than the forward pass, storing the images in the size that the model receives saves the difference.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.workloads import Workload, add_workload_arguments, open_workload, run_command
from gemel.console.tables import table
from gemel.datasets.cache import CacheBudget, SampleCache
from gemel.datasets.folders import load_image, open_split
from gemel.forward.modes import device_of, evaluation_mode
from gemel.workload import CLASSIFICATION, Task

HEADER = ("task", "image", "model input", "decode", "transform", "from cache", "forward", "val in cache")


def timed(function: Callable, *arguments: object) -> tuple[float, Any]:
    """(milliseconds, returned value) of one call."""
    began = time.perf_counter()
    found = function(*arguments)
    return 1000 * (time.perf_counter() - began), found


def row_of(task: Task, workload: Workload, num_images: int) -> list[str]:
    """The cells of one task, over at most `num_images` val images that are spread evenly."""
    dataset = open_split(task, workload.folder_of(task), "val")
    indices = torch.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).long().tolist()
    times: dict[str, list[float]] = {"decode": [], "read": [], "cache": [], "forward": []}
    stored, given = [], []
    dataset[indices[0]], load_image(dataset.samples[indices[0]][0])  # imports and allocations of a first read
    dataset.cache = SampleCache(CacheBudget(1 << 40))
    device = device_of(task.model)
    with evaluation_mode(task.model):
        for index in indices:
            spent, image = timed(load_image, dataset.samples[index][0])
            times["decode"].append(spent)
            stored.append(image.size)
            spent, (image, _) = timed(dataset.__getitem__, index)
            times["read"].append(spent)
            times["cache"].append(timed(dataset.__getitem__, index)[0])
            given.append(tuple(image.shape[:0:-1]))
            batch = image[None].to(device) if task.kind == CLASSIFICATION else [image.to(device)]
            times["forward"].append(timed(_forward, task.model, batch)[0])
    middle = {key: statistics.median(values) for key, values in times.items()}
    whole = dataset.cache.num_bytes / len(indices) * len(dataset)
    sizes = [" x ".join(f"{statistics.median(side):.0f}" for side in zip(*f, strict=True)) for f in (stored, given)]
    costs = (middle["decode"], max(0.0, middle["read"] - middle["decode"]), middle["cache"], middle["forward"])
    return [task.name, *sizes, *(f"{cost:.2f} ms" for cost in costs), f"{whole / (1 << 20):.0f} MiB"]


def _forward(model: torch.nn.Module, batch: object) -> None:
    model(batch)
    if device_of(model).type != "cpu":
        torch.accelerator.synchronize()


def measure(flags: argparse.Namespace) -> None:
    """Prints the table. Raises WorkloadError with every problem of the workload."""
    torch.set_num_threads(flags.threads)
    workload = open_workload(flags)
    for task in workload.tasks.values():
        task.model.to(workload.device)
    print(table(HEADER, [row_of(task, workload, flags.images) for task in workload.tasks.values()]))


def main(arguments: list[str] | None = None) -> int:
    """The command; exit codes as in benchmarks.workloads.run_command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_workload_arguments(parser)
    parser.add_argument("--images", type=int, default=64, help="per task (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    flags = parser.parse_args(arguments)
    if min(flags.images, flags.threads) < 1:
        parser.error("--images and --threads: allowed are whole numbers from 1 on")
    return run_command(lambda: measure(flags))


if __name__ == "__main__":
    sys.exit(main())
