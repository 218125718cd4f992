"""The store: one safetensors file with every distinct tensor of the workload once, named by content.

Written tensor by tensor, so that memory holds no second copy of the workload. The header is read by safetensors' own
parser; tensors are read from a private memory map: pages come from the disk's cache when they are touched, and a write
(training in place) copies the page for this process alone. Each tensor has a checksum that is computed at the speed of
memory, so that every load finds damage. docs/architecture.md, "Libraries", says why safetensors does not write and map
the file, and why the checksum is not one of xxhash.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemel.forward.modes import Models
from gemel.results_store.files import ResultsError, first_line, naming
from gemel.sharing.memory import named_tensors
from gemel.sharing.precision import rounded_weights
from gemel.sharing.quantisation import Quantised, quantise

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK_BYTES = 16384  # of checksums in new results: summing larger blocks is no faster
_UNRECORDED_BLOCK_BYTES = 4096  # in results of earlier versions, whose manifests do not name it
KNOWN_BLOCK_BYTES = (_UNRECORDED_BLOCK_BYTES, BLOCK_BYTES)
_SMALL_BYTES = 65536
SCALES = ".scale"  # behind the key of a tensor in 8 bits: the key of its scales


class Entry(NamedTuple):
    """A tensor of the store: what it is, and where it lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # in bytes from the start of the file
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


class Store(NamedTuple):
    """A store whose header was read and found valid; none of its tensors has been read yet."""

    file: Path
    bytes: int  # of the whole file
    header_sha256: str
    entries: dict[str, Entry]


# ---- writing --------------------------------------------------------------------------------------------


def name_by_content(
    models: Models, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, dict[str, str]], dict[str, Tensor]]:
    """({task: {state-dict key: store key}}, {store key: CPU tensor}); one store key per tensor object.

    dtype: of the weights (gemel/sharing/precision.py); all other tensors keep theirs. With int8 the tensors hold the
    scales as well, under the key of the weight and SCALES.
    Distinct objects of equal content (two zero biases, say) get a suffix, so that loading never ties what was not tied.
    Raises ResultsError naming task and tensor for a dtype that cannot be stored.
    """
    key_of: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    keys: dict[str, dict[str, str]] = {}
    for task, model in models.items():
        keys[task], rounded = {}, set(map(id, rounded_weights(model, dtype)))
        for name, tensor in named_tensors(model).items():
            if id(tensor) not in key_of:
                if tensor.dtype not in _DTYPE_NAMES:
                    raise ResultsError(
                        f"{task}: {name}: got {tensor.dtype}; allowed: {', '.join(map(str, _DTYPE_NAMES))}"
                    )
                if dtype == torch.int8 and id(tensor) in rounded:
                    parts = {"": (weight := quantise(tensor)).values, SCALES: weight.scale}
                else:
                    parts = {"": tensor.detach().to(dtype) if id(tensor) in rounded else tensor}
                values = {part: _own_storage(own) for part, own in parts.items()}
                key_of[id(tensor)] = _unused(_content_name(*values.values()), tensors)
                tensors |= {key_of[id(tensor)] + part: own for part, own in values.items()}
            keys[task][name] = key_of[id(tensor)]
    return keys, tensors


