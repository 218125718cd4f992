"""Runs several programs that wait for each other, one at a time: the forward passes of tied models, layer by layer.

A forward pass cannot be left in its middle and taken up again, except in a thread of its own. Only one thread ever
runs, and which one depends on nothing but the order of the programs, so the result is that of a plain loop.
"""

import threading
from collections.abc import Callable, Collection, Hashable, Mapping

import torch

Program = Callable[[Callable[[Hashable], None]], None]  # program(wait); wait(key) sleeps until the key is met


class _Stopped(BaseException):
    """Ends a sleeping program when another one has failed; no `except Exception` of a model's forward may stop it."""


class _Runner:
    """One program in its thread, and whose turn it is."""

    def __init__(self, program: Program):
        self.go, self.asleep = threading.Semaphore(0), threading.Semaphore(0)
        self.key: Hashable | None = None
        self.done = self.stopped = False
        self.error: BaseException | None = None
        self.num_threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self._run, args=(program,), daemon=True)

    def advance(self) -> None:
        """Lets the program run until it sleeps or ends. Raises what it raised."""
        if not self.thread.ident:
            self.thread.start()
        self.go.release()
        self.asleep.acquire()
        if self.error is not None and not isinstance(self.error, _Stopped):
            raise self.error

    def stop(self) -> None:
        if self.thread.ident and not self.done:
            self.stopped = True
            self.go.release()
            self.thread.join()

    def _run(self, program: Program) -> None:
        self.go.acquire()
        try:
            torch.set_num_threads(self.num_threads)  # gradient mode and threads are settings of each thread
            with torch.no_grad():
                program(self._wait)
        except BaseException as error:  # handed to the thread that waits for this one
            self.error = error
        finally:
            self.done = True
            self.asleep.release()

    def _wait(self, key: Hashable) -> None:
        self.key = key
        self.asleep.release()
        self.go.acquire()
        if self.stopped:
            raise _Stopped


def run_coroutines(
    programs: Mapping[Hashable, Program],
    parties: Mapping[Hashable, Collection[Hashable]],
    meet: Callable[[Hashable, list[Hashable]], None],
) -> None:
    """Runs all programs to their ends. Those that call wait(key) sleep until every party of the key sleeps there.

    Then meet(key, present) is called once in the calling thread, and they go on. Programs may meet in different
    orders: where nobody can go on, the key at which most of its parties are present is met without the absent ones;
    a program that comes to a key which was met already should not wait there, else it is met once more.
    Raises what a program or meet raised, after the others were ended. Under torch.no_grad().
    """
    runners = {name: _Runner(program) for name, program in programs.items()}
    awake = list(runners)
    try:
        while awake:
            for name in awake:
                runners[name].advance()
            sleeping: dict[Hashable, list[Hashable]] = {}
            for name, runner in runners.items():
                if not runner.done:
                    sleeping.setdefault(runner.key, []).append(name)
            awake = []
            if sleeping:
                key = max(sleeping, key=lambda key: len(sleeping[key]) / len(parties[key]))  # the first of the best
                meet(key, sleeping[key])
                awake = sleeping[key]
    finally:
        for runner in runners.values():
            runner.stop()
