"""Handles Ctrl-C during a merge."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


class Interrupts:
    """The first interrupt asks for an end after the current step; the second ends the process at once.

    Within `deferred()` the first interrupt only makes `asked()` true; the second, and any interrupt outside, raises the
    usual KeyboardInterrupt. Only the main thread can handle signals: in other threads, and in processes that ignore
    interrupts, `deferred()` does nothing.
    """

    def __init__(self) -> None:
        self.count = 0

    def asked(self) -> bool:
        """Whether there was an interrupt."""
        return self.count > 0

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Handles interrupts within the block as described above."""
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in background jobs of a shell and under nohup
        if ignored or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _on_signal(self, number: int, frame: object) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        print("\ninterrupted: saves after this step; Ctrl-C once more ends at once", file=sys.stderr, flush=True)
