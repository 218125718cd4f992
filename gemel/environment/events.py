"""Events of a merge: lower rooms say what happens, whoever listens prints it or writes it down."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]

_listeners: list[Listener] = []


def emit(kind: str, **fields: Any) -> None:
    """Tells every listener that something of this kind happened; fields: JSON values."""
    for listener in tuple(_listeners):
        listener(kind, fields)


@contextlib.contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """Within the block, each listener is called as listener(kind, fields) for every event of this process."""
    _listeners.extend(listeners)
    try:
        yield
    finally:
        for listener in listeners:
            _listeners.remove(listener)


class _AsEvents(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        emit("warning", text=record.getMessage())


@contextlib.contextmanager
def warnings_as_events() -> Iterator[None]:
    """Within the block, what is logged as a warning or worse is an event as well (`warning`, with its `text`)."""
    handler = _AsEvents(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def is_logging_set_up() -> bool:
    """Whether the program handles log records itself; else warnings would be printed by nobody but us."""
    return any(not isinstance(handler, _AsEvents) for handler in logging.getLogger().handlers)
