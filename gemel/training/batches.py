"""The batches of one task in a round: endless, restartable at any point, and split when memory runs out."""

import itertools
import logging
from collections.abc import Iterator

from torch import Tensor

from gemel.datasets.loaders import ShuffledKeys, TaskData, batch_size_of, restarted
from gemel.environment import ranks
from gemel.environment.failures import is_worker_death

log = logging.getLogger(__name__)


class Batches:
    """Endless batches of a task's train loader, whose position can be saved and gone back to."""

    def __init__(self, data: TaskData):
        self.task, self.loader = data.task, data.train
        self.iterator: Iterator | None = None
        self.taken = 0  # in this pass
        self.pass_began: Tensor | None = None  # state of the sampler's generator

    @property
    def sampler(self) -> ShuffledKeys:
        """What shuffles the train loader."""
        assert isinstance(self.loader.sampler, ShuffledKeys)
        return self.loader.sampler

    def next(self) -> tuple:
        """The next batch; a dead loader process is started again at the batch it owed, once; then there is none."""
        for is_second in (False, True):
            try:
                return self._take()
            except RuntimeError as error:
                if not is_worker_death(error) or not self.loader.num_workers:
                    raise
                then = "samples are loaded in the main process" if is_second else "it is started again"
                log.warning("%s: a loader process died; %s: %s", self.task, then, str(error).splitlines()[0])
                self.loader = restarted(self.loader, **({"num_workers": 0} if is_second else {}))
                self.load_state(self.state())
        return self._take()

    def state(self) -> dict:
        began = self.sampler.generator.get_state() if self.pass_began is None else self.pass_began
        return {"pass_began": began.clone(), "taken": self.taken}

    def load_state(self, state: dict) -> None:
        began: Tensor = state["pass_began"].clone()
        self.pass_began, self.taken = began, state["taken"]
        self.sampler.generator.set_state(began)
        self.sampler.skip = self.taken * batch_size_of(self.loader)
        self.iterator = iter(self.loader)

    def _take(self) -> tuple:
        iterator = self.iterator or self._begin_pass()
        try:
            batch = next(iterator)
        except StopIteration:
            batch = next(self._begin_pass())
        self.taken += 1
        return batch

    def _begin_pass(self) -> Iterator:
        self.pass_began, self.taken = self.sampler.generator.get_state(), 0
        self.iterator = iter(self.loader)
        return self.iterator


def own_part(batch: tuple, task: str) -> tuple:
    """The images, with their targets, that this rank computes of a batch (images, targets) of a task.

    All of them, if no other rank computes the task. The parts of its ranks follow each other in the order in which
    `ranks.parts_of` names them; a batch with fewer images than usual is cut in the same proportions.
    """
    parts, (images, targets) = ranks.parts_of(task), batch
    if not parts:
        return batch
    before, total = 0, sum(parts.values())
    for number, num_images in parts.items():
        begin, end = (len(images) * edge // total for edge in (before, before + num_images))
        assert begin < end, f"{task}: a batch of {len(images)} images is too small for {len(parts)} ranks"
        if number == ranks.rank():
            return images[begin:end], targets[begin:end]
        before += num_images
    raise AssertionError(f"{task}: this rank does not compute it")


def split(batch: tuple, num_parts: int, task: str = "") -> list[tuple]:
    """(images, targets) in at most `num_parts` parts of equal size; tensors and lists are cut alike.

    task: where several ranks compute it, their parts of a batch are split into equally many, as they wait for each
    other in each of them.
    """
    images, targets = batch
    if parts := ranks.parts_of(task):
        count = min(num_parts, *parts.values())
        edges = [len(images) * i // count for i in range(count + 1)]
        return [(images[begin:end], targets[begin:end]) for begin, end in itertools.pairwise(edges)]
    size = -(-len(images) // num_parts)
    return [(images[start : start + size], targets[start : start + size]) for start in range(0, len(images), size)]
