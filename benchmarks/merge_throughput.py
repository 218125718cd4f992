"""What a whole merge trains a second, beside the same steps on tensors: `benchmarks.throughput --only merge` prints it.

Two merges of the same models and files, alternated: in one the trainer reads batches as ever, from the first pass on,
in which images are decoded; in the other every batch of a task is its first one, which is on the device already. The
eval method finds every model right at first and below its target then, so that one round trains to its end.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from gemel.environment.device import seconds_of
from gemel.forward.batches import to_device
from gemel.forward.modes import device_of, evaluation_mode
from gemel.training.batches import Batches
from merge_workloads import merge_workload
from trainer import Round

EPOCHS = 4


class Judge:
    """An eval method: right on the first call with so many images, wrong from then on."""

    def __init__(self, num_val: int):
        self.num_val, self.calls = num_val, 0

    def __call__(self, model: nn.Module, loader: Any) -> float:
        with evaluation_mode(model):
            for images, _ in loader:
                model(to_device(images, device_of(model)))
        self.calls += len(loader.dataset) == self.num_val  # not those that try what the model can do on a few images
        return float(self.calls < 2)


class FirstAgain(Batches):
    """The first batch of a task, on the device, again and again."""

    device = torch.device("cpu")

    def next(self) -> tuple:
        if not hasattr(self, "_first"):
            images, targets = super().next()
            self._first = to_device(images, self.device), targets
        return self._first


@contextmanager
def training_timed(device: torch.device) -> Iterator[dict[str, float]]:
    """Within, the device's own seconds of all training, and the samples that it took, are added up."""
    found = {"seconds": 0.0, "samples": 0.0}
    train = Round.train

    def timed(self: Round) -> None:
        before = self.training.samples
        found["seconds"] += seconds_of(lambda: train(self), device)
        found["samples"] += self.training.samples - before

    with mock.patch.object(Round, "train", timed):
        yield found


def samples_per_second(entries: dict, root: Path, device: torch.device, on_tensors: bool) -> tuple[float, float]:
    """Of the training of one merge; and the share of its time in which it waited for batches."""
    FirstAgain.device = device
    batches = FirstAgain if on_tensors else Batches
    options: dict[str, Any] = {"strategy": "all", "max_epochs": EPOCHS, "patience_epochs": 100.0, "quiet": True}
    options |= {"device": device.type, "datasets": root, "screening_images": 0, "num_threads": 1}
    read = mock.patch("gemel.training.step.Batches", batches)
    with tempfile.TemporaryDirectory() as folder, read, training_timed(device) as found:
        (row,) = merge_workload(entries, Path(folder) / "results", **options)["run"]["rounds"]
    return found["samples"] / found["seconds"], row["reading_seconds"] / row["training_seconds"]


def print_merge(make_entries: Callable[[], dict], root: Path, device: torch.device, repeats: int, what: str) -> None:
    """The ratio, the median of alternated pairs and their spread; make_entries: a dictionary with new models."""
    ratios, waited = [], 0.0
    for _ in range(repeats):
        on_files, waited = samples_per_second(make_entries(), root, device, on_tensors=False)
        ratios.append(on_files / samples_per_second(make_entries(), root, device, on_tensors=True)[0])
    found = sorted(ratios)
    print(
        f"whole merge, {what}: samples a second of its training on files / on tensors that are on the device: "
        f"{statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f}); waited for batches {waited:.1%} of it",
        flush=True,
    )
