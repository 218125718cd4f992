"""Chooses the device of a run; no other file does. And what work on it takes."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from gemel.environment import DEVICES


def has_device(name: str) -> bool:
    """Whether this machine has the device that one of DEVICES asks for."""
    return name != "cuda" or torch.cuda.is_available()


def computes_in_16_bits(device_type: str) -> bool:
    """Whether a kind of device has quick kernels for float16 and bfloat16; those of a CPU are slow, or missing."""
    return device_type == "cuda"


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is worth trying bfloat16: some CUDA devices only emulate it. Of a CPU a measurement tells."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def has_tf32(device: torch.device) -> bool:
    """Whether the device multiplies matrices in TF32: CUDA devices from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def products_in_tf32() -> Iterator[None]:
    """Within, matrix products of float32 on CUDA compute in TF32, those of backward passes too; no effect on a CPU.

    It keeps 10 of 23 bits of what is multiplied. Convolutions are not concerned: torch has them in TF32 by default.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory that the device has of its own, free or not; None for the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the device's own time: of a CPU the CPU seconds of this process, else until the device is done."""
    if device.type == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.accelerator.synchronize()
    began = time.perf_counter()
    work()
    torch.accelerator.synchronize()
    return time.perf_counter() - began


def pick_device(name: str = "auto") -> torch.device:
    """The device of a run; "auto" is CUDA if there is a CUDA device, else the CPU.

    Raises ValueError if the name is not one of DEVICES or there is no such device.
    """
    if name not in DEVICES:
        raise ValueError(f"device: got {name!r}, allowed are {', '.join(DEVICES)}")
    if not has_device(name):
        raise ValueError("device: got 'cuda', but torch sees no CUDA device; allowed here are auto, cpu")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")
