"""The batches of one task in a round: endless, restartable at any point, and split when memory runs out."""

import logging

from torch import Tensor

from gemel.datasets.loaders import TaskData, restarted
from gemel.environment.failures import is_worker_death

RESTARTS = 3  # of the workers of one task in one pass; more often than that is no accident

log = logging.getLogger(__name__)


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
