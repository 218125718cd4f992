"""State dicts out of the files that training scripts write: with wrappers of many names, prefixes and other content.

Only tensors are taken, and no code of the file is ever run: what else is pickled is read as inert stand-ins.
"""

import logging
import os
import pickle
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "swa", "swa_state_dict")
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "params", *AVERAGED)
MAX_PREFIXES = 4  # of one state dict that are tried, those of the most keys first
MAX_SHOWN = 8
PARALLEL = "module."  # of torch.nn.DataParallel
PLAIN = "a file as torch.save(model.state_dict(), path) writes it"

log = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """A state dict that a file may be meant to hold; left: keys beside it that are not taken."""

    place: str  # such as "'model' without 'module.'"
    state: Any  # name -> tensor, with `_metadata`, as state_dict() gives it
    left: list[str]


class StandIn:
    """Stands for an object of any class while a pickle is read: whatever it is made from is dropped.

    torch fills no containers but plain ones, so objects of subclasses of list and dict are refused.
    """

    is_module = False

    def __new__(cls, *args: object, **kwargs: object) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.is_module = isinstance(state, dict) and "_parameters" in state


def read_candidates(
    path: str | os.PathLike, own: Mapping[str, torch.Tensor], entry: str | None = None
) -> list[Candidate]:
    """The state dicts in a file, the likeliest first; own: the state dict of the model that they are for.

    entry: the key of the file's dictionary to take, such as "model_ema". Raises ValueError naming the file if it cannot
    be read safely or holds none.
    """
    content = _read(path)
    if entry is not None and not (isinstance(content, Mapping) and _is_state(content.get(entry))):
        allowed = f"the key of a state dict in {_describe(content)}"
        raise ValueError(f"{path}: entry: got {entry!r}; allowed: {allowed}")
    found = [
        candidate
        for place, state in _state_dicts(content)
        if entry is None or place == repr(entry)
        for candidate in _without_prefixes(place, state, own)
    ]
    if not found and _module_in(content):
        raise ValueError(f"{path}: cannot be read as weights: it holds {_module_in(content)}; allowed: {PLAIN}")
    if not found:
        raise ValueError(f"{path}: got {_describe(content)}; allowed: a state dict, which maps names to tensors")
    return found


def say_what_was_taken(path: str | os.PathLike, taken: Candidate, others: list[Candidate]) -> None:
    """Logs what was taken of a file where there was a choice, and what was left."""
    parts = []
    if others:
        parts.append(f"{', '.join(other.place for other in others)} would fit as well (entry)")
    if taken.left:
        shown = ", ".join(taken.left[:MAX_SHOWN]) + (", ..." if len(taken.left) > MAX_SHOWN else "")
        parts.append(f"{len(taken.left)} other tensors were left out: {shown}")
    if parts:
        log.warning("%s: the weights are those of %s; %s", path, taken.place or "the file", "; ".join(parts))


# ---- the file -----------------------------------------------------------------------------------------------


def _read(path: str | os.PathLike) -> Any:
    """The content of a file. Raises ValueError naming the file."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return _unpickle(path)
    except pickle.UnpicklingError as error:
        reason = f"it holds more than tensors, in a form that is not read without running code; allowed: {PLAIN}"
        raise ValueError(f"{path}: cannot be read as weights: {reason}") from error
    except Exception as error:  # the unpickler may raise anything on a damaged file
        reason = _first_line(error)
        if "torchscript" in str(error).lower():
            reason = f"it is a TorchScript archive (save torch.jit.load(path).state_dict()); allowed: {PLAIN}"
        raise ValueError(f"{path}: cannot be read as weights: {reason}") from error


def _unpickle(path: str | os.PathLike) -> Any:
    """The content of a file of torch.save, with stand-ins for objects of all classes but torch's own tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it looks like a TorchScript archive, which is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        names = get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(type(name.rpartition(".")[2] or "unnamed", (StandIn,), {}), name) for name in names]
        with safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ---- state dicts --------------------------------------------------------------------------------------------


def _state_dicts(content: Any) -> Iterator[tuple[str, Any]]:
    """(place, state dict) of the file itself and of its keys: WRAPPERS first, then any other."""
    if _is_state(content):
        yield "", content
    elif isinstance(content, Mapping):
        known = [key for key in WRAPPERS if key in content]
        for key in dict.fromkeys([*known, *(key for key in content if isinstance(key, str))]):
            if _is_state(content[key]):
                yield repr(key), content[key]


def _is_state(value: Any) -> bool:
    """Whether a value maps names to tensors."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items())
    )


def _without_prefixes(place: str, state: Any, own: Mapping[str, torch.Tensor]) -> Iterator[Candidate]:
    """The state dict as it is, or without a prefix behind which keys of the model follow."""
    counts: Counter[str] = Counter()
    for key in state:
        starts = [0, *(at + 1 for at, sign in enumerate(key) if sign == ".")]
        counts.update(key[:start] for start in starts if key[start:] in own)
    likely = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix)))[:MAX_PREFIXES]
    if all(key.startswith(PARALLEL) for key in state):  # also where no key of the model follows
        likely = [*dict.fromkeys([*likely, PARALLEL])]
    for prefix in likely or [""]:
        left = [key for key in state if not key.startswith(prefix)]
        if 2 * len(left) > len(state):
            continue  # a part of another model that happens to have the same layers
        kept: Any = OrderedDict((key[len(prefix) :], value) for key, value in state.items() if key.startswith(prefix))
        if (metadata := getattr(state, "_metadata", None)) is not None:
            kept._metadata = OrderedDict(
                (key[len(prefix) :], value) for key, value in metadata.items() if f"{key}.".startswith(prefix)
            )
        said = f"{place or 'the file'} without {prefix!r}" if prefix else place
        yield Candidate(said, kept, left)


def _module_in(content: Any) -> str | None:
    """Where a file holds a whole module, whose tensors are not taken: that would need its code."""
    if isinstance(content, StandIn) and content.is_module:
        return "a whole module (save model.state_dict())"
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, StandIn) and value.is_module:
            return f"a whole module as {key!r} (save its state_dict())"
    return None


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    entries = ", ".join(f"{key}: {type(value).__name__}" for key, value in list(content.items())[:MAX_SHOWN])
    return f"a dictionary of {entries}" if content else "an empty dictionary"
