"""Which frames a task takes at its turn, and which are too late: the same rule for the runtime and the simulator.

Frame k arrives for every task k / fps seconds after the start. At its turn a task takes the oldest frames that can
still be answered in time, at most a batch. Older ones are dropped. If none has arrived, the task waits for its next
frame. A task that cannot answer any frame in time takes the newest ones: they count as late.
"""

import math
from dataclasses import dataclass, field

MARGIN = 1.25  # a run is expected to take that much longer than the average one, as times vary
WEIGHT = 0.2  # of the newest run in the average


@dataclass
class Arrivals:
    """The frames of one task that were not taken yet."""

    fps: float
    sla: float | None  # seconds from a frame's arrival to its answer; None: no frame is ever late
    batch: int
    count: float  # frames of the stream; math.inf for one without an end
    following: int = 0  # the oldest frame that was neither taken nor dropped
    expected: float = field(default=0.0)  # seconds of a run

    @property
    def is_exhausted(self) -> bool:
        return self.following >= self.count

    @property
    def next_arrival(self) -> float:
        """When the oldest frame that is left arrives, or arrived."""
        return self.following / self.fps

    def num_arrived(self, now: float) -> int:
        """Frames that arrived until now, taken ones included."""
        return int(min(self.count, math.floor(now * self.fps + 1e-9) + 1))

    def num_wanted(self, now: float) -> int:
        """Frames from the start of the stream that must be there for `take`."""
        return min(self.num_arrived(now), self.following + self.batch) if self.sla is None else self.num_arrived(now)

    def take(self, now: float, after: float = 0.0, ahead: range | None = None) -> tuple[range, int]:
        """(frames to run now, frames that were dropped as too late); at least one frame must have arrived.

        after: seconds that other tasks of its group run on the same frames afterwards, and are to be in time as well.
        ahead: frames that another task of its group ran on just now: taken, if all of them are left and in time.
        """
        oldest, end = self.following, self.num_arrived(now)
        assert end > oldest, "no frame has arrived"
        if ahead is not None and self._can_take(ahead, now, oldest, end):
            taken = ahead
        else:
            first = self._first_in_time(now, oldest, end, after)
            taken = range(first, min(end, first + self.batch))
        self.following = taken.stop
        return taken, taken.start - oldest

    def _can_take(self, frames: range, now: float, oldest: int, end: int) -> bool:
        """Without an SLA no frame is left out for the sake of others."""
        fits = 0 < len(frames) <= self.batch and oldest <= frames.start and frames.stop <= end
        return (
            fits
            and (self.sla is not None or frames.start == oldest)
            and (frames.start >= self._first_in_time(now, oldest, end, 0.0))
        )

    def _first_in_time(self, now: float, oldest: int, end: int, after: float) -> int:
        if self.sla is None:
            return oldest
        expected = MARGIN * (self.expected + after)
        latest = now + expected - self.sla  # a frame that arrived before this would be answered too late
        first = max(oldest, math.ceil(latest * self.fps - 1e-9))
        return first if first < end else max(oldest, end - self.batch)

    def ran(self, seconds: float) -> None:
        """Learns how long a run takes."""
        self.expected = seconds if not self.expected else (1 - WEIGHT) * self.expected + WEIGHT * seconds

    def drop_arrived(self, now: float) -> int:
        """Drops every frame that arrived until now; how many. For the end of a run."""
        end = max(self.following, self.num_arrived(now))
        dropped, self.following = end - self.following, end
        return dropped
