"""Seconds over all runs, the deadline, and work that can be thrown away at any instant."""

import signal
import sys
import threading
import time

import pytest

from gemel.environment.clock import Clock, TimeOver
from gemel.environment.interrupts import Interrupted, Interrupts


def test_seconds_count_earlier_runs():
    clock = Clock()
    clock.add_earlier_runs(100.0, 50.0)
    assert 100 <= clock.seconds < 101 and 50 <= clock.cpu_seconds < 51
    assert not clock.is_over() and not clock.stop_asked()


def test_a_spent_budget_is_over():
    clock = Clock(time_budget=-1.0)
    assert clock.is_over()
    with pytest.raises(TimeOver):
        clock.raise_if_over()
    with pytest.raises(TimeOver), clock.interruptible():
        pytest.fail("no work begins")


def test_an_interrupt_is_raised_between_steps():
    interrupts = Interrupts()
    clock = Clock(interrupts=interrupts)
    clock.raise_if_over()
    interrupts.count = 1
    with pytest.raises(Interrupted):
        clock.raise_if_over()


def test_the_end_of_the_budget_ends_work_that_can_be_thrown_away():
    clock, began = Clock(time_budget=0.1), time.monotonic()
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeOver), clock.interruptible():
        try:
            time.sleep(5)
        except Exception:  # as a user's eval method may
            pytest.fail("it is no Exception")
    assert time.monotonic() - began < 1 and signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_work_that_ends_in_time_leaves_no_alarm():
    clock = Clock(time_budget=0.05)
    with clock.interruptible():
        pass
    time.sleep(0.1)


def test_the_alarm_of_somebody_else_still_rings():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with Clock(time_budget=60.0).interruptible():
            pass
        time.sleep(0.2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert rung == [True]


def test_another_thread_is_not_interrupted():
    done = []

    def work():
        with Clock(time_budget=0.05).interruptible():
            time.sleep(0.1)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_the_end_of_the_time_is_not_lost_in_a_destructor():
    """Python drops what is raised there."""
    ended = []

    class Slow:
        def __del__(self):
            ends = time.monotonic() + 0.2
            while time.monotonic() < ends:
                pass
            ended.append("without an alarm")

    hook = sys.unraisablehook
    with pytest.raises(TimeOver), Clock(time_budget=0.05).interruptible():
        Slow()
        ends = time.monotonic() + 5
        while time.monotonic() < ends:
            pass
        pytest.fail("the time budget is spent, and the work goes on")
    assert not ended, "the alarm came within the destructor"
    assert sys.unraisablehook is hook