def _own_storage(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous; copied if it is part of a larger storage, which torch.save would write in full."""
    values = tensor.detach().to("cpu").contiguous()
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()


def _content_name(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()[:32]


def _unused(name: str, taken: Mapping[str, Tensor]) -> str:
    copies = 0
    while (key := name if not copies else f"{name}.{copies}") in taken:
        copies += 1
    return key


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def store_header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The first bytes of a store, and the order of its tensors: multiples of 8 bytes first, so that these are aligned.

    Source of the format: safetensors, "Format" (length of the header as 8 bytes, header as JSON, the tensors' bytes).
    """
    order = sorted(tensors, key=lambda key: (tensors[key].nbytes % 8 != 0, -tensors[key].itemsize, key))
    header, offset = {}, 0
    for key in order:
        tensor, end = tensors[key], offset + tensors[key].nbytes
        header[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text, order


def store_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a store, piece by piece."""
    header, order = store_header(tensors)
    yield header
    for key in order:
        yield raw_bytes(tensors[key])


def checksum_block(record: Mapping[str, Any]) -> int:
    """Bytes of a checksum's block, from the entry `store` of a manifest; one of KNOWN_BLOCK_BYTES in a valid one."""
    return record.get("checksum_block", _UNRECORDED_BLOCK_BYTES)


def checksum(data: memoryview, block: int = BLOCK_BYTES) -> str:
    """64 bits over bytes, as hex; finds accidental damage: truncation, flipped bits, swapped tensors or blocks.

    Up to 64 KiB: BLAKE2b. Above: sum over blocks i of (2 i + 1) x (sum of the block's 64-bit words) modulo 2^64, plus
    BLAKE2b of the rest that fills no block. The factors are odd, so that no single flipped bit is lost, and differ, so
    that two blocks cannot change places unnoticed. Words within one block can: two pages of 4 KiB that change places
    are found if they lie in different blocks. Those within one block, and changes on purpose, are found by the sha256
    of the file, which `verify` compares.
    """
    if data.nbytes <= _SMALL_BYTES:
        return _blake(data).hex()
    num_blocks = data.nbytes // block
    words = torch.frombuffer(data[: num_blocks * block], dtype=torch.int64)
    sums = words.view(num_blocks, -1).sum(1)
    weighted = int(torch.dot(sums, torch.arange(1, 2 * num_blocks, 2)))
    rest = int.from_bytes(_blake(data[num_blocks * block :]), "little")
    return ((weighted + rest) % (1 << 64)).to_bytes(8, "little").hex()


def _blake(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


# ---- weights in 8 bits ----------------------------------------------------------------------------------


def as_loaded(key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor of a store as models hold it: a weight in 8 bits in float32."""
    scale = tensors.get(key + SCALES)
    return tensors[key] if scale is None else Quantised(tensors[key], scale).dequantised()


def entries_as_loaded(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries without those of scales; of weights in 8 bits with the type that models hold them in."""
    return {
        key: entry._replace(dtype=torch.float32) if key + SCALES in entries else entry
        for key, entry in entries.items()
        if not key.endswith(SCALES)
    }


def sizes_with_scales(entries: Mapping[str, Any]) -> dict[str, int]:
    """Key -> bytes of the tensor in the store, those of its scales included; scales have no entry of their own."""
    return {
        key: entry.bytes + (entries[key + SCALES].bytes if key + SCALES in entries else 0)
        for key, entry in entries.items()
        if not key.endswith(SCALES)
    }


# ---- reading --------------------------------------------------------------------------------------------


def open_store(file: Path) -> Store:
    """Reads the header with safetensors' own parser, which also checks that the tensors fill the file without gaps.

    Raises ResultsError naming the file if it is missing, damaged, or holds what `write_results` never writes.
    """
    if not file.is_file():
        raise ResultsError(f"{file}: the manifest names this store, but it is missing")
    try:
        with naming(file, "read"), safe_open(file, framework="numpy") as opened, open(file, "rb") as raw:
            start = raw.read(8)
            header = start + raw.read(int.from_bytes(start, "little"))
            entries = dict(_entries(opened, len(header)))
            size = raw.seek(0, os.SEEK_END)
    except (SafetensorError, ValueError) as error:
        raise ResultsError(f"{file}: its header is damaged, or the file is truncated: {first_line(error)}") from None
    return Store(file, size, hashlib.sha256(header).hexdigest(), entries)


def _entries(opened: safe_open, begin: int) -> Iterator[tuple[str, Entry]]:
    """(store key, entry) of every tensor in the order of the file, the first one at byte `begin`."""
    for key in opened.offset_keys():
        described = opened.get_slice(key)
        shape, dtype = tuple(described.get_shape()), DTYPES.get(described.get_dtype())
        if dtype is None:
            raise ValueError(f"{key}: dtype: got {described.get_dtype()}; allowed: {', '.join(DTYPES)}")
        if begin % dtype.itemsize:
            raise ValueError(f"{key}: a tensor is not aligned")
        end = begin + math.prod(shape, start=dtype.itemsize)
        yield key, Entry(dtype, shape, begin, end)
        begin = end


def read_tensors(store: Store, keys: Iterable[str], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """CPU tensors on a private memory map of the store, each with a storage of its own, after comparing checksums.

    Weights in 8 bits become float32, in memory of their own. record: the entry `store` of a valid manifest. Only the
    pages of these tensors are read. Raises ResultsError naming the file and the first damaged tensor.
    """
    with naming(store.file, "read"), open(store.file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    if len(mapped) != store.bytes:
        raise ResultsError(f"{store.file}: changed while it was read")
    data = memoryview(mapped)
    checksums, block = record["checksums"], checksum_block(record)
    tensors, wanted = {}, dict.fromkeys(keys)
    for key in (key + part for key in wanted for part in ("", SCALES) if key + part in store.entries):
        dtype, shape, begin, end = store.entries[key]
        if checksum(data[begin:end], block) != checksums[key]:
            raise ResultsError(
                f"{store.file}: the checksum of tensor {key} is not the one in the manifest: the file is damaged"
            )
        if begin == end:
            tensors[key] = torch.empty(shape, dtype=dtype)
        else:
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin)
            tensors[key] = flat if len(shape) == 1 else flat.view(shape)
    return {key: as_loaded(key, tensors) for key in wanted}
