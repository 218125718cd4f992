"""The weights of a merged workload, moved into and out of memory block by block.

Opening a workload reads it once as `load_merged` does: every tensor is checked, and models are built. Then no weights
stay in memory: a tensor that is not resident is a parameter on the meta device, which has a shape and no values. A
block is read from the store's file into memory of its own, which is given back when it leaves.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemel.edge.blocks import Blocks, blocks_of, sizes_of
from gemel.forward.arithmetic import run_with_weights_of
from gemel.forward.eight_bits import with_scale
from gemel.results_store.files import ResultsError
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_result
from gemel.results_store.precision import precision_of, warn_if_unjudged, weights_dtype
from gemel.results_store.tensors import SCALES, Entry, raw_bytes

ALIGNMENT = 64


class _Place(NamedTuple):
    """Where a model holds a tensor."""

    module: nn.Module
    holder: dict  # of its parameters, or of its buffers
    name: str
    absent: Tensor  # what stands there while the tensor is not in memory

    def put(self, tensor: Tensor) -> None:
        if type(self.module).__setattr__ is nn.Module.__setattr__:
            self.holder[self.name] = tensor
        else:  # recurrent layers keep a list of their parameters besides
            setattr(self.module, self.name, tensor)


class Weights:
    """The models of a results folder, and which blocks of their weights are in memory.

    models: by task, for tasks whose architecture the results do not name. merged: False gives every task weights of its
    own. through_cache: False asks the system to forget what it read from the file, as a machine with too little memory
    does. Counts what is done: bytes that are in memory, that were at most, and that were read.
    Raises ResultsError as load_merged does, and for a task that is not in the results.
    """

    def __init__(
        self,
        results: str | Path,
        device: torch.device,
        tasks: Sequence[str] | None = None,
        models: Mapping[str, nn.Module] | None = None,
        merged: bool = True,
        through_cache: bool = True,
    ):
        self.manifest, store = read_result(results)
        self.models = load_merged(results, models, tasks=tasks)
        self.device, self.through_cache = device, through_cache
        if weights_dtype(self.manifest) == torch.int8:
            for model in self.models.values():
                run_with_weights_of(model, torch.int8)
        if device.type != "cpu":
            warn_if_unjudged(results, self.manifest, precision_of(self.manifest)["weights"], device.type)
        self.entries: dict[str, Entry] = store.entries
        self.blocks: Blocks = blocks_of(self.manifest["tensors"], sizes_of(store.entries), tuple(self.models), merged)
        self.places = _places_of(self.models, self.manifest["tensors"])
        self.stop = threading.Event()
        self.resident_bytes = self.peak_bytes = self.moved_bytes = 0
        self._is_resident = [False] * len(self.blocks.all)
        self._file = open(store.file, "rb", buffering=0)  # noqa: SIM115  # closed by `close`
        if os.fstat(self._file.fileno()).st_size != store.bytes:
            self.close()
            raise ResultsError(f"{store.file}: changed while it was opened")
        for place in (place for places in self.places.values() for place in places):
            place.put(place.absent)
        for model in self.models.values():
            _move_rest(model, device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def close(self) -> None:
        """Closes the store's file; models keep what is in memory."""
        self._file.close()

    def start_counting(self) -> None:
        """Evicts everything, and counts from zero."""
        self.evict(self.resident())
        self.peak_bytes = self.moved_bytes = 0

    def resident(self) -> list[int]:
        """The blocks that are in memory."""
        return [i for i, is_resident in enumerate(self._is_resident) if is_resident]

    def evict(self, blocks: Iterable[int]) -> None:
        """Gives the memory of these blocks back."""
        for i in blocks:
            assert self._is_resident[i], f"block {i} is not in memory"
            for place in self._places_of_block(i):
                place.put(place.absent)
            self._is_resident[i] = False
            self.resident_bytes -= self.blocks.all[i].bytes

    def load(self, blocks: Iterable[int]) -> None:
        """Reads these blocks into memory, until `stop` is set. Raises ResultsError if the file cannot be read."""
        for i in blocks:
            if self.stop.is_set():
                return
            assert not self._is_resident[i], f"block {i} is in memory already"
            block = self.blocks.all[i]
            tensors = {key: self._parameter(key) for key in block.keys}
            for key, parameter in tensors.items():
                for task in block.users:
                    for place in self.places.get((task, key), ()):
                        place.put(parameter if isinstance(place.absent, nn.Parameter) else parameter.data)
            self._is_resident[i] = True
            self.resident_bytes += block.bytes
            self.moved_bytes += block.bytes
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def _places_of_block(self, i: int) -> Iterator[_Place]:
        block = self.blocks.all[i]
        return (place for key in block.keys for task in block.users for place in self.places.get((task, key), ()))

    def _parameter(self, key: str) -> nn.Parameter:
        """A tensor of the store in new memory on the device, with its scales where it has 8 bits."""
        if key + SCALES in self.entries:
            return with_scale(self._read(key), self._read(key + SCALES))
        return nn.Parameter(self._read(key), requires_grad=False)

    def _read(self, key: str) -> Tensor:
        """A tensor of the store in new memory on the device."""
        entry = self.entries[key]
        tensor = _empty(entry)
        if entry.bytes:
            data = raw_bytes(tensor)
            _read_into(self._file.fileno(), data, entry.begin, self._file.name)
            if not self.through_cache:
                os.posix_fadvise(self._file.fileno(), entry.begin, entry.bytes, os.POSIX_FADV_DONTNEED)
        return tensor if self._stream is None else self._copy_beside(tensor, self._stream)

    def _copy_beside(self, tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
        """A copy on the device, made while kernels of other streams run; it is there when this returns."""
        with torch.cuda.stream(stream):
            copied = tensor.pin_memory().to(self.device, non_blocking=True)
        stream.synchronize()
        copied.record_stream(torch.cuda.default_stream(self.device))
        return copied


def _empty(entry: Entry) -> Tensor:
    """Memory for a tensor, which begins at a multiple of ALIGNMENT bytes plus as many as in the store.

    Kernels of a CPU may add up numbers in another order where memory begins elsewhere. Like this, the answers are bit
    by bit those of `load_merged`, whose tensors lie on a memory map of the store.
    """
    buffer = torch.empty(entry.bytes + ALIGNMENT, dtype=torch.uint8)
    begin = (entry.begin - buffer.data_ptr()) % ALIGNMENT
    return buffer[begin : begin + entry.bytes].view(entry.dtype).view(entry.shape)


def _read_into(descriptor: int, data: memoryview, offset: int, name: str) -> None:
    """Fills the memory from the file; other threads run meanwhile."""
    while data:
        try:
            count = os.preadv(descriptor, [data], offset)
        except OSError as error:
            raise ResultsError(f"{name}: cannot be read: {error.strerror or error}") from error
        if not count:
            raise ResultsError(f"{name}: became shorter while it was in use")
        data, offset = data[count:], offset + count


def _places_of(
    models: Mapping[str, nn.Module], tensors: Mapping[str, Mapping[str, str]]
) -> dict[tuple[str, str], list[_Place]]:
    """(task, store key) -> where the task's model holds that tensor."""
    places: dict[tuple[str, str], list[_Place]] = {}
    for task, model in models.items():
        for prefix, module in model.named_modules(remove_duplicate=False):
            for holder in (module._parameters, module._buffers):
                for name, tensor in holder.items():
                    key = tensors[task].get(f"{prefix}.{name}" if prefix else name)
                    if tensor is not None and key is not None and name not in module._non_persistent_buffers_set:
                        places.setdefault((task, key), []).append(_Place(module, holder, name, _absent(tensor)))
    return places


def _absent(tensor: Tensor) -> Tensor:
    """A stand-in with the shape and no values."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Moves what is not in the store, such as buffers that are computed when a model is built."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
