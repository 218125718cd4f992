"""Handles Ctrl-C during a merge."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from gemel.environment import ranks


class Interrupted(KeyboardInterrupt):
    """The user asked for an end."""


class Interrupts:
    """The first interrupt asks for an end after the current step, or raises at once where that is safe.

    Within `deferred()` the first interrupt makes `asked()` true; within `immediate()` inside that, it also raises
    Interrupted at once. The second, and any interrupt outside, raises the usual KeyboardInterrupt. Only the main thread
    can handle signals: in other threads, and in processes that ignore interrupts, both do nothing. With several ranks
    nothing is immediate, as the others would wait for this one; the first of them prints.
    """

    def __init__(self) -> None:
        self.count = 0
        self._raises = False

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

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """For work that can be thrown away at any instant: an interrupt raises Interrupted there and then."""
        before, self._raises = self._raises, ranks.size() == 1
        try:
            if self.asked() and self._raises:
                raise Interrupted
            yield
        finally:
            self._raises = before

    def _on_signal(self, number: int, frame: object) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        end = "ends now" if self._raises else "ends after this step; Ctrl-C once more ends at once"
        if ranks.is_first():
            print(f"\ninterrupted: {end}", file=sys.stderr, flush=True)
        if self._raises:
            raise Interrupted
