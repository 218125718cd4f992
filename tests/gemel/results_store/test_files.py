"""Each call that writes fails in turn; the checkpoint; the lock; temporaries of a killed run."""

import builtins
import copy
import errno
import fcntl
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from results_samples import fresh_models, pico_models, same_state, slim_models, tree, write

from gemel.results_store import files as results_files
from gemel.results_store.checkpoint import read_checkpoint, write_checkpoint
from gemel.results_store.files import ResultsError, leftovers, lock
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.results_store.verify import verify
from gemel.results_store.write import repair, update_run

ROOT = Path(__file__).resolve().parents[3]


class Faults:
    """Counts every call that changes the disk below a folder, and makes one of them fail."""

    def __init__(self, patch, folder: Path, error: int = 0, failing: int = -1):
        self.folder, self.error, self.failing, self.calls = str(folder), error, failing, []
        for name in ("replace", "unlink", "mkdir", "fsync"):
            patch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        patch.setattr(results_files, "open", self.open, raising=False)

    def ask(self, what: str, path: object) -> None:
        if not isinstance(path, int) and not str(path).startswith(self.folder):
            return
        self.calls.append(what)
        if len(self.calls) - 1 == self.failing:
            raise OSError(self.error, os.strerror(self.error), str(path))

    def wrapped(self, name, call):
        def asked(path, *args, **kwargs):
            self.ask(name, path)
            return call(path, *args, **kwargs)

        return asked

    def open(self, path, mode="r", **kwargs):
        if set(mode) & set("wxa+"):
            self.ask("open", path)
            return FaultyFile(builtins.open(path, mode, **kwargs), self)
        return builtins.open(path, mode, **kwargs)


class FaultyFile:
    def __init__(self, file, faults: Faults):
        self.file, self.faults = file, faults

    def write(self, data):
        self.faults.ask("write", self.file.name)
        return self.file.write(data)

    def flush(self):
        self.faults.ask("flush", self.file.name)
        return self.file.flush()

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def changed(models):
    models = copy.deepcopy(models)
    with torch.no_grad():
        models["a_x"].conv1.weight += 1
    return models


def two_models():
    models = pico_models()
    del models["b_x"]
    return models


def first_result(path: Path) -> None:
    write(path, two_models())


def second_result(path: Path) -> None:
    """Another result with one task less over the first one; removes a checkpoint and temporaries."""
    models = changed(two_models())
    del models["c_x"]
    write(path, models)


def damaged(path: Path) -> None:
    write(path, two_models())
    (path / "weights" / "a_x.pt").write_bytes(b"")
    (path / "weights" / "c_x.pt").unlink()
    (path / "workload_stats.json").unlink()
    (path / "weights" / "c_x.pt.tmp").write_bytes(b"left")


def with_checkpoint(path: Path) -> None:
    write(path, two_models())
    write_checkpoint(path, {"step": 1, "weights": torch.zeros(3)})
    (path / "weights" / "c_x.pt.tmp").write_bytes(b"left")


STEPS = {  # (what was there, what is done)
    "first result": (lambda path: None, first_result),
    "second result": (with_checkpoint, second_result),
    "update_run": (with_checkpoint, lambda path: update_run(path, {"seconds": 2})),
    "write_checkpoint": (with_checkpoint, lambda path: write_checkpoint(path, {"step": 2})),
    "repair": (damaged, repair),
}
NAMED = re.compile(r"(merged[\w.-]*|\w+\.pt(\.tmp)?|workload_stats\.json(\.tmp)?|weights|results): cannot be")


def state_of(path: Path) -> dict | None:
    """The weights that the folder holds, as a reader sees them; None if it holds no result."""
    if not (path / "merged.json").exists():
        return None
    models = fresh_models()
    tasks = list(read_manifest(path)["tasks"])
    loaded = load_merged(path, models, tasks=tasks, verify=True)
    return {(name, key): value.clone() for name in tasks for key, value in loaded[name].state_dict().items()}


