"""Where the tensors of models are: on the device that computes, or away from it, in host memory or in files.

A tensor keeps its object, shape, layout, type and values, so that ties, optimizers and snapshots hold it as before.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gemel.forward.modes import Models

LEAST_BYTES = 64 << 10  # of a tensor that goes to a file: what is smaller takes little, and is most of the tensors
MAX_FILES = 20_000  # mappings: Linux allows a process 65,530


def movable(models: Models) -> list[Tensor]:
    """Distinct parameters and buffers that have their storage for themselves: no other tensor is a view of it."""
    held = [tensor for model in models.values() for tensor in (*model.parameters(), *model.buffers())]
    distinct = [tensor for tensor in {id(t): t for t in held}.values() if tensor.layout == torch.strided]
    holders = Counter(tensor.untyped_storage().data_ptr() for tensor in distinct)
    return [t for t in distinct if t.numel() and holders[t.untyped_storage().data_ptr()] == 1 and _fills_storage(t)]


def for_files(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The large ones of tensors on a CPU, the largest first, that take at most half of the disk that is free."""
    large = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.nbytes >= LEAST_BYTES]
    found, room = [], shutil.disk_usage(tempfile.gettempdir()).free // 2
    for tensor in sorted(large, key=lambda tensor: -tensor.nbytes)[:MAX_FILES]:
        if tensor.nbytes <= room:
            found.append(tensor)
            room -= tensor.nbytes
    return found


def to_file(tensor: Tensor) -> None:
    """Moves a tensor on a CPU to a temporary file that is mapped into memory.

    The file has no name and goes with the process. Its pages belong to the disk cache: the system can drop them. The
    tensor has a storage of its own there, so that it can be saved as before.
    """
    with tempfile.NamedTemporaryFile(prefix="gemel-parked-") as file:
        storage: Any = torch.UntypedStorage.from_file(file.name, True, _span(tensor) * tensor.element_size())
    parked = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
    tensor.data = parked.copy_(tensor.detach())


def to_host(tensor: Tensor) -> None:
    """Moves a tensor from its device to the memory of the machine."""
    tensor.data = tensor.data.cpu()


def to_memory_of(device: torch.device, tensor: Tensor) -> None:
    """Brings a tensor into the device's own memory: from a file or, if it is no CPU, from the machine's memory."""
    tensor.data = tensor.data.clone() if device.type == "cpu" else tensor.data.to(device)


def _fills_storage(tensor: Tensor) -> bool:
    whole = tensor.untyped_storage().nbytes() == _span(tensor) * tensor.element_size()
    return whole and int(tensor.storage_offset()) == 0


def _span(tensor: Tensor) -> int:
    """Elements of storage from a tensor's first to its last element, both included."""
    return 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
