"""Images without labels that a merge fits, aligns and compares on: a sample of each task's train split, by seed."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gemel.datasets.loaders import MAX_PLAIN_IMAGES, TaskData, plain_images
from gemel.forward.batches import Batch
from gemel.sharing.groups import Configuration
from gemel.thresholds import FIT_PIXELS, THRESHOLDS
from gemel.trials.fit_samples import FitSamples, memory_of_fits
from gemel.workload import CLASSIFICATION, Task

FEW = 4


class ImageSampler:
    """Draws images of the tasks' train splits, without labels and augmentation, on the seed and a purpose alone."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        data: Mapping[str, TaskData],
        seed: int,
        device: torch.device,
        fit_memory: int | None = None,
    ):
        self.tasks, self.data, self.seed, self.device = tasks, data, seed, device
        self.of_fits = FitSamples(self._of_fit, memory_of_fits(device, fit_memory), len(tasks), seed)

    def of_groups(
        self, configuration: Configuration, num_pixels: int, *purpose: object, **limits: Any
    ) -> dict[str, list[Batch]]:
        """Batches of images of every task in the configuration, as many as have about `num_pixels` pixels.

        limits: max_batch and max_images, as of `plain_images`.
        """
        names = (task for group in configuration for task in group.tasks)
        return self.of_tasks(names, num_pixels, *purpose, **limits)

    def of_tasks(
        self, names: Iterable[str], num_pixels: int, *purpose: object, **limits: Any
    ) -> dict[str, list[Batch]]:
        """The same of the named tasks; a detector gets its share of the pixels."""
        return {name: self._draw(name, num_pixels, *purpose, **limits) for name in dict.fromkeys(names)}

    def _of_fit(self, name: str, num_pixels: int, max_batch: float) -> list[Batch]:
        return self._draw(name, num_pixels, "fit", max_batch=max_batch)

    def _draw(
        self,
        name: str,
        num_pixels: int,
        *purpose: object,
        max_batch: float = math.inf,
        max_images: int = MAX_PLAIN_IMAGES,
    ) -> list[Batch]:
        together = FIT_PIXELS if self.device.type == "cuda" else 0  # small batches leave a GPU waiting for kernels
        data, num_pixels = self.data[name], self._share_of(name, num_pixels)
        return plain_images(
            data,
            num_pixels,
            self.seed,
            *purpose,
            batch_pixels=together,
            max_batch=max_batch,
            max_images=max_images,
        )

    def few_of(self, name: str, *purpose: object) -> Batch:
        """A few images of a task, as one batch of its loader."""
        return plain_images(self.data[name], 0, self.seed, *purpose)[0][:FEW]

    def first_of(self, name: str, count: int, *purpose: object) -> torch.Tensor:
        """The first images [N, C, H, W] of a classifier's sample, on the device."""
        images = plain_images(self.data[name], 0, self.seed, *purpose)[0]
        assert torch.is_tensor(images), f"{name} is no classifier"
        return images[:count].to(self.device)

    def _share_of(self, name: str, num_pixels: int) -> int:
        share = 1.0 if self.tasks[name].kind == CLASSIFICATION else THRESHOLDS.fit.detection_share
        return int(share * num_pixels)
