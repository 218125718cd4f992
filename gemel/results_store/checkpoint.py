"""The state of the round in flight: one file beside the result, valid only with the store that the round began from."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gemel.environment import ranks
from gemel.results_store import files
from gemel.results_store.files import ResultsError, first_line
from gemel.results_store.manifest import has_results, read_manifest

CHECKPOINT_SHARE = 0.05  # of the time that writing the state of a round in flight may take

log = logging.getLogger(__name__)


def write_checkpoint(path: str | Path, state: dict) -> None:
    """Writes the state of the round in flight, atomically, with the name of the store that the round began from.

    state: dictionaries with str or int keys, lists, tuples, str, numbers, bool, None and tensors, nested to any depth.
    Raises ResultsError if there is no result yet or the file cannot be written, TypeError for anything else in state.
    """
    path = Path(path)
    _check_plain(state, "state")
    store = read_manifest(path)["store"]["file"]
    content = {"store": store, "state": state}
    files.write_by(path / files.IN_FLIGHT, lambda sink: torch.save(content, sink))  # type: ignore[arg-type]


def read_checkpoint(path: str | Path) -> dict | None:
    """The state of the round in flight, with its tensors on the CPU; None if there is none that can be used.

    One that cannot be read, or belongs to another store, is removed with a warning: a round is lost, never a result.
    """
    file = Path(path) / files.IN_FLIGHT
    if not file.is_file():
        return None
    store = read_manifest(path)["store"]["file"] if has_results(path) else None
    try:
        bound_to, state = open_checkpoint(file)
    except ResultsError as error:
        log.warning("%s: that round starts again", error)
    else:
        if bound_to == store:
            return state
        log.warning("%s: belongs to another result: that round starts again", file)
    drop_checkpoint(path)
    return None


def open_checkpoint(file: Path) -> tuple[str, dict]:
    """(name of the store that it belongs to, state). Raises ResultsError if it cannot be read; executes nothing."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise nearly anything
        raise ResultsError(f"{file}: cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict) or "store" not in content:
        raise ResultsError(f"{file}: cannot be read: it is not the state of a round")
    return content["store"], content["state"]


def drop_checkpoint(path: str | Path) -> None:
    """Removes the state of the round in flight, if there is one."""
    files.remove(Path(path) / files.IN_FLIGHT)


def _check_plain(value: object, where: str) -> None:
    """Raises TypeError for values that torch.load(weights_only=True) does not return as they were."""
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):  # no NamedTuple
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not (value is None or type(value) in (str, int, float, bool) or isinstance(value, torch.Tensor)):
        raise TypeError(f"{where}: got a {type(value).__name__}; allowed: dict, list, tuple, str, number, tensor")


def throttled(save: Callable[[dict], None]) -> Callable[[dict, bool], None]:
    """Leaves out saves that would take more than their share of the time, except the one that ends a run."""
    next_save = 0.0

    def throttled(state: dict, last: bool) -> None:
        nonlocal next_save
        began = time.monotonic()
        if ranks.any_of(last or began >= next_save):
            save(state)
            next_save = time.monotonic() + (time.monotonic() - began) / CHECKPOINT_SHARE

    return throttled
