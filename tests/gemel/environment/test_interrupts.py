"""Ctrl-C: the first one is deferred, the second is not."""

import os
import signal
import threading

import pytest

from gemel.environment.interrupts import Interrupted, Interrupts


@pytest.fixture
def handler():
    """Python's own handler, as the process that runs the tests may ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_only_the_first_interrupt_is_deferred(handler, capsys):
    interrupts = Interrupts()
    with interrupts.deferred():
        assert not interrupts.asked()
        interrupt()
        assert interrupts.asked()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert "Ctrl-C once more ends at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler


def test_work_that_can_be_thrown_away_ends_at_once(handler, capsys):
    interrupts = Interrupts()
    with interrupts.deferred():
        with pytest.raises(Interrupted), interrupts.immediate():
            interrupt()
            pytest.fail("the interrupt ends the block")
        with pytest.raises(Interrupted), interrupts.immediate():
            pytest.fail("no such work begins after an interrupt")
    assert "ends now" in capsys.readouterr().err


def test_ignored_interrupts_stay_ignored(handler, capsys):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts = Interrupts()
    with interrupts.deferred():
        interrupt()
    assert not interrupts.asked() and not capsys.readouterr().err


def test_other_threads_change_nothing(handler):
    found = []

    def work():
        with Interrupts().deferred():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [handler]
