"""The ablation over a grid of options."""

import json
from dataclasses import replace

import pytest
from benchmark_samples import result

from benchmarks import ablation


def test_ablation_over_the_grid(arguments, quick, in_this_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ablation, "GRID", {"initial_weights": ("first", "mean"), "statistics_batches": (8,)})
    assert ablation.main(arguments) == 0
    printed = capsys.readouterr().out
    assert len(in_this_process) == 2 and "task 2: south_pico" in printed and "1 of 1" in printed
    written = json.loads((tmp_path / "out" / "ablation.json").read_text())["cells"]
    assert list(written) == ["initial_weights=first statistics_batches=8", "initial_weights=mean statistics_batches=8"]
    first, mean = (cell["before_training"] for cell in written.values())
    assert first["north_pico"] == pytest.approx(1, abs=0.35) and first != mean
    for cell in written.values():
        assert cell["reached"] == 1 and cell["reasons"] == ["met"] and cell["seconds"]["median"] > 0
        assert cell["worst_at_end"] >= 1


def test_the_worst_task_at_the_end_of_the_first_round():
    def rows(*values):
        return [
            {"step": step, "task": task, "accuracy": accuracy, "target": 0.8, "seconds": 1.0}
            for step, task, accuracy in values
        ]

    def worst(*values):
        return ablation.worst_at_end(replace(result("x", 0), validations=rows(*values)))

    first = [(0, "a", 0.4), (0, "b", 0.2), (5, "b", 0.6), (9, "b", 0.8)]
    assert worst() is None and worst(*first[:2]) == pytest.approx(0.25)
    assert worst(*first) == pytest.approx(0.5), "a was not looked at again"
    assert worst(*first, (0, "a", 0.1)) == pytest.approx(0.5), "that is the next round"
    assert worst(*first[:2], (0, "a", 0.1)) == pytest.approx(0.25), "so is that"
