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
    monkeypatch.setattr(scaling, "step_seconds", lambda name, num_images: 0.02 + len(name) * num_images / 400)
    monkeypatch.setattr(scaling, "measured_talking", lambda: scaling.Talking(1e-4, 1e-9))
    scaling.print_makespan()
    lines = capsys.readouterr().out.splitlines()[1:]
    ratios = [float(line.split(": ")[1].split()[0]) for line in lines]
    assert len(ratios) == 12 and ratios[0] == 1.0 and max(ratios) <= 1.1 and min(ratios) >= 1.0
    assert "on 8 ranks, 1 of them split" in lines[-1]


def test_what_splitting_costs_counts():
    work = {f"task{i}": scaling.Work(1.0, 8, 0.2) for i in range(3)}
    assert scaling.makespan(work, 2) == (pytest.approx(1.7 / 1.5), 1)
    assert scaling.makespan({task: one._replace(split_seconds=0.6) for task, one in work.items()}, 2)[1] == 0
    assert scaling.measured_work("squeezenet1_1", scaling.Talking(9.0, 0.0)).split_seconds >= 9.0


def test_collectives_of_two_processes_are_measured():
    assert 0 < scaling.measured_talking().small < 1


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
