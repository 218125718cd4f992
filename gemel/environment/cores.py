"""How many cores this process may use: by its affinity mask and by the CPU quota of its cgroups."""

import os
from pathlib import Path

from gemel.environment import ranks

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MAX_LOADER_PROCESSES = 8  # of all tasks together


def usable_cores() -> int:
    """Cores that this process may use, at least 1: the smallest of what affinity mask and quotas allow."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(int, _quotas())]))


def ranks_here() -> int:
    """Ranks on this machine, this one among them: torchrun says so."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks.size() > 1 else 1


def loader_processes(num_tasks: int) -> int:
    """Loader processes of one task, where the cores are shared fairly among tasks and the ranks of this machine."""
    tasks_here = -(-num_tasks // ranks.size())
    return max(1, min(MAX_LOADER_PROCESSES, usable_cores() // ranks_here()) // max(1, tasks_here))


def _quotas() -> list[float]:
    """Cores that each cgroup of this process, and each one above it, allows on average; none where nothing is said."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    found: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = CGROUPS / controllers
        inner = folder / path.lstrip("/")
        for place in (inner, *inner.parents):
            found += filter(None, [_quota_of(place)])
            if place == folder:
                break
    return found


def _quota_of(folder: Path) -> float | None:
    """Cores that one cgroup allows, by the files of version 2 or 1; None for no limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else max(1.0, int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None
