"""Failures of the machine are recognised by what torch raises, and nothing else is."""

import pytest
import torch

from gemel.environment.failures import is_out_of_memory, is_worker_death


def raised(function):
    with pytest.raises(RuntimeError) as error:
        function()
    return error.value


def test_exhausted_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(raised(lambda: torch.empty(1 << 58, dtype=torch.uint8)))
    assert not is_out_of_memory(raised(lambda: torch.empty(2) + torch.empty(3)))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: not enough memory"))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ],
)
def test_exhausted_memory_of_cuda_and_its_libraries(message):
    assert is_out_of_memory(RuntimeError(message)) and not is_out_of_memory(ValueError(message))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


@pytest.mark.parametrize(
    "message", ["DataLoader worker (pid(s) 7) exited unexpectedly", "DataLoader worker (pid 7) is killed by signal: 9"]
)
def test_the_death_of_a_loader_process(message):
    assert is_worker_death(RuntimeError(message)) and not is_worker_death(ValueError(message))
    assert not is_worker_death(RuntimeError("Caught KeyError in DataLoader worker process 0."))
