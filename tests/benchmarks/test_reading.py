"""The time to read images, measured on a pico workload."""

import sys

import torch

from benchmarks import reading
from benchmarks.workloads import Workload
from gemel.datasets.folders import find_dataset, open_split


def test_reading_is_measured_for_classifiers_and_detectors(tasks, datasets):
    workload = Workload(None, str(datasets), tasks, torch.device("cpu"))
    for task in tasks.values():
        cells = reading.row_of(task, workload, 4)
        assert len(cells) == len(reading.HEADER) and cells[0] == task.name
        image = open_split(task, find_dataset(task, [datasets]), "val")[0][0]
        assert cells[2] == f"{image.shape[2]} x {image.shape[1]}"
        decode, transform, cache, forward = (float(cell.removesuffix(" ms")) for cell in cells[3:7])
        assert decode > 0 and forward > 0 and transform >= 0 and cache >= 0


def test_a_broken_workload_is_listed_instead_of_measured(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def create_model_dict():\n    return {'a b': {}}\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "mine", None)  # what is loaded is forgotten again
    assert reading.main(["--workload", str(tmp_path / "mine.py"), "--datasets", str(tmp_path)]) == 2
    assert "a b" in capsys.readouterr().err
