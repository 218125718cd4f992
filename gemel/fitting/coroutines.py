"""Runs several programs that wait for each other, one at a time: the forward passes of tied models, layer by layer.

A forward pass can be suspended in its middle only if it has a stack of its own, which a greenlet has. All programs run
in the calling thread, with its autocast, gradient mode and current device. Which one runs depends on nothing but the
order of the programs, so the results are those of a plain loop.
"""

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

from gemel.forward.hooks import EndForward, run_until_end

Program = Callable[[], None]
Name = TypeVar("Name", bound=Hashable)
Key = TypeVar("Key", bound=Hashable)


class _Coroutine(greenlet):
    """A program with a name, suspended while it waits for a key."""

    def __init__(self, name: Any, program: Program):
        super().__init__(lambda: run_until_end(program))
        self.name = name
        self.key: Any = None
        self.caller_modes = _modes()


def current() -> Any:
    """The name of the program that is running."""
    return getcurrent().name


def wait(key: Hashable) -> None:
    """Suspends the program that is running until the key is met.

    Modes that it has entered (no_grad, inference_mode, autocast) are left until it continues, then entered again.
    """
    coroutine = getcurrent()
    coroutine.key = key
    with _entered(coroutine.caller_modes):
        coroutine.parent.switch()


def run_coroutines(
    programs: Mapping[Name, Program],
    members: Mapping[Key, Collection[Name]],
    meet: Callable[[Key, list[Name]], None],
    starts: Mapping[Name, Key] | None = None,
    everywhere: Callable[[dict[Key, list[Name]], int], tuple[dict[Key, list[Name]], int]] | None = None,
) -> None:
    """Runs all programs to their ends. One that calls wait(key) waits until all members of the key wait for it.

    programs: by name. members: key -> the names of the programs that come to it. starts: a program named there begins
    when its key was met, or when nobody else can continue. When all members wait, meet(key, present) is called
    once, and the programs in `present` continue. Programs may come to keys in different orders: where nobody can
    continue, the key of which the largest share of the members is waiting is met without the others. A program that
    comes to a key which was met already should not wait for it; if it does, the key is met once more.
    everywhere: where other processes run other programs of the same members: given who waits here for what, and how
    many are yet to begin, it returns the same of all processes. A key all of whose members wait, is met; in which order
    such keys are met, decides nothing. Keys of programs of this process alone are met without asking the others.
    Raises what a program or `meet` raised, after the other programs were ended by EndForward at their wait(key).
    """
    coroutines = [_Coroutine(name, program) for name, program in programs.items()]
    late = {coroutine: starts[coroutine.name] for coroutine in coroutines if starts and coroutine.name in starts}
    ready = [coroutine for coroutine in coroutines if coroutine not in late]
    try:
        while ready or late or everywhere:
            for coroutine in ready:
                coroutine.switch()
            waiting: dict[Key, list[Name]] = {}
            for coroutine in coroutines:
                if not coroutine.dead and coroutine not in late:
                    waiting.setdefault(coroutine.key, []).append(coroutine.name)
            met, num_late = _complete(waiting, members, set(programs)) if everywhere else {}, len(late)
            if not met:
                if everywhere is not None:
                    waiting, num_late = everywhere(waiting, num_late)
                met = (everywhere and _complete(waiting, members)) or most_complete(waiting, members)
            for key, present in met.items():
                meet(key, present)
            if not met and not num_late:
                break
            present_now = {name for present in met.values() for name in present}
            begin = {c for c, start in late.items() if start in met} if met else {*late}
            ready = [c for c in coroutines if c in begin or (c.name in present_now and c not in late)]
            late = {coroutine: start for coroutine, start in late.items() if coroutine not in begin}
    finally:
        for coroutine in coroutines:
            while coroutine:  # is suspended; its own errors while it ends would hide the one that is raised
                with contextlib.suppress(Exception):
                    coroutine.throw(EndForward)


def _complete(
    waiting: Mapping[Key, list[Name]], members: Mapping[Key, Collection[Name]], among: Collection[Name] | None = None
) -> dict[Key, list[Name]]:
    """The keys all of whose members wait; `among`: of those whose members are all among these programs."""
    here = {key: names for key, names in waiting.items() if among is None or all(n in among for n in members[key])}
    return {key: names for key, names in here.items() if len(names) >= len(members[key])}


def most_complete(waiting: Mapping[Key, list[Name]], members: Mapping[Key, Collection[Name]]) -> dict[Key, list[Name]]:
    """The key of which the largest share of the members waits, of equal ones the first; none if nobody waits."""
    key = max(waiting, key=lambda key: len(waiting[key]) / len(members[key]), default=None)
    return {} if key is None else {key: waiting[key]}


# ---- modes of the thread, which all programs share ------------------------------------------------------------------


def _modes() -> tuple:
    """The gradient, inference and autocast modes of now."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    autocast = [(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in devices]
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), autocast, torch.is_autocast_cache_enabled()


@contextlib.contextmanager
def _entered(modes: tuple) -> Iterator[None]:
    """Within, the modes are those that `_modes` returned."""
    is_inference, has_grad, autocast, has_cache = modes
    with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad), contextlib.ExitStack() as stack:
        for device, dtype, is_enabled in autocast:
            stack.enter_context(torch.autocast(device, dtype, is_enabled, has_cache))
        yield
