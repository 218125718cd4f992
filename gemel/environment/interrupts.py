"""Ctrl-C while a merge runs."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


class Interrupts:
    """The first asks for an end after the step in progress, the second ends at once.

    Within `deferred()` the first one only makes `asked()` true; outside, and from the second on, it is the usual
    KeyboardInterrupt. Only the main thread can listen; elsewhere, and where interrupts are ignored, this does nothing.
    """

    def __init__(self) -> None:
        self.count = 0

    def asked(self) -> bool:
        return self.count > 0

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a shell's background, and under nohup
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
        print("\ninterrupted: saving after this step; once more ends at once", file=sys.stderr, flush=True)
