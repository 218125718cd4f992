"""What ranks and large workloads cost, measured at small size."""

from pathlib import Path

import pytest
import torch

from benchmarks import scaling

MINE = """
import torch
from pico import PicoDetector, PicoNet, classification_entry, detection_entry


def create_model_dict():
    models = {{"north_pico": PicoNet(3), "south_pico": PicoNet(4, extra=1), "east_pico": PicoDetector()}}
    entries = {{}}
    for name, model in models.items():
        model.load_state_dict(torch.load({folder!r} + f"/{{name}}.pt", weights_only=True))
        entry = detection_entry if name == "east_pico" else classification_entry
        entries[name] = entry(model, {accuracies}[name], batch_size=6)
    return entries
"""


def test_tasks_are_placed_on_simulated_ranks(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "step_seconds", lambda name: 0.1 + len(name) / 50)
    scaling.print_makespan()
    ratios = [float(line.split(": ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(ratios) == 12 and ratios[0] == 1.0 and max(ratios[:4]) <= 1.1 and min(ratios) >= 1.0


def test_a_plan_is_measured(capsys):
    scaling.print_plan(9)
    assert capsys.readouterr().out.startswith("plan of 9 models: ")


@pytest.mark.exhaustive
def test_merges_by_ranks_and_killed_ranks(trained_entries, datasets, tmp_path, capsys, monkeypatch):
    """With torchrun itself."""
    for name, entry in trained_entries.items():
        torch.save(entry["model"].state_dict(), tmp_path / f"{name}.pt")
    accuracies = {name: entry["unmerged_acc"] for name, entry in trained_entries.items()}
    (tmp_path / "mine.py").write_text(MINE.format(folder=str(tmp_path), accuracies=accuracies))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setattr(scaling, "print_makespan", lambda: None)
    given = ["--workload", str(tmp_path / "mine.py"), "--datasets", str(datasets)]
    scaling.main([*given, "--kills", "2", "--num-models"])
    printed = capsys.readouterr().out
    assert "kept configuration is the same: True; largest difference of a weight: 0" in printed
    assert "ended in time: 2, valid: 2, went on: 2" in printed
