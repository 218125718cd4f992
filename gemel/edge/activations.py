"""The peak of activation memory of a forward pass, on any device."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Tracker(TorchDispatchMode):
    """Bytes of storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {_storage(tensor) for tensor in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(output):
            if torch.is_tensor(tensor) and _storage(tensor) not in given:
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.bytes -= self.alive.pop(key)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors that are alive at once within `run`, of those that its operations make.

    What a library allocates within one operation (workspaces, packed weights) is not counted.
    """
    with _Tracker() as tracker:
        run()
    return tracker.peak
