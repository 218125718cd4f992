"""Tensors kept in memory up to a limit, and beyond it in a temporary file that has no name."""

import errno
import math
import os
import tempfile
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 32 << 20  # bytes of memory that are taken at a time
ALIGNED = 64  # bytes


class _Place(NamedTuple):
    """Where the bytes of a tensor lie: in a block of memory, or in a file."""

    source: Tensor | IO[bytes]
    offset: int
    num_bytes: int


class Stored:
    """A tensor of a store; `load` gives its values, bit by bit, on the device it was on."""

    def __init__(self, like: Tensor, place: _Place):
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self._place = place

    def __len__(self) -> int:
        return self.shape[0]

    def load(self) -> Tensor:
        """The tensor, not to be written into. Raises OSError where the file cannot be read."""
        source, offset, num_bytes = self._place
        if torch.is_tensor(source):
            return source[offset : offset + num_bytes].view(self.dtype).view(self.shape)
        data = bytearray(num_bytes)
        view, done = memoryview(data), 0
        while done < num_bytes:
            read = os.preadv(source.fileno(), [view[done:]], offset + done)
            if read == 0:
                raise OSError(errno.EIO, "the temporary file of a fit is shorter than what was written to it")
            done += read
        if not num_bytes:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape).to(self.device)


class TensorStore:
    """Takes copies of tensors; `limit` bytes of them lie in memory, what does not fit goes to a temporary file.

    In memory they lie in large blocks: many small tensors that stay would leave holes between what is freed around
    them. The file lies in the folder for temporary files (TMPDIR names another), and is gone when the process is.
    """

    def __init__(self, limit: float = math.inf):
        self.limit = limit
        self.held_bytes = self.file_bytes = 0
        self._file: IO[bytes] | None = None
        self._blocks: dict[torch.device, tuple[Tensor, int]] = {}  # the last one, and how much of it is taken

    def put(self, tensor: Tensor) -> Stored:
        """Keeps a copy of a tensor. Raises OSError if the disk is full, and says what can be done."""
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        place = self._in_memory(data) or self._in_file(data)
        return Stored(tensor, place)

    def _in_memory(self, data: Tensor) -> _Place | None:
        """A copy in a block; None if it does not fit the limit."""
        block, taken = self._blocks.get(data.device, (data[:0], 0))
        if taken + len(data) > len(block):
            size = max(BLOCK, len(data))
            if self.held_bytes + size > self.limit:
                return None
            self.held_bytes += size
            block, taken = torch.empty(size, dtype=torch.uint8, device=data.device), 0
        block[taken : taken + len(data)] = data
        self._blocks[data.device] = block, -(-(taken + len(data)) // ALIGNED) * ALIGNED
        return _Place(block, taken, len(data))

    def _in_file(self, data: Tensor) -> _Place:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="gemel-fit-")  # noqa: SIM115  as long as the store
        values: Any = data.cpu().numpy()
        view, done = memoryview(values), 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], self.file_bytes + done)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                error.errno,
                f"{tempfile.gettempdir()}: no space for {len(view):,} bytes more of the samples that weights are "
                f"fitted on ({self.file_bytes:,} bytes are there): free space there, set TMPDIR, or raise fit_memory",
            ) from error
        place = _Place(self._file, self.file_bytes, len(view))
        self.file_bytes += len(view)
        return place
