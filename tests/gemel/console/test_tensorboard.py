"""Scalars for TensorBoard, written by its own writer where it is installed."""

import sys
from types import ModuleType

import pytest

from gemel import options
from gemel.console.tensorboard import TensorBoardLog
from gemel.options import read_options

ROW = {"round": 2, "saved_bytes": 3 << 20, "accuracies": {"north_pico": 0.9}}


class Writer:
    """What SummaryWriter is asked for."""

    written: list

    def __init__(self, folder):
        Writer.written = [folder]

    def add_scalar(self, name, value, step):
        Writer.written.append((name, value, step))

    def flush(self):
        if Writer.written[0] == "full":
            raise OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def writer(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)


def test_rounds_and_validations_are_scalars():
    board = TensorBoardLog("board")
    board("step", {"step": 1})
    board("validation", {"task": "north_pico", "step": 0, "accuracy": 0.45, "target": 0.9, "whole_val": True})
    board("undone", {"row": ROW})
    assert Writer.written == [
        "board",
        ("training/north_pico", 0.5, 1),
        ("saved/MiB", 3.0, 2),
        ("accuracy/north_pico", 0.9, 2),
    ]


def test_what_cannot_be_written_is_a_warning(caplog):
    board = TensorBoardLog("full")
    board("kept", {"row": ROW})
    board("kept", {"row": ROW})
    assert len(Writer.written) == 3 and caplog.text.count("goes on without TensorBoard") == 1


def test_it_is_asked_for_only_where_it_is_installed(monkeypatch):
    for is_there in (True, False):
        monkeypatch.setattr(options, "is_installed", lambda is_there=is_there: is_there)
        chosen, problems = read_options({"tensorboard": "board"})
        assert [p.key for p in problems] == ([] if is_there else ["tensorboard"])
        assert chosen.tensorboard == ("board" if is_there else None)
