"""The time of a merge: seconds spent over all its runs, its deadline, and whether the user asked for an end."""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator

from gemel.environment import ranks
from gemel.environment.interrupts import Interrupted, Interrupts


class TimeOver(BaseException):
    """The time budget is spent. Not an Exception: no `except Exception` of a user's eval method may catch it."""


class Clock:
    """Wall and CPU seconds of a merge, counted over the runs that it was resumed in; started when it is made.

    time_budget: seconds of this run (None: no limit). interrupts: of the user (without: nobody interrupts).
    """

    def __init__(self, time_budget: float | None = None, interrupts: Interrupts | None = None):
        self._started, self._cpu_started = time.monotonic(), time.process_time()
        self._earlier_seconds = self._earlier_cpu_seconds = 0.0
        self.deadline = math.inf if time_budget is None else self._started + time_budget
        self.interrupts = interrupts or Interrupts()

    def add_earlier_runs(self, seconds: float, cpu_seconds: float) -> None:
        """Counts in what the runs before this one spent."""
        self._earlier_seconds, self._earlier_cpu_seconds = seconds, cpu_seconds

    @property
    def seconds(self) -> float:
        """Wall seconds of this run and of those before it."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def cpu_seconds(self) -> float:
        """Of all threads of all ranks' processes; loader processes (none on a CPU) are not counted."""
        return self._earlier_cpu_seconds + ranks.total_of(time.process_time() - self._cpu_started)

    def is_over(self) -> bool:
        """Whether the time budget is spent; all ranks ask, and get the same answer."""
        return not math.isinf(self.deadline) and ranks.any_of(time.monotonic() >= self.deadline)

    def stop_asked(self) -> bool:
        """Whether the user asked for an end; all ranks ask, and get the same answer."""
        return ranks.any_of(self.interrupts.asked())

    def raise_if_over(self) -> None:
        """Raises Interrupted if the user asked for an end, TimeOver if the time budget is spent."""
        if self.stop_asked():
            raise Interrupted
        if self.is_over():
            raise TimeOver

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """For work that can be thrown away at any instant, and undone: fits, alignment, evaluation.

        Within, Ctrl-C raises Interrupted and the end of the time budget TimeOver at once, wherever the program is; only
        the main thread can be interrupted so. Elsewhere, and with several ranks, which wait for each other's results,
        both are looked at between steps.
        """
        self.raise_if_over()
        if ranks.size() > 1:
            yield
            return
        with self.interrupts.immediate(), _alarm_at(self.deadline):
            yield


@contextlib.contextmanager
def _alarm_at(deadline: float) -> Iterator[None]:
    """Raises TimeOver at the deadline, on time.monotonic(), where the system and the thread can."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if math.isinf(deadline) or not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return
    began, previous = time.monotonic(), signal.signal(signal.SIGALRM, _raise_time_over)
    others, interval = 0.0, 0.0  # the alarm of somebody else, such as a test runner
    try:
        others, interval = signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - began))
        with _alarm_again_where_it_is_lost():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, others - (time.monotonic() - began)), interval)


@contextlib.contextmanager
def _alarm_again_where_it_is_lost() -> Iterator[None]:
    """In a destructor, or as an object is collected, Python drops what is raised: the alarm then comes once more."""
    previous = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if issubclass(dropped.exc_type, TimeOver):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            previous(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


def _raise_time_over(number: int, frame: object) -> None:
    raise TimeOver
