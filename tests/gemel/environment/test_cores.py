"""Cores that a process may use."""

import os

import pytest

from gemel.environment import cores


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that says which of 16 cores may be used, and which files the cgroups have."""

    def be(affinity, own, **files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
        monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroups")
        monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
        (tmp_path / "own").write_text(own)
        for path, text in files.items():
            file = tmp_path / "cgroups" / path.replace("__", "/").replace("cpu_", "cpu.")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return be


def test_the_affinity_mask_counts(machine):
    machine(6, "0::/\n", cpu_max="max 100000\n")
    assert cores.usable_cores() == 6


def test_the_quota_of_a_cgroup_and_of_those_above_it_counts(machine):
    machine(16, "0::/box/job\n", box__job__cpu_max="800000 100000\n", box__cpu_max="350000 100000\n")
    assert cores.usable_cores() == 3, "three and a half, of the one above"
    machine(2, "0::/box/job\n")
    assert cores.usable_cores() == 2
    machine(16, "0::/box/job\n", box__job__cpu_max="50000 100000\n")
    assert cores.usable_cores() == 1, "half a core"


def test_the_first_version_of_cgroups_and_nonsense(machine):
    own = "5:cpu,cpuacct:/job\n4:memory:/job\n"
    machine(16, own, **{"cpu,cpuacct__job__cpu_cfs_quota_us": "400000\n"})
    machine(16, own, **{"cpu,cpuacct__job__cpu_cfs_period_us": "100000\n"})
    assert cores.usable_cores() == 4
    machine(16, own, **{"cpu,cpuacct__job__cpu_cfs_quota_us": "-1\n"})
    assert cores.usable_cores() == 16
    machine(16, "0::/x\n", x__cpu_max="what is this\n")
    assert cores.usable_cores() == 16


def test_loader_processes_are_shared_fairly(monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 16)
    assert [cores.loader_processes(n) for n in (1, 2, 3, 20)] == [8, 4, 2, 1]
    monkeypatch.setattr(cores.ranks, "size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [cores.loader_processes(n) for n in (2, 4, 8)] == [8, 4, 2]
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    assert cores.loader_processes(2) == 2
