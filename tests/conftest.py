"""Pico workloads that all tests share: datasets on disk, models trained on them once."""

import copy
import importlib
import sys

import pytest
import torch
from pico import (
    PicoDetector,
    PicoNet,
    classification_entry,
    detection_entry,
    fit,
    write_classification,
    write_detection,
)

from dataset_manager import open_task
from gemel.environment.seeds import derive_seed
from gemel.evaluation.eval_method import evaluate
from gemel.report.html import Html
from gemel.workload import read_workload

CPU = torch.device("cpu")
DRAWING = {"test_any_input", "test_docs", "test_walkthroughs"}  # tests in which charts are drawn


def pytest_runtest_setup():
    """Untrained models of a test are the same ones, whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def undrawn_charts(request, monkeypatch):
    """Rendering the charts of a report takes as long as a small merge: left to the tests of reports and of docs."""
    if "report" not in request.path.parts and request.path.stem not in DRAWING:
        charts = importlib.import_module("gemel.report.charts")
        monkeypatch.setattr(charts, "_svg", lambda *_: Html("<svg></svg>"))


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """A datasets root with two classification sets (one with a test split) and one detection set."""
    root = tmp_path_factory.mktemp("datasets")
    write_classification(root, "north_CL", 3, seed=1, splits=("train", "val", "test"))
    write_classification(root, "south_CL", 4, seed=2)
    write_detection(root, "east_OD", 2, seed=3)
    return root


@pytest.fixture(scope="session")
def trained_entries(datasets):
    """Three trained tasks: classifiers of different depth and a detector; unmerged_acc as measured."""
    torch.manual_seed(0)
    entries = {
        "north_pico": classification_entry(PicoNet(3), batch_size=6),
        "south_pico": classification_entry(PicoNet(4, extra=1), batch_size=6),
        "east_pico": detection_entry(PicoDetector(), batch_size=6),
    }
    tasks, problems = read_workload(entries)
    assert not problems
    for name, task in tasks.items():
        data = open_task(task, [datasets], device=CPU, seed=0, batch_size=6)
        torch.manual_seed(derive_seed(0, name))
        fit(task.model, data.train, 120)
        entries[name]["unmerged_acc"] = evaluate(task, data.val)
        assert entries[name]["unmerged_acc"] > 0.5, f"{name} did not learn"
    return entries


@pytest.fixture
def entries(trained_entries):
    """A fresh copy of the trained workload."""
    return {name: {**entry, "model": copy.deepcopy(entry["model"])} for name, entry in trained_entries.items()}


@pytest.fixture
def tasks(entries):
    return read_workload(entries)[0]


@pytest.fixture
def data(tasks, datasets):
    return {name: open_task(task, [datasets], device=CPU, seed=0, batch_size=6) for name, task in tasks.items()}


@pytest.fixture
def forgets_mine(monkeypatch):
    """The user's file mine.py, and where it was found, are forgotten after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mine", None)
