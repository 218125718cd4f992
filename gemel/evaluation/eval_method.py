"""Runs a task's eval method: logs what it prints, checks its result, and repeats it after failures of the machine."""

import contextlib
import io
import logging
import math
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gemel.datasets.loaders import batch_size_of, restarted, with_half_batches
from gemel.environment.failures import is_out_of_memory, is_worker_death
from gemel.workload import Task

READS_ONLY = "one that reads the model as it is, or a copy of it"
STATISTICS = ("running_mean", "running_var")

log = logging.getLogger(__name__)

# Loader -> the one that took its place, with smaller batches or without processes. While the first one is alive.
_working: weakref.WeakKeyDictionary[DataLoader, DataLoader] = weakref.WeakKeyDictionary()


class EvalMethodError(ValueError):
    """What an eval method returned or did that it must not; got, allowed: as a listed problem states them."""

    def __init__(self, task: str, got: str, allowed: str):
        super().__init__(f"{task}: eval_method: got {got}; allowed: {allowed}")
        self.got, self.allowed = got, allowed


def evaluate(task: Task, loader: Iterable, model: nn.Module | None = None) -> float:
    """The task's accuracy in [0, 1] on a loader or a list of batches; model: evaluated instead of the task's own.

    When a process of a DataLoader dies, the evaluation is repeated with new processes, and when one dies again, without
    any; when memory is exhausted, with half the batch size, down to one image. Later evaluations with this loader begin
    with what worked. Raises EvalMethodError if the eval method changes the model or does not return a number in [0, 1],
    and the failure itself if it is not repeated.
    """
    current, deaths = loader, 0
    if isinstance(loader, DataLoader):
        current = _working.get(loader, loader)
    while True:
        try:
            accuracy = _evaluate_once(task, current, model)
        except (RuntimeError, MemoryError) as error:
            deaths += is_worker_death(error)
            again = _after(error, current, deaths) if isinstance(current, DataLoader) else None
            if again is None:
                raise
            log.warning(
                "%s: repeats the evaluation with batches of %d and %d loader processes, after: %s",
                *(task.name, batch_size_of(again), again.num_workers, error),
            )
            current = again
        else:
            if isinstance(loader, DataLoader) and isinstance(current, DataLoader) and current is not loader:
                _working[loader] = current
            return accuracy


def _after(error: BaseException, loader: DataLoader, deaths: int) -> DataLoader | None:
    """The loader to repeat an evaluation with; None if that is of no use."""
    if is_out_of_memory(error):
        return with_half_batches(loader)
    if is_worker_death(error) and deaths == 1:
        return restarted(loader)
    return restarted(loader, num_workers=0) if is_worker_death(error) and loader.num_workers else None


def _state_of(model: object) -> dict[str, tuple]:
    """Tensor name -> what an eval method must leave as it is: dtype, shape and device, and of parameters more.

    Of these: which object it is (a copy would no longer be shared), whether it is trained, and its values. Of buffers,
    which some models write whenever they run, the values of statistics alone.
    """
    if not isinstance(model, nn.Module):
        return {}
    tensors = model.state_dict(keep_vars=True)
    found: dict[str, tuple] = {}
    for name, tensor in tensors.items():
        layout = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        if isinstance(tensor, nn.Parameter):
            found[name] = (layout, _content(tensor), f"requires_grad {tensor.requires_grad}", id(tensor))
        else:
            found[name] = (layout, _content(tensor) if name.endswith(STATISTICS) else 0)
    return found


def _content(tensor: Tensor) -> int:
    """A sum over the bits of all values: the same in every layout of memory."""
    of_bytes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.layout != torch.strided or tensor.itemsize not in of_bytes:
        return 0
    return int(tensor.detach().view(of_bytes[tensor.itemsize]).sum(dtype=torch.int64))


def _change(before: dict[str, tuple], now: dict[str, tuple]) -> str | None:
    """What of the first changed tensor is another now, in words; None if nothing changed."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not changed:
        return None
    name = min(changed)
    first, second = before.get(name), now.get(name)
    if first is None or second is None or first[0] != second[0]:
        return f"{name} of the model from {first and first[0]} to {second and second[0]}"
    if first[1] != second[1]:
        return f"the values of {name} of the model"
    if first[2] != second[2]:
        return f"{name} of the model from {first[2]} to {second[2]}"
    return f"the parameter {name} of the model for another object"


def _evaluate_once(task: Task, loader: Iterable, model: nn.Module | None) -> float:
    model = task.model if model is None else model
    if isinstance(model, nn.Module):
        model.eval()  # methods forget it
    before = _state_of(model)
    printed = io.StringIO()  # pycocotools prints many lines
    with contextlib.redirect_stdout(printed):
        value = task.eval_method(model, loader)
    if (change := _change(before, _state_of(model))) is not None:
        raise EvalMethodError(task.name, f"a method that changes {change}", READS_ONLY)
    if printed.getvalue():
        log.debug("%s: eval_method printed:\n%s", task.name, printed.getvalue())
    try:
        accuracy = float(value)
    except (TypeError, ValueError):
        accuracy = math.nan
    if not 0 <= accuracy <= 1:
        allowed = "a number in [0, 1], not a percentage" if 1 < accuracy <= 100 else "a number in [0, 1]"
        raise EvalMethodError(task.name, repr(value), allowed)
    return accuracy
