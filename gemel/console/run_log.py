"""results/log.jsonl: every event of a merge, one JSON object a line, appended over all runs into the folder.

An event has `time` (UTC), `seconds` since the merge began (earlier runs included), `event`, and what belongs to it.
A process that is killed loses at most the line that it was writing; the next run begins on a new line.
"""

import json
import logging
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gemel.environment.clock import Clock
from gemel.results_store import files
from gemel.results_store.files import LOG, ResultsError

RUN_ENDS = "run ends"
NOT_LOGGED = ("step", "doing")  # too many; the console shows them
OPENING = ("search begins", RUN_ENDS)  # from then on the results folder holds a result

log = logging.getLogger(__name__)


class RunLog:
    """Writes events into the results folder once the search begins; what comes before waits.

    A log that cannot be written is a warning: it never ends a merge.
    """

    def __init__(self, results_path: Path, clock: Clock) -> None:
        self.file, self.clock = results_path / LOG, clock
        self.waiting: list[bytes] = []
        self.is_open = self.has_failed = False

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        if kind in NOT_LOGGED:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        event = {"time": now, "seconds": round(self.clock.seconds, 3), "event": kind, **_finite(fields)}
        self.waiting.append(json.dumps(event, allow_nan=False, default=str).encode() + b"\n")
        self.is_open = self.is_open or kind in OPENING
        if self.is_open:
            self._write()

    def _write(self) -> None:
        lines, self.waiting = b"".join(self.waiting), []
        if not lines or self.has_failed:
            return
        try:
            files.append(self.file, lines)
        except ResultsError as error:
            self.has_failed = True
            log.warning("%s; the merge goes on without its log", error)


def _finite(value: Any) -> Any:
    """The value with null where JSON has no number for it."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
