"""What a person sees while a merge runs: rows, and on a terminal one status line that never stands still.

    round 3: training, step 40 of at most 300, 12 s; about 0:20 more; budget: 1:20 left

Events (gemel/environment/events.py) tell what is going on. A thread of its own writes the status: each second on a
terminal, where it is overwritten in place; each minute as a line of its own where the output is a file.
"""

import math
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from gemel.console.tables import WIDTH, round_header, round_row, wrap
from gemel.environment.clock import Clock
from gemel.environment.events import is_logging_set_up
from gemel.environment.units import clock_time

TERMINAL_INTERVAL, FILE_INTERVAL = 1.0, 60.0  # seconds between two states
CLEAR = "\r\033[K"


class Progress:
    """Prints the rows of a run and its status; use as a context manager. quiet: prints neither.

    Called with every event. stream: where the status goes (standard error, whose terminal is asked for).
    """

    def __init__(self, clock: Clock, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.clock, self.quiet, self.stream = clock, quiet, stream or sys.stderr
        self.on_terminal = self.stream.isatty()
        self.doing, self.since = "starting", time.monotonic()
        self.round: int | None = None
        self.round_began = time.monotonic()
        self.seconds_of_rounds: list[float] = []
        self._lock, self._over = threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        if not self.quiet:
            self._thread = threading.Thread(target=self._keep_showing, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._clear()

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        act: Callable[..., None] | None = getattr(self, f"_on_{kind.replace(' ', '_')}", None)
        if act is not None:
            act(**fields)

    def say(self, text: str) -> None:
        """Prints lines of their own, above the status."""
        if self.quiet:
            return
        with self._lock:
            self._clear()
            print(text, flush=True)

    # ---- events ----------------------------------------------------------------------------------------------

    def _on_doing(self, what: str) -> None:
        self.doing, self.since = what, time.monotonic()

    def _on_warning(self, text: str) -> None:
        if not is_logging_set_up():
            with self._lock:
                self._clear()
                print(wrap(f"warning: {text}"), file=sys.stderr, flush=True)

    def _on_search_begins(self, about_to_do: str) -> None:
        self.say(f"{wrap(about_to_do)}\n\n{round_header()}")
        self._on_doing("preparing the first round")

    def _on_round_begins(self, round: int, what: str, **more: Any) -> None:
        self.round, self.round_began = round, time.monotonic()
        self._on_doing(f"trying {what}")

    def _on_step(self, step: int, max_steps: int) -> None:
        self.doing = f"training, step {step} of at most {max_steps}"

    def _on_validation(self, task: str, accuracy: float, target: float, **more: Any) -> None:
        self._on_doing(f"validating: {task} {accuracy:.3f} of {target:.3f}")

    def _on_kept(self, row: dict[str, Any]) -> None:
        self.seconds_of_rounds.append(row["seconds"])
        self.say(round_row(row))
        self.round = None
        self._on_doing("choosing what to try next")

    _on_undone = _on_out_of_memory = _on_kept

    # ---- the status ------------------------------------------------------------------------------------------

    def status(self) -> str:
        """What is being done, for how long, and what is known of the time that is left."""
        where = f"round {self.round}: " if self.round is not None else ""
        known = "; ".join([f"{time.monotonic() - self.since:.0f} s", *self._left()])
        room = WIDTH - 1 - len(where) - len(known) - 2  # times are never cut, a long name is
        doing = self.doing if len(self.doing) <= room else f"{self.doing[: room - 2]}.."
        return f"{where}{doing}, {known}"

    def _left(self) -> list[str]:
        """From the rounds of this run before, and from the time budget; nothing where neither is known."""
        found = []
        if self.round is not None and self.seconds_of_rounds:
            more = statistics.median(self.seconds_of_rounds[-5:]) - (time.monotonic() - self.round_began)
            if more > 0:
                found.append(f"about {clock_time(more)} more")
        if not math.isinf(self.clock.deadline):
            left = max(0.0, self.clock.deadline - time.monotonic())
            found.append(f"budget: {clock_time(left)} left")
        return found

    def _keep_showing(self) -> None:
        interval = TERMINAL_INTERVAL if self.on_terminal else FILE_INTERVAL
        while not self._over.wait(interval):
            with self._lock:
                text = self.status()
                shown = f"{CLEAR}{text}" if self.on_terminal else f"{text}\n"
                self._write(shown)

    def _clear(self) -> None:
        if self.on_terminal and not self.quiet:
            self._write(CLEAR)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal is gone, or the stream closed: the merge goes on
            self._over.set()
