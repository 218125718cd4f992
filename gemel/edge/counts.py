"""What became of the frames: counts, latencies, bytes and waiting times of a run or a simulation."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemel.edge.watch import Watch

NUM_LATENCIES = 10000  # of each task, the newest ones: percentiles of a run without an end take no more memory


@dataclass
class TaskCounts:
    """Of one task. Every frame that arrived is processed, late or dropped."""

    processed: int = 0  # answered in time
    late: int = 0  # answered, but too late
    dropped: int = 0  # not answered
    turns: int = 0
    run_seconds: float = 0.0
    swap_seconds: float = 0.0  # during which its turn waited for weights
    watch_seconds: float = 0.0  # in which its unmerged model was read and run, to compare
    latencies: deque = field(default_factory=lambda: deque(maxlen=NUM_LATENCIES))  # seconds, of answered frames

    @property
    def frames(self) -> int:
        return self.processed + self.late + self.dropped

    @property
    def share(self) -> float:
        """Share of frames that were answered in time; 1.0 of no frames."""
        return self.processed / self.frames if self.frames else 1.0

    def answered(self, latency: float, sla: float | None) -> None:
        """Counts a frame."""
        self.latencies.append(latency)
        if sla is None or latency <= sla:
            self.processed += 1
        else:
            self.late += 1

    def summary(self) -> dict[str, Any]:
        latencies = np.array(self.latencies) * 1e3
        percentiles = np.percentile(latencies, (50, 95, 99)).round(3).tolist() if len(latencies) else [None] * 3
        return {
            "processed": self.processed,
            "late": self.late,
            "dropped": self.dropped,
            "latency_ms": dict(zip(("p50", "p95", "p99"), percentiles, strict=True)),
            "turns": self.turns,
            "run_seconds": round(self.run_seconds, 6),
            "swap_seconds": round(self.swap_seconds, 6),
        }


@dataclass
class Counts:
    """Of a whole run or simulation."""

    tasks: dict[str, TaskCounts]
    bytes_moved: int = 0
    peak_resident_bytes: int = 0
    seconds: float = 0.0
    watch: Watch | None = None

    @property
    def share(self) -> float:
        """Share of all frames that were answered in time."""
        frames = sum(task.frames for task in self.tasks.values())
        return sum(task.processed for task in self.tasks.values()) / frames if frames else 1.0

    def summary(self) -> dict[str, Any]:
        """As JSON; times in the units that the keys name."""
        watched = {} if self.watch is None else {"watch": self._watch_summary(self.watch)}
        return {
            **watched,
            "tasks": {name: task.summary() for name, task in self.tasks.items()},
            "bytes_moved": self.bytes_moved,
            "peak_resident_bytes": self.peak_resident_bytes,
            "seconds": round(self.seconds, 6),
            "swap_seconds": round(sum(task.swap_seconds for task in self.tasks.values()), 6),
        }

    def _watch_summary(self, watch: Watch) -> dict[str, Any]:
        return {**watch.summary(), "seconds": round(sum(task.watch_seconds for task in self.tasks.values()), 6)}


def counts_of(tasks: Mapping[str, Any]) -> Counts:
    """Zero of everything."""
    return Counts({name: TaskCounts() for name in tasks})


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.began

    def wait(self, stop: threading.Event, seconds: float) -> None:
        """Waits that long, or until the event is set."""
        stop.wait(seconds)


class CpuClock(Stopwatch):
    """CPU seconds of this process since it was made; waiting takes no time and counts as if it had.

    For measuring on a machine that other programs keep busy. Threads that compute at once count twice.
    """

    def __init__(self) -> None:
        self.began, self.waited = time.process_time(), 0.0

    def __call__(self) -> float:
        return time.process_time() - self.began + self.waited

    def wait(self, stop: threading.Event, seconds: float) -> None:
        self.waited += seconds
