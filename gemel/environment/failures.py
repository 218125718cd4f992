"""Recognises failures of the machine among exceptions: exhausted memory, and the death of a loader process."""

import re

import torch

WORKER_DIED = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)", re.DOTALL)
# torch's allocator of CUDA memory raises a class of its own. All else is a RuntimeError: of the CPU's allocator
# (c10/core/impl/alloc_cpu.cpp of torch), of CUDA itself, and of its libraries, which allocate work space themselves.
MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|CUDA out of memory"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_\w*ALLOC\w*|CUFFT_ALLOC_FAILED"
)


def is_worker_death(error: BaseException) -> bool:
    """Whether an error means that a loader process died, for example killed by the system."""
    return isinstance(error, RuntimeError) and bool(WORKER_DIED.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the device or of the machine is exhausted."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(MEMORY.search(str(error)))
