"""Ends a run on all its ranks when one of them is gone: killed, stuck, or on a machine that fell silent.

Every rank counts up a number of its own in the store through which torchrun's processes found each other, and looks
whether the numbers of the others still move. A collective that fails, and torchrun itself, which ends the others when
one process ends, are quicker as a rule; this finds the rest.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from gemel.environment import ranks

BEAT = 3.0  # seconds
GRACE = 5.0  # seconds
SILENCE = 30.0  # seconds after which a rank counts as gone
EXIT_FAILED = 1
WHAT_NOW = "what was kept is stored, and the same command resumes there, with any number of ranks"


_watches: list["Watch"] = []  # the one of this process, while it works with others


def say_once(text: str) -> None:
    """Prints why a run ends, on standard error; with several ranks, only the first of them to say something does."""
    if not _watches or _watches[-1].is_first_to_say():
        print(text, file=sys.stderr, flush=True)


def leave_it_to_the_first() -> None:
    """Gives the first rank time to say why the run ends: torchrun ends all when one has ended."""
    if not ranks.is_first():
        time.sleep(GRACE)


class Watch:
    """Watches the other ranks from a thread."""

    def __init__(self) -> None:
        self.over = threading.Event()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SILENCE))
        self.run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's --max-restarts: beats of its own
        self.thread = threading.Thread(target=self._watch, name="gemel-alive", daemon=True)

    def is_first_to_say(self) -> bool:
        try:
            return self.store.add(f"gemel/{self.run}/ended", 1) == 1
        except RuntimeError:  # the store went with the rank that is gone
            return True

    def _watch(self) -> None:
        moved = {number: (-1, time.monotonic()) for number in range(ranks.size()) if number != ranks.rank()}
        me = ranks.rank()
        while not self.over.wait(BEAT):
            try:
                self.store.add(f"gemel/{self.run}/beat/{me}", 1)
                for number, (count, since) in moved.items():
                    now = self.store.add(f"gemel/{self.run}/beat/{number}", 0)
                    moved[number] = (now, time.monotonic() if now != count else since)
                    if time.monotonic() - moved[number][1] > SILENCE:
                        self.end(f"rank {number} of {len(moved) + 1} has been silent for {SILENCE:.0f} s: the run ends")
            except RuntimeError:
                if not self.over.is_set():
                    self.end("the process that the ranks meet at is gone: the run ends")

    def end(self, line: str) -> None:
        """Ends this process at once, wherever it is: what lies in the results folder is whole at every moment."""
        say_once(f"{line}\n{WHAT_NOW}")
        os._exit(EXIT_FAILED)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within, the loss of a rank ends this process with one line on standard error and exit code 1."""
    if ranks.size() == 1:
        yield
        return
    watch = Watch()
    in_main_thread = threading.current_thread() is threading.main_thread()
    where = f"rank {ranks.rank()} of {ranks.size()}"

    def terminated(number: int, frame: object) -> None:
        watch.end(f"{where}: ended from outside, as torchrun does it when another rank is gone")

    previous = signal.signal(signal.SIGTERM, terminated) if in_main_thread else None
    _watches.append(watch)
    watch.thread.start()
    try:
        yield
    except ranks.RankLost as error:
        watch.end(f"{where}: another rank is gone ({error})")
    finally:
        watch.over.set()
        watch.thread.join()
        _watches.remove(watch)
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
