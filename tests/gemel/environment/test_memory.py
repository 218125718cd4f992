"""How much memory there is: that of the machine, or less where a control group allows less."""

import torch

from gemel.environment import memory
from gemel.environment.memory import memory_there, memory_used, peak_memory

CPU = torch.device("cpu")


def with_groups(monkeypatch, folder, own: str, limits: dict[str, str]) -> None:
    for name, limit in limits.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(limit)
    (folder / "own").write_text(own)
    monkeypatch.setattr(memory, "CGROUPS", folder)
    monkeypatch.setattr(memory, "OWN_CGROUPS", folder / "own")


def test_the_lowest_limit_of_the_control_groups_counts(monkeypatch, tmp_path):
    limits = {"a/b/memory.max": "max\n", "a/memory.max": "4096\n", "memory.max": "8192\n"}
    with_groups(monkeypatch, tmp_path, "1:name=systemd:/\n0::/a/b\n", limits)
    assert memory_there(CPU) == 4096


def test_limits_of_the_first_version_are_read_too(monkeypatch, tmp_path):
    limits = {"memory/a/memory.limit_in_bytes": "4096", "memory/memory.limit_in_bytes": str(2**63 - 4096)}
    with_groups(monkeypatch, tmp_path, "4:cpu,memory:/a\n0::/\n", limits)
    assert memory_there(CPU) == 4096


def test_without_a_limit_it_is_the_memory_of_the_machine(monkeypatch, tmp_path):
    with_groups(monkeypatch, tmp_path, "0::/a\n", {"memory.max": "max"})
    assert memory_there(CPU) == memory._memory_of_the_machine() > 1 << 28


def test_what_is_used_grows_with_what_is_held():
    before = memory_used(CPU)
    held = torch.ones(64 << 20)
    assert held.nbytes * 0.9 < memory_used(CPU) - before < held.nbytes * 1.5
    assert peak_memory(CPU) >= memory_used(CPU) * 0.99


class Library:
    """A C library that notes what it is told, or one without that function (musl)."""

    def __init__(self, has_it=True):
        self.told: dict[int, int] = {}
        if has_it:
            self.mallopt = self.told.__setitem__


def told(monkeypatch, library, **environment) -> dict[int, int]:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(memory.os, "environ", environment)
    memory.keep_some_unused()
    return library.told


def test_freed_memory_is_kept_for_later_unless_the_user_decided_that(monkeypatch):
    assert told(monkeypatch, Library()) == {-3: 32 << 20, -1: 128 << 20}
    assert told(monkeypatch, Library(), MALLOC_TRIM_THRESHOLD_="0") == {}
    assert told(monkeypatch, Library(), GLIBC_TUNABLES="glibc.malloc.hugetlb=1") == {}
    assert told(monkeypatch, Library(has_it=False)) == {}
