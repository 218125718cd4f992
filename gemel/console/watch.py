"""Follows a merge from another terminal: reads results/log.jsonl and prints what happens."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemel.console.run_log import RUN_ENDS
from gemel.console.tables import round_header, round_row, wrap
from gemel.environment.units import duration, mib
from gemel.results_store.files import LOG, ResultsError, naming

INTERVAL = 1.0  # seconds


def watch(results_path: str | Path, follow: bool = True) -> None:
    """Prints the events of the last run into the folder; follow: and what comes, until that run ends.

    Raises ResultsError if the folder has no log.
    """
    file = Path(results_path) / LOG
    if not file.is_file():
        raise ResultsError(f"{file}: not found: no merge has begun to search in this folder yet")
    for event in events(file, follow):
        if (text := line_of(event)) is not None:
            print(text, flush=True)
        if follow and event.get("event") == RUN_ENDS:
            return


def events(file: Path, follow: bool) -> Iterator[dict[str, Any]]:
    """The events of the last run, from its beginning; follow: waits for more. Lines that are no event are skipped."""
    with naming(file, "read"), open(file, "rb") as opened:
        known = [event for line in opened.readlines() if (event := _event(line)) is not None]
        begins = [i for i, event in enumerate(known) if event.get("event") == "search begins"]
        yield from known[begins[-1] if begins else 0 :]
        rest = b""
        while follow:
            rest += opened.readline()
            if rest.endswith(b"\n"):
                if (event := _event(rest)) is not None:
                    yield event
                rest = b""
            else:
                time.sleep(INTERVAL)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def line_of(event: dict[str, Any]) -> str | None:
    """What is printed of an event; None: nothing. Raises nothing on a log that somebody changed."""
    try:
        return _line_of(event)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _line_of(event: dict[str, Any]) -> str | None:
    kind = event["event"]
    if kind == "search begins":
        return f"{wrap(event['about_to_do'])}\n\n{round_header()}"
    if kind in ("kept", "undone", "out of memory"):
        return round_row(event["row"])
    if kind == "round begins":
        return f"       {duration(event['seconds'])}: round {event['round']} tries {event['what']}"
    if kind == "validation":
        where = f"step {event['step']}: {event['task']} at {event['accuracy']:.3f} of {event['target']:.3f}"
        return f"       {duration(event['seconds'])}: {where}"
    if kind == "warning":
        return wrap(f"warning: {event['text']}")
    if kind == RUN_ENDS:
        over = "everything was tried" if event["finished"] else "ended before everything was tried"
        return f"{over}; saved {mib(event['saved_bytes'])}"
    return None
