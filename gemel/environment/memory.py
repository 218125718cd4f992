"""How much memory a process may use, and uses: of the machine or its control group (containers), and of a device."""

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from gemel.environment.device import total_memory

STATUS, CGROUPS = Path("/proc/self/status"), Path("/sys/fs/cgroup")  # Linux
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST_MMAP_THRESHOLD, KEPT = 32 << 20, 128 << 20  # bytes; the first is also where glibc itself ends up
OWN_CGROUPS = Path("/proc/self/cgroup")


def memory_there(device: torch.device) -> int | None:
    """Bytes that this process may use: of the device's own memory, else of the machine's or its control group's.

    None where the system does not say.
    """
    own = total_memory(device)
    if own is not None:
        return own
    return min(filter(None, (_memory_of_the_machine(), _limit_of_cgroup())), default=None)


def memory_used(device: torch.device) -> int:
    """Bytes that this process uses now: tensors on a device that has memory of its own, else its resident memory."""
    if total_memory(device) is not None:
        return torch.cuda.memory_allocated(device)
    try:
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return peak_memory(device)


def give_back_unused() -> None:
    """Gives the system the memory that the C library keeps for later, where it can (glibc): it is in no use now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_some_unused() -> None:
    """Lets the C library keep up to KEPT bytes for later instead of giving them back at once, where it can (glibc).

    Activations come and go with every layer: most page faults of a merge, and a twentieth of its time, go into getting
    the same memory again and again (benchmarks/LOG.md, 2026-11-27 Fewer seconds). What the user set stays.
    """
    if not any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
            library.mallopt(M_TRIM_THRESHOLD, KEPT)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has used so far, counted as `memory_used` does."""
    if total_memory(device) is not None:
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _memory_of_the_machine() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _limit_of_cgroup() -> int | None:
    """The lowest limit of the control groups that hold this process; None where there is none."""
    found = []
    for file in _limits_of_cgroups():
        try:
            found.append(int(file.read_text()))
        except (OSError, ValueError):  # "max" is no limit
            continue
    return min(found, default=None)


def _limits_of_cgroups() -> Iterator[Path]:
    """The files with the limits, of the own group and those above it, in version 1 and 2 of control groups."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, own = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top, name = (CGROUPS, "memory.max") if number == "0" else (CGROUPS / "memory", "memory.limit_in_bytes")
        folder = top / own.lstrip("/")
        yield from (path / name for path in (folder, *folder.parents) if path == top or top in path.parents)
