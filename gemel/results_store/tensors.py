"""The store: one safetensors file with every distinct tensor of the workload once, named by content.

Written in a stream, so that no second copy of the workload is held in memory. Read as a private memory map: pages come
from the disk's cache when they are touched, and a write (training in place) copies the page for this process alone.
Each tensor has a checksum that is computed at the speed of memory, so that damage is found wherever a store is loaded.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemel.results_store.files import ResultsError, naming
from gemel.sharing.memory import named_tensors

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
_UNRECORDED_BLOCK_BYTES = 4096  # in results of before, which do not say
KNOWN_BLOCK_BYTES = (_UNRECORDED_BLOCK_BYTES, BLOCK_BYTES)
_SMALL_BYTES = 65536
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors


class Entry(NamedTuple):
    """Where and what a tensor of the store is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # in bytes from the start of the file
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


class Store(NamedTuple):
    """A store whose header has been read and found sound; no tensor has been touched yet."""

    file: Path
    bytes: int  # of the whole file
    header_sha256: str
    entries: dict[str, Entry]


# ---- writing --------------------------------------------------------------------------------------------


def name_by_content(models: Mapping[str, nn.Module]) -> tuple[dict[str, dict[str, str]], dict[str, Tensor]]:
    """({task: {state-dict key: store key}}, {store key: CPU tensor}); one store key per tensor object.

    Distinct objects of equal content (two zero biases, say) get a suffix, so that loading never ties what was not tied.
    """
    key_of: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    keys: dict[str, dict[str, str]] = {}
    for task, model in models.items():
        keys[task] = {}
        for name, tensor in named_tensors(model).items():
            if id(tensor) not in key_of:
                if tensor.dtype not in _DTYPE_NAMES:
                    raise ResultsError(
                        f"{task}: {name}: got {tensor.dtype}; allowed: {', '.join(map(str, _DTYPE_NAMES))}"
                    )
                values = _own_storage(tensor)
                key_of[id(tensor)] = _unused(_content_name(values), tensors)
                tensors[key_of[id(tensor)]] = values
            keys[task][name] = key_of[id(tensor)]
    return keys, tensors


def _own_storage(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous; copied if it is a part of a larger storage, which torch.save would write whole."""
    values = tensor.detach().to("cpu").contiguous()
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()


def _content_name(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()[:32]


def _unused(name: str, taken: Mapping) -> str:
    copies = 0
    while (key := name if not copies else f"{name}.{copies}") in taken:
        copies += 1
    return key


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


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


def checksum_block(record: Mapping) -> object:
    """Bytes of a checksum's block, by what a manifest says of its store; one of KNOWN_BLOCK_BYTES in a valid one."""
    return record.get("checksum_block", _UNRECORDED_BLOCK_BYTES)


def checksum(data: memoryview, block: int = BLOCK_BYTES) -> str:
    """64 bits over bytes, as hex. Guards against accidents (truncation, flipped bits, swapped tensors or blocks).

    Up to 64 KiB: BLAKE2b. Above: sum over blocks of (2 i + 1) x (sum of the block's 64-bit words) modulo 2^64, plus
    BLAKE2b of what is left. The weights are odd, so that no single flipped bit is lost, and differ, so that blocks
    cannot change places. Words within one block can: pages of 4 KiB in each other's place are found across blocks of
    16 KiB, and not within one. That, and any intent, is left to sha256, which `verify` checks.
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


# ---- reading --------------------------------------------------------------------------------------------


def open_store(file: Path) -> Store:
    """Reads and checks the header. Raises ResultsError naming the file if it is missing, or no store that we wrote."""
    if not file.is_file():
        raise ResultsError(f"{file}: the manifest names this store, but it is missing")
    with naming(file, "read"), open(file, "rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(0)
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ResultsError(f"{file}: is no safetensors file, or truncated: it is {size} bytes long")
        text = opened.read(length)
    try:
        header = json.loads(text, parse_float=_refuse_number, parse_constant=_refuse_number)
        if not isinstance(header, dict):
            raise ValueError(f"got a {type(header).__name__}")
        header.pop("__metadata__", None)
        entries = {key: _entry(value, 8 + length) for key, value in header.items()}
        _check_layout(entries, 8 + length, size)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResultsError(f"{file}: its header is damaged: {str(error)[:200]}") from None
    return Store(file, size, hashlib.sha256(start + text).hexdigest(), entries)


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text[:20]} is no whole number")


def _entry(value: dict, data_begin: int) -> Entry:
    dtype, shape, (begin, end) = DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
    if shape and not 0 <= min(shape) <= max(shape) < 1 << 62:
        raise ValueError(f"a tensor of shape {str(shape)[:80]}")
    if end - begin != math.prod(shape, start=dtype.itemsize):
        raise ValueError(f"{end - begin} bytes for {value['dtype']} of shape {str(shape)[:80]}")
    return Entry(dtype, shape, data_begin + begin, data_begin + end)


def _check_layout(entries: Mapping[str, Entry], data_begin: int, size: int) -> None:
    """Tensors follow each other without gap or overlap to the end of the file."""
    position = data_begin
    for entry in sorted(entries.values(), key=itemgetter(2, 3)):
        if entry.begin != position:
            raise ValueError("tensors overlap, or there is a gap between them")
        if entry.begin % entry.dtype.itemsize:
            raise ValueError("a tensor is not aligned")
        position = entry.end
    if position != size:
        raise ValueError(f"it describes {position} bytes, the file has {size}")


def read_tensors(store: Store, keys: Iterable[str], record: Mapping) -> dict[str, Tensor]:
    """CPU tensors on a private memory map of the store, after each was found to have its checksum.

    record: what a valid manifest says of the store. Only the pages of these tensors are touched. Raises ResultsError
    naming the file and the first damaged tensor.
    """
    with naming(store.file, "read"), open(store.file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    if len(mapped) != store.bytes:
        raise ResultsError(f"{store.file}: changed while it was read")
    data = memoryview(mapped)
    checksums, block = record["checksums"], checksum_block(record)
    tensors = {}
    for key in dict.fromkeys(keys):
        dtype, shape, begin, end = store.entries[key]
        if checksum(data[begin:end], block) != checksums[key]:
            raise ResultsError(f"{store.file}: tensor {key} has not the checksum in the manifest: the file is damaged")
        if begin == end:
            tensors[key] = torch.empty(shape, dtype=dtype)
        else:
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin)
            tensors[key] = flat if len(shape) == 1 else flat.view(shape)
    return tensors
