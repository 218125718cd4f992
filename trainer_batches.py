"""The batches of one task in a round: endless, restartable at any point, and split when memory runs out."""

import logging
import re

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset_manager import TaskData, restarted

WORKER_DIED = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)", re.DOTALL)
# CUDA raises its own class; the CPU allocator a RuntimeError, worded as in torch/csrc (c10/core/impl/alloc_cpu.cpp).
CPU_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")
RESTARTS = 3  # of the workers of one task in one pass; more often than that is no accident

log = logging.getLogger(__name__)


def is_worker_death(error: BaseException) -> bool:
    """Whether an error means that a loader process died (killed by the system, say) and can be started again."""
    return isinstance(error, RuntimeError) and bool(WORKER_DIED.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(CPU_MEMORY.search(str(error)))


class Batches:
    """Endless batches of a task's train loader, whose position can be saved and gone back to."""

    def __init__(self, data: TaskData):
        self.task, self.loader = data.task, data.train
        self.iterator = None
        self.taken = 0  # in this pass
        self.pass_began: Tensor | None = None  # state of the sampler's generator

    def next(self) -> tuple:
        """The next batch; dead loader processes are started again, at the batch they owed."""
        for _ in range(RESTARTS):
            try:
                return self._take()
            except RuntimeError as error:
                if not is_worker_death(error):
                    raise
                log.warning("%s: a loader process died and is started again: %s", self.task, str(error).splitlines()[0])
                self.loader = restarted(self.loader)
                self.load_state(self.state())
        raise RuntimeError(
            f"{self.task}: its loader processes died {RESTARTS} times at one batch; see the system's log"
        )

    def state(self) -> dict:
        began = self.loader.sampler.generator.get_state() if self.iterator is None else self.pass_began
        return {"pass_began": began.clone(), "taken": self.taken}

    def load_state(self, state: dict) -> None:
        self.pass_began, self.taken = state["pass_began"].clone(), state["taken"]
        sampler = self.loader.sampler
        sampler.generator.set_state(self.pass_began)
        sampler.skip = self.taken * self.loader.batch_size
        self.iterator = iter(self.loader)

    def _take(self) -> tuple:
        if self.iterator is None:
            self._begin_pass()
        try:
            batch = next(self.iterator)
        except StopIteration:
            self._begin_pass()
            batch = next(self.iterator)
        self.taken += 1
        return batch

    def _begin_pass(self) -> None:
        self.pass_began, self.taken = self.loader.sampler.generator.get_state(), 0
        self.iterator = iter(self.loader)


def split(batch: tuple, num_parts: int) -> list[tuple]:
    """(images, targets) in at most `num_parts` parts of equal size; tensors and lists are cut alike."""
    images, targets = batch
    size = -(-len(images) // num_parts)
    return [(images[start : start + size], targets[start : start + size]) for start in range(0, len(images), size)]


def smaller(loader: DataLoader) -> DataLoader | None:
    """The loader with half its batch size; None if a batch is a single image already."""
    return restarted(loader, batch_size=loader.batch_size // 2) if loader.batch_size > 1 else None
