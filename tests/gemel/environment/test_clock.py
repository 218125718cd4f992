"""The clock of a merge: time over all its runs, the deadline, the request to end."""

import pytest

from gemel.environment.clock import Clock, Interrupted


def test_seconds_include_earlier_runs():
    clock = Clock()
    assert 0 <= clock.seconds < 60 and 0 <= clock.cpu_seconds < 60 and not clock.is_over()
    clock.add_earlier_runs(100.0, 50.0)
    assert 100 <= clock.seconds < 160 and 50 <= clock.cpu_seconds < 110


def test_the_deadline_follows_from_the_time_budget():
    assert Clock(0.0).is_over() and not Clock(60.0).is_over()


def test_the_request_to_end_is_raised():
    asked = []
    clock = Clock(stop_asked=lambda: bool(asked))
    clock.raise_if_interrupted()
    asked.append(True)
    with pytest.raises(Interrupted):
        clock.raise_if_interrupted()
