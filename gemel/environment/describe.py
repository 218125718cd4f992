"""What a setting, a function or an object is, as text: equal for what does the same, different where anything differs.

Functions are described by their code, constants, defaults and closures, objects by their class and attributes. Nothing
is called. Addresses, line numbers and file names do not count, so that the text is the same in another process.
"""

import enum
import functools
import hashlib
import random
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
RANDOM = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)  # described by their class
MAX_DEPTH = 12
LONG = 200  # characters of a text that is not replaced by its digest


def describe(value: object) -> str:
    """The text of a value. What cannot be looked into (an open file, an object of a compiled class) is its class."""
    return _describe(value, (), 0)


def digest(value: object) -> str:
    """The sha256 of `describe(value)`, shortened."""
    return _digest(describe(value).encode())


def is_plain(value: object) -> bool:
    """Whether a value is a number, a text or another constant, or made of such values alone."""
    if isinstance(value, (*PLAIN, enum.Enum)):
        return True
    if isinstance(value, Mapping):
        return all(is_plain(part) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple | set | frozenset) and all(map(is_plain, value))


def _describe(value: Any, above: tuple[int, ...], depth: int) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, PLAIN):
        return repr(value)
    if id(value) in above or depth > MAX_DEPTH:
        return "..."
    above, depth = (*above, id(value)), depth + 1

    def inner(part: object) -> str:
        return _describe(part, above, depth)

    return _of_container(value, inner) or _of_callable(value, inner) or _of_object(value, inner)


def _of_container(value: Any, inner: Callable[[object], str]) -> str:
    """The text of a container or an array; "" for other values."""
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            return f"tensor {value.dtype} {list(value.shape)}"
        value = value.detach().cpu()
        if not value.is_sparse and not value.is_quantized:
            flat = value.contiguous().reshape(-1).view(torch.uint8).numpy()
            return f"tensor {value.dtype} {list(value.shape)} {_digest(flat.data)}"
        return f"tensor {value.dtype} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        content = repr(value.tolist()) if value.dtype.hasobject else value.tobytes()
        content = content.encode() if isinstance(content, str) else content
        return f"array {value.dtype} {list(value.shape)} {_digest(content)}"
    if isinstance(value, Mapping):
        pairs = (f"{inner(key)}: {inner(part)}" for key, part in value.items())
        return f"{type(value).__name__}{{{', '.join(pairs)}}}"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}{{{', '.join(sorted(map(inner, value)))}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(inner, value))})"
    return ""


def _of_callable(value: Any, inner: Callable[[object], str]) -> str:
    """The text of a function, a method, a partial function or a class; "" for other values."""
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"method({inner(value.__func__)} of {inner(value.__self__)})"
    if isinstance(value, types.FunctionType):
        return _of_function(value, inner)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, types.BuiltinFunctionType | np.ufunc):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
    return ""


def _of_function(function: types.FunctionType, inner: Callable[[object], str]) -> str:
    if _is_of_a_library(function):
        return f"{function.__module__}.{function.__qualname__}"
    cells = [cell for cell in function.__closure__ or () if _is_filled(cell)]
    parts = [
        _of_code(function.__code__),
        inner(function.__defaults__),
        inner(function.__kwdefaults__),
        inner([cell.cell_contents for cell in cells]),
        inner({name: function.__globals__[name] for name in _global_names(function)}),
    ]
    return f"{function.__qualname__} {_digest(' '.join(parts).encode())}"


def _is_of_a_library(function: types.FunctionType) -> bool:
    """Whether the function lies in an installed package: its version changes it, and its inside is no setting."""
    return any(part in function.__code__.co_filename for part in ("site-packages", "dist-packages", "lib/python"))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _of_code(code: types.CodeType) -> str:
    """Instructions, names and constants, without a documentation string; those of inner functions as well."""
    has_text = code.co_name != "<lambda>" and bool(code.co_consts) and isinstance(code.co_consts[0], str)
    constants = [_of_constant(constant) for constant in code.co_consts[has_text:]]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _of_constant(constant: object) -> str:
    if isinstance(constant, types.CodeType):
        return _of_code(constant)
    if isinstance(constant, tuple):
        return f"({', '.join(map(_of_constant, constant))})"
    return str(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)


def _global_names(function: types.FunctionType) -> list[str]:
    """Names of global settings and functions of the same file that the function uses."""
    found = []
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        own = isinstance(value, types.FunctionType) and value.__module__ == function.__module__
        if name in function.__globals__ and (own or is_plain(value)):
            found.append(name)
    return found


def _of_object(value: Any, inner: Callable[[object], str]) -> str:
    """An object by its class, the code of its own methods that do the work, and its attributes."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, RANDOM):
        return name
    methods = (vars(base).get(key) for base in kind.__mro__ for key in ("__call__", "forward"))
    code = [inner(m) for m in methods if isinstance(m, types.FunctionType) and not _is_of_a_library(m)]
    state = dict(getattr(value, "__dict__", {}))
    slots = (slot for base in kind.__mro__ for slot in _slots_of(base))
    state |= {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    if isinstance(value, nn.Module):
        state.pop("training", None)
    text = f"{name}({inner(state)}) {' '.join(code)}".strip()
    return text if len(text) <= LONG else f"{name} {_digest(text.encode())}"


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(slot for slot in slots if slot not in ("__dict__", "__weakref__"))


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
