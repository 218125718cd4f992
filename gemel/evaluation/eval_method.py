"""Runs a task's eval method: its prints to the log, its result checked, and again where the machine failed it."""

import contextlib
import io
import logging
import math
from collections.abc import Iterable

from torch import nn
from torch.utils.data import DataLoader

from gemel.datasets.loaders import restarted, with_half_batches
from gemel.environment.failures import is_out_of_memory, is_worker_death
from gemel.workload import Task

log = logging.getLogger(__name__)


def evaluate(task: Task, loader: DataLoader, model: nn.Module | None = None) -> float:
    """The task's accuracy in [0, 1] on a loader; model: instead of the task's own.

    Loader processes that died are started again, once; out of memory, the batch is halved until a single image does not
    fit. Raises ValueError when the eval method returns no number in [0, 1].
    """
    try:
        return _evaluate_once(task, loader, model)
    except (RuntimeError, MemoryError) as error:
        again = with_half_batches(loader) if is_out_of_memory(error) else restarted(loader) if is_worker_death(error) else None
        if again is None:
            raise
        log.warning("%s: evaluated again, with batches of %d, after: %s", task.name, again.batch_size, error)
    return evaluate(task, again, model)


def _evaluate_once(task: Task, loader: Iterable, model: nn.Module | None) -> float:
    printed = io.StringIO()  # pycocotools, for one, prints pages
    with contextlib.redirect_stdout(printed):
        value = task.eval_method(task.model if model is None else model, loader)
    if printed.getvalue():
        log.debug("%s: eval_method printed:\n%s", task.name, printed.getvalue())
    try:
        accuracy = float(value)
    except (TypeError, ValueError):
        accuracy = math.nan
    if not 0 <= accuracy <= 1:
        raise ValueError(f"{task.name}: eval_method: got {value!r}; allowed: a number in [0, 1]")
    return accuracy
