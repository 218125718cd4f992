"""The time of a merge: seconds spent over all its runs, its deadline, and whether the user asked for an end."""

import math
import time
from collections.abc import Callable


class Interrupted(KeyboardInterrupt):
    """The user asked for an end; whatever was in progress was saved first."""


class Clock:
    """Wall and CPU seconds of a merge, counted over the runs that it was resumed in; started when it is made.

    time_budget: seconds of this run after which no new work begins (None: no limit). stop_asked: whether the user asked
    for an end.
    """

    def __init__(self, time_budget: float | None = None, stop_asked: Callable[[], bool] | None = None):
        self._started, self._cpu_started = time.monotonic(), time.process_time()
        self._earlier_seconds = self._earlier_cpu_seconds = 0.0
        self.deadline = math.inf if time_budget is None else self._started + time_budget
        self.stop_asked = stop_asked or (lambda: False)

    def add_earlier_runs(self, seconds: float, cpu_seconds: float) -> None:
        """Counts in what the runs before this one spent."""
        self._earlier_seconds, self._earlier_cpu_seconds = seconds, cpu_seconds

    @property
    def seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def cpu_seconds(self) -> float:
        """Of all threads of this process; loader processes (none on a CPU) are not counted."""
        return self._earlier_cpu_seconds + time.process_time() - self._cpu_started

    def is_over(self) -> bool:
        """Whether the time budget is spent."""
        return time.monotonic() >= self.deadline

    def raise_if_interrupted(self) -> None:
        """Raises Interrupted if the user asked for an end."""
        if self.stop_asked():
            raise Interrupted
