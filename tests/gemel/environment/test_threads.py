"""The number of threads follows the idle cores, and what was chosen is kept when a run is resumed."""

import torch

from gemel.environment import threads
from gemel.environment.threads import choose_num_threads, idle_cores, num_threads_set, threads_of_waiting_ranks


def statistics(monkeypatch, tmp_path, *idle_of_100):
    """The system's statistics of so many idle ticks of 100 between two looks, for as many cores as there are."""
    file, total, idle = tmp_path / "stat", 1000, 500
    looks = []

    def look(seconds=0.0):
        nonlocal total, idle
        if looks:
            total, idle = total + 100, idle + idle_of_100[len(looks) - 1]
        looks.append(True)
        file.write_text(f"cpu {total - idle} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 1 1 1\n")

    look()
    monkeypatch.setattr(threads, "STATISTICS", file)
    monkeypatch.setattr(threads.time, "sleep", look)


def test_idle_cores_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    statistics(monkeypatch, tmp_path, 50)
    assert idle_cores() == 4
    statistics(monkeypatch, tmp_path, 1)
    assert idle_cores() == 1, "at least one"
    monkeypatch.setattr(threads, "STATISTICS", tmp_path / "none")
    assert idle_cores() is None


def test_threads_are_never_more_than_torch_has(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "idle_cores", lambda: 64)
    with num_threads_set(2):
        assert choose_num_threads() == 2
        monkeypatch.setattr(threads, "idle_cores", lambda: 1)
        assert choose_num_threads() == 1
        monkeypatch.setattr(threads, "idle_cores", lambda: None)
        assert choose_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        monkeypatch.setattr(threads, "idle_cores", lambda: 1)
        assert choose_num_threads() == 2, "who sets it knows why"
    assert torch.get_num_threads() == 1, "as all tests have it"


def test_a_rank_that_works_alone_takes_the_threads_of_those_that_wait(monkeypatch):
    monkeypatch.setattr(threads, "ranks_here", lambda: 3)
    for cores, expected in ((8, 6), (4, 4), (1, 2)):
        monkeypatch.setattr(threads, "usable_cores", lambda cores=cores: cores)
        with num_threads_set(2), threads_of_waiting_ranks():
            assert torch.get_num_threads() == expected, cores
    assert torch.get_num_threads() == 1, "as before"
