"""Runs a task's eval method: logs what it prints, checks its result, and repeats it after failures of the machine."""

import contextlib
import io
import logging
import math
from collections.abc import Iterable

from torch import nn
from torch.utils.data import DataLoader

from gemel.datasets.loaders import batch_size_of, restarted, with_half_batches
from gemel.environment.failures import is_out_of_memory, is_worker_death
from gemel.workload import Task

log = logging.getLogger(__name__)


def evaluate(task: Task, loader: Iterable, model: nn.Module | None = None) -> float:
    """The task's accuracy in [0, 1] on a loader or a list of batches; model: evaluated instead of the task's own.

    When a process of a DataLoader dies, the evaluation is repeated once with new processes; when memory is exhausted,
    with half the batch size, down to one image. Raises ValueError if the eval method does not return a number in
    [0, 1], and the failure itself if it is not repeated.
    """
    may_restart = True
    while True:
        try:
            return _evaluate_once(task, loader, model)
        except (RuntimeError, MemoryError) as error:
            again = None
            if isinstance(loader, DataLoader) and is_out_of_memory(error):
                again = with_half_batches(loader)
            elif isinstance(loader, DataLoader) and is_worker_death(error) and may_restart:
                again, may_restart = restarted(loader), False
            if again is None:
                raise
            log.warning(
                "%s: repeats the evaluation with batches of %d, after: %s", task.name, batch_size_of(again), error
            )
            loader = again


def _layout_of(model: object) -> dict[str, str]:
    """Tensor name -> dtype, shape and device: what an eval method must leave as it is."""
    tensors = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else {}
    return {name: f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}" for name, tensor in tensors.items()}


def _evaluate_once(task: Task, loader: Iterable, model: nn.Module | None) -> float:
    model = task.model if model is None else model
    before = _layout_of(model)
    printed = io.StringIO()  # pycocotools prints many lines
    with contextlib.redirect_stdout(printed):
        value = task.eval_method(model, loader)
    if changed := before.items() ^ _layout_of(model).items():
        name = min(changed)[0]
        raise ValueError(
            f"{task.name}: eval_method: changed {name} of the model from {before.get(name)} to "
            f"{_layout_of(model).get(name)}; allowed: to read the model as it is, or a copy of it"
        )
    if printed.getvalue():
        log.debug("%s: eval_method printed:\n%s", task.name, printed.getvalue())
    try:
        accuracy = float(value)
    except (TypeError, ValueError):
        accuracy = math.nan
    if not 0 <= accuracy <= 1:
        raise ValueError(f"{task.name}: eval_method: got {value!r}; allowed: a number in [0, 1]")
    return accuracy
