"""Fixtures of the benchmarks: a pico workload as a file, and runs that stay in this process."""

import copy
import logging
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import ablation, one_run, runs, strategies
from benchmarks.probes import Probe, load_split, take

QUICK = {"learning_rate": 0.02, "max_epochs": 60, "patience_epochs": 10}
WORKLOAD = """
import sys
sys.path.insert(0, {tests!r})
import torch
from pico import PicoNet, classification_entry

def create_model_dict():
    entries = {{
        "north_pico": classification_entry(PicoNet(3), {accuracies[0]}, batch_size=6),
        "south_pico": classification_entry(PicoNet(4, extra=1), {accuracies[1]}, batch_size=6),
    }}
    for name, entry in entries.items():
        entry["model"].load_state_dict(torch.load({folder!r} + f"/{{name}}.pt", weights_only=True))
    return entries
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Workload files enter sys.path and sys.modules, and a run sets up logging."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("pico_workload", None)
    logging.getLogger(one_run.LOGGER).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def workload_file(trained_entries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workload")
    for name, entry in trained_entries.items():
        torch.save(entry["model"].state_dict(), folder / f"{name}.pt")
    accuracies = [entry["unmerged_acc"] for entry in trained_entries.values()]
    file = folder / "pico_workload.py"
    file.write_text(WORKLOAD.format(tests=str(Path(__file__).parents[1]), folder=str(folder), accuracies=accuracies))
    return file


@pytest.fixture
def arguments(workload_file, datasets, tmp_path):
    flags = ["--workload", str(workload_file), "--datasets", str(datasets), "--out", str(tmp_path / "out")]
    return [*flags, "--tolerance", "0.5", "--device", "cpu", "--time-budget", "60s"]


@pytest.fixture
def quick(monkeypatch):
    """Pico models want a higher learning rate, and more epochs of their few images, than the defaults."""
    for name in ("gemel", "all", "stem"):
        monkeypatch.setitem(strategies.VARIANTS, name, {"strategy": name, **QUICK})
    monkeypatch.setattr(ablation, "FIXED", {"strategy": "all", **QUICK})


class Inline(Executor):
    """Runs what is submitted at once: in one process, two runs at a time would share random generators and stdout."""

    def __init__(self, max_workers):
        super().__init__()

    def submit(self, call, /, *args, **kwargs):
        future = Future()
        future.set_result(call(*args, **kwargs))
        return future


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs the same main function here, which saves seconds of imports; returns the folders that were run."""
    started = []
    monkeypatch.setattr(runs, "ThreadPoolExecutor", Inline)

    def run(command, stdout, stderr, env):
        assert command[1:3] == ["-m", "benchmarks.one_run"] and env["OMP_NUM_THREADS"] == "1"
        started.append(Path(command[3]).name)
        observe = one_run.observe_validations
        with monkeypatch.context() as patch:
            patch.setattr(one_run, "observe_validations", lambda: _attached(observe()))
            return SimpleNamespace(returncode=one_run.main([command[3]]))

    monkeypatch.setattr(runs.subprocess, "run", run)
    return started


def _attached(validations):
    """pytest has set up logging before, so basicConfig does nothing here."""
    logging.getLogger(one_run.LOGGER).addHandler(validations)
    return validations


@pytest.fixture
def probe(tasks, datasets):
    """The pico workload in memory, without the check of a whole workload."""
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()})
    splits = {(s, n): load_split(t, [datasets], s, 0) for s in ("train", "val") for n, t in tasks.items()}
    images = {n: [images for images, _ in take(t, splits["train", n], 6)] for n, t in tasks.items()}
    val = {n: take(t, splits["val", n], None) for n, t in tasks.items()}
    teachers = {n: copy.deepcopy(m) for n, m in models.items()}
    return Probe(tasks, models, teachers, images, val, torch.device("cpu"))
