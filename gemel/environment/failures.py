"""Failures of the machine, told apart from errors of a program: no memory left, a loader process that died."""

import re

import torch

WORKER_DIED = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)", re.DOTALL)
# CUDA raises its own class; the CPU allocator a RuntimeError, worded as in torch/csrc (c10/core/impl/alloc_cpu.cpp).
CPU_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")


def is_worker_death(error: BaseException) -> bool:
    """Whether an error means that a loader process died (killed by the system, say) and can be started again."""
    return isinstance(error, RuntimeError) and bool(WORKER_DIED.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(CPU_MEMORY.search(str(error)))