def equal(a: dict | None, b: dict | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("step", STEPS)
def test_a_refused_write_leaves_a_valid_result_and_names_the_file(step, tmp_path, monkeypatch):
    """ENOSPC and EACCES at every call that writes: the old result or the new one stays valid, with a clear error."""
    prepare, act = STEPS[step]
    counted = tmp_path / "counted" / "results"
    prepare(counted)
    before = state_of(counted)
    with monkeypatch.context() as patch:
        calls = Faults(patch, counted).calls
        act(counted)
    after = state_of(counted)
    assert {"open", "write", "flush", "fsync", "replace"} <= set(calls)
    for error in (errno.ENOSPC, errno.EACCES):
        for failing in range(len(calls)):
            path = tmp_path / f"{error}-{failing}" / "results"
            prepare(path)
            with monkeypatch.context() as patch, pytest.raises(ResultsError) as refused:
                Faults(patch, path, error, failing)
                act(path)
            where = f"{step}: call {failing}, {calls[failing]}: {refused.value}"
            assert NAMED.search(str(refused.value)) and os.strerror(error) in str(refused.value), where
            assert "\n" not in str(refused.value)
            found = state_of(path)
            assert equal(found, before) or equal(found, after), where
            if found is not None and prepare is not damaged and "replace" in calls[:failing]:
                assert [check for check in verify(path) if check.status == "FAIL"] == [], where
            if prepare is with_checkpoint and equal(found, before):
                assert (read_checkpoint(path) or {}).get("step") in (1, 2), where
            if found is not None:  # and the next run puts everything in order
                repair(path)
            act(path)
            assert equal(state_of(path), after) and not list(path.rglob("*.tmp")), where
            if error == errno.ENOSPC:
                assert [check for check in verify(path) if check.status == "FAIL"] == [], where
    print(f"\n{step}: {len(calls)} calls refused, twice each")


def test_temporaries_of_ours_are_found_and_no_others(tmp_path):
    ours = ["merged.json.tmp", "merged.safetensors.tmp", "in_flight.pt.tmp", "weights/a_x.pt.tmp"]
    others = ["notes.tmp", "weights/a.b.pt.tmp", "weights/a_x.tmp"]
    (tmp_path / "weights").mkdir()
    for name in ours + others:
        (tmp_path / name).write_text("x")
    assert sorted(leftovers(tmp_path)) == sorted(ours)


def test_lines_are_appended_behind_one_that_was_cut(tmp_path):
    file = tmp_path / "log.jsonl"
    results_files.append(file, b"one\n")
    results_files.append(file, b"two\n")
    assert file.read_bytes() == b"one\ntwo\n"
    file.write_bytes(b"one\ntw")
    results_files.append(file, b"three\n")
    assert file.read_bytes() == b"one\ntw\nthree\n"
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    with pytest.raises(ResultsError, match=r"link\.jsonl: cannot be written"):
        results_files.append(link, b"four\n")
    assert file.read_bytes() == b"one\ntw\nthree\n"


# ---- the checkpoint -------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    write(tmp_path, pico_models())
    state = {"step": 3, "weights": {"a": torch.rand(3)}, "order": [(1, 2.5), "x", None, True], 7: torch.tensor(1)}
    write_checkpoint(tmp_path, state)
    found = read_checkpoint(tmp_path)
    assert torch.equal(found["weights"]["a"], state["weights"]["a"]) and found["order"] == state["order"]
    assert found["step"] == 3 and type(found["order"][0]) is tuple and found[7] == 1
    with pytest.raises(TypeError, match=r"state\['path'\]: got a PosixPath; allowed: dict, list"):
        write_checkpoint(tmp_path, {"path": tmp_path})
    assert read_checkpoint(tmp_path)["step"] == 3


def test_a_checkpoint_of_another_result_or_a_damaged_one_is_dropped(tmp_path, caplog):
    write(tmp_path, pico_models())
    assert read_checkpoint(tmp_path) is None and not caplog.records
    write_checkpoint(tmp_path, {"step": 3})
    kept = (tmp_path / "in_flight.pt").read_bytes()
    write(tmp_path, changed(pico_models()))
    assert not (tmp_path / "in_flight.pt").exists()
    for content in (kept, kept[:-20], b"", b"garbage"):
        (tmp_path / "in_flight.pt").write_bytes(content)
        with caplog.at_level(logging.WARNING):
            assert read_checkpoint(tmp_path) is None
        assert "in_flight.pt" in caplog.records[-1].message and not (tmp_path / "in_flight.pt").exists()


@pytest.mark.parametrize("failing", [0, 3, 5, 8])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, failing):
    """torch.save writes into the file piece by piece: whichever piece the system refuses, the error is the same."""
    write(tmp_path, pico_models())
    write_checkpoint(tmp_path, {"step": 3})
    with monkeypatch.context() as patch:
        faults = Faults(patch, tmp_path, errno.ENOSPC, failing)
        with pytest.raises(ResultsError, match=r"in_flight\.pt\.tmp: cannot be written: No space left"):
            write_checkpoint(tmp_path, {"step": 4, "weights": [torch.rand(100) for _ in range(4)]})
    assert faults.calls[failing] == ("unlink" if failing == 0 else "write")
    assert read_checkpoint(tmp_path)["step"] == 3 and not leftovers(tmp_path)


