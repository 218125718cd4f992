"""The images that weights are fitted on and what the unmerged models put out for them, drawn once a run.

Within the bytes that a fit may take: see gemel/fitting/memory.py for how they are divided.
"""

import logging
import math
from collections.abc import Callable, Iterable

import torch

from gemel.environment import ranks
from gemel.environment.device import total_memory
from gemel.environment.seeds import derive_seed
from gemel.fitting.importance import PIXELS
from gemel.fitting.memory import FitMemory, predicted_peak
from gemel.fitting.store import TensorStore
from gemel.fitting.teacher_samples import StoredBatches, StoredMetric, TeacherSampler, TeacherSamples
from gemel.forward.batches import Batch
from gemel.forward.modes import Models
from gemel.sharing.groups import Configuration
from gemel.thresholds import THRESHOLDS

MIB = 1 << 20

log = logging.getLogger(__name__)

Draw = Callable[[str, int, float], list[Batch]]  # (task, pixels in total, images in a batch at most) -> its batches


def memory_of_fits(device: torch.device, given: int | None) -> int:
    """Bytes that a fit may take beside the models: what was given, or what suits the device."""
    if given is not None:
        return given
    own = total_memory(device)
    return THRESHOLDS.fit.memory if own is None else int(THRESHOLDS.fit.share_of_device * own)


class FitSamples:
    """Draws images and samples of the unmerged models when a fit first needs them, and keeps them for later fits.

    draw: gives batches of a task's images, more of the same where there are more pixels. memory: bytes of a fit.
    """

    def __init__(self, draw: Draw, memory: int, num_tasks: int, seed: int):
        self._draw, self._seed, self.memory = draw, seed, FitMemory(memory, num_tasks)
        self._store = TensorStore(self.memory.samples)
        self._sampler: TeacherSampler | None = None
        self._images: dict[tuple[str, int], StoredBatches] = {}
        self._batch_sizes: dict[str, float] = {}

    def of(
        self, unmerged: Models, groups: Configuration, num_pixels: int
    ) -> tuple[dict[str, StoredBatches], TeacherSamples]:
        """Images to fit groups on, with about `num_pixels` pixels a task, and samples of the unmerged models.

        More images where a layer has far fewer rows than inputs: a layer deep in a network puts out a few positions an
        image, and a fit with few rows for its unknowns overfits them. Smaller batches, with a warning, where one batch
        of each task would take more memory than there is. Of the tasks of this rank; all ranks call it.
        """
        sampler = self._sampler_of(unmerged)
        positions = THRESHOLDS.fit.positions
        tasks = ranks.mine(dict.fromkeys(task for group in groups for task in group.tasks))
        times, most = 1, THRESHOLDS.fit.more_images
        while True:
            with ranks.sharing_memory_errors():
                images = {task: self._images_of(sampler, task, times * num_pixels) for task in tasks}
                is_short = sampler.is_short_of_rows(groups, images, positions)
            if times == most or not ranks.any_of(is_short):
                break
            times = min(2 * times, most)
        self._report(sampler, groups, images)
        with ranks.sharing_memory_errors():
            for task in tasks:
                self.metrics(unmerged, task)
            samples = sampler.sample(groups, images, positions)
        return images, samples.with_other_ranks()

    def metrics(self, unmerged: Models, task: str) -> dict[str, StoredMetric]:
        """How much errors at the layers of the task's unmerged model count, of a task of any rank."""
        return self._sampler_of(unmerged).metrics(task, lambda: self._draw(task, 2 * PIXELS, math.inf))

    def flops(self, unmerged: Models, tasks: Iterable[str], num_pixels: int) -> float:
        """Floating-point operations of the unmerged models on the images of a fit; all ranks call it."""
        sampler, counted = self._sampler_of(unmerged), {}
        with ranks.sharing_memory_errors():
            for task in ranks.mine(dict.fromkeys(tasks)):
                sizes = self._images_of(sampler, task, num_pixels).sizes
                counted[task] = sum(sizes) * sampler.footprints[task].flops
        return sum(ranks.united(counted).values())

    def _sampler_of(self, teachers: Models) -> TeacherSampler:
        """That of these models; what is known of others is forgotten, so that the memory is enough."""
        if self._sampler is None or self._sampler.teachers is not teachers:
            self._images, self._store = {}, TensorStore(self.memory.samples)
            self._sampler = TeacherSampler(teachers, derive_seed(self._seed, "fit"), self.memory, self._store)
        return self._sampler

    def _images_of(self, sampler: TeacherSampler, task: str, num_pixels: int) -> StoredBatches:
        if task not in self._batch_sizes:
            self._batch_sizes[task] = self._largest_batch(sampler, task)
        if (task, num_pixels) not in self._images:
            drawn = self._draw(task, num_pixels, self._batch_sizes[task])
            self._images[task, num_pixels] = StoredBatches(drawn, self._store)
        return self._images[task, num_pixels]

    def _largest_batch(self, sampler: TeacherSampler, task: str) -> float:
        """Images in a batch of the task such that a batch of each task can be in flight."""
        first = self._draw(task, 0, math.inf)[0]
        footprint = sampler.footprint(task, first)
        largest, wanted = self.memory.largest_batch(footprint), len(first)
        if largest < wanted:
            log.warning(
                "%s: weights are fitted on batches of %d images instead of %d: one image takes %.1f MiB in a forward "
                "pass, and the share of the task is %.0f MiB (fit_memory: %.0f MiB, %d tasks)",
                *(task, largest, wanted, footprint.peak / MIB, self.memory.waiting(self.memory.moving) / MIB),
                *(self.memory.limit / MIB, self.memory.num_tasks),
            )
        return largest

    def _report(self, sampler: TeacherSampler, groups: Configuration, images: dict[str, StoredBatches]) -> None:
        """Logs what the fit is predicted to take; warns where that is more than there is."""
        waiting = sampler.waiting(groups, images)
        sizes = {task: batches.sizes for task, batches in images.items()}
        peak = predicted_peak(sampler.footprints, sizes, waiting)
        log.debug("a fit: %d images, %.0f MiB of activations", sum(map(sum, sizes.values())), peak / MIB)
        if peak > self.memory.in_flight:
            log.warning(
                "a fit of %d tasks is predicted to take %.0f MiB for activations with %s images in a batch, and has "
                "%.0f MiB of fit_memory for them: it may run out of memory",
                *(len(images), peak / MIB, ", ".join(str(max(own)) for own in sizes.values())),
                self.memory.in_flight / MIB,
            )