def test_a_checkpoint_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    write(tmp_path, pico_models())
    pieces, written = [], results_files.Sink.write
    monkeypatch.setattr(
        results_files.Sink, "write", lambda self, data: pieces.append(memoryview(data).nbytes) or written(self, data)
    )
    weights = [torch.rand(1000) for _ in range(20)]
    write_checkpoint(tmp_path, {"weights": weights})
    assert sum(pieces) > 20 * 4000 > 10 * max(pieces)
    assert all(map(torch.equal, read_checkpoint(tmp_path)["weights"], weights))


def test_the_same_result_written_again_keeps_the_checkpoint(tmp_path):
    write(tmp_path, pico_models())
    write_checkpoint(tmp_path, {"step": 3})
    write(tmp_path, pico_models())
    assert read_checkpoint(tmp_path) == {"step": 3}


# ---- the lock -------------------------------------------------------------------------------------------

TRY = """
import sys
sys.path.insert(0, {root!r})
from gemel.results_store.files import lock
with lock({path!r}):
    print("mine")
"""


def other_process(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", TRY.format(root=str(ROOT), path=str(path))]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_second_process_is_refused_also_after_the_folder_was_renamed(tmp_path):
    path = tmp_path / "results"
    with lock(path):
        (path / "file").write_text("x")
        assert f"{path}: another process is merging into this folder" in other_process(path).stderr
        path.rename(tmp_path / "aside")
        assert "another process" in other_process(tmp_path / "aside").stderr
    assert other_process(tmp_path / "aside").stdout == "mine\n" and tree(tmp_path / "aside") == {"file": b"x"}


def test_a_folder_that_the_lock_made_goes_again_if_nothing_was_written(tmp_path):
    with lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert tree(tmp_path) == {}
    with pytest.raises(KeyError), lock(tmp_path / "a"):
        (tmp_path / "a" / "file").write_text("x")
        raise KeyError
    (tmp_path / "empty").mkdir()
    with lock(tmp_path / "empty"):
        pass
    assert tree(tmp_path) == {"a": b"", "a/file": b"x", "empty": b""}


def test_a_lock_that_cannot_be(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResultsError, match="file: cannot be made: File exists"), lock(tmp_path / "file"):
        pass

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), lock(tmp_path):
        pass
    assert "cannot be locked on this file system" in caplog.text


WITHOUT_FCNTL = """
import sys
sys.modules["fcntl"] = None  # as on Windows, which has no such module
sys.path.insert(0, {root!r})
from gemel import load_merged
from gemel.results_store.files import ResultsError, lock
from gemel.results_store.verify import FAIL, verify
assert sorted(load_merged({path!r}, verify=True)) == ["a_slim", "b_slim"]
assert not [check for check in verify({path!r}) if check.status == FAIL]
try:
    with lock({path!r} + "/new"):
        raise AssertionError("locked")
except ResultsError as error:
    print(error)
"""


def test_without_fcntl_results_are_loaded_and_verified_and_a_merge_says_what_it_needs(tmp_path):
    write(tmp_path, slim_models())
    command = [sys.executable, "-c", WITHOUT_FCNTL.format(root=str(ROOT), path=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/new: cannot be locked: merging needs an operating system with fcntl")
    assert not (tmp_path / "new").exists()


def test_same_models_same_files(tmp_path):
    write(tmp_path / "a", pico_models())
    write(tmp_path / "b", pico_models())
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert same_state(pico_models(), load_merged(tmp_path / "a", fresh_models()))
