"""The benchmarks on a pico workload: one real run in a process of its own, others in this one, and the arithmetic."""

import json
import logging
import math
import sys
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ablation, one_run, runs, strategies
from benchmarks.conditions import open_bench
from benchmarks.runs import Result
from benchmarks.summary import cost_to, costs_to_level, ratio_to, spread, summarise
from gemel.workload import WorkloadError

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
    logging.getLogger("trainer").setLevel(logging.NOTSET)


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
    logging.getLogger("trainer").addHandler(validations)
    return validations


def test_one_command_compares_strategies_in_processes_of_their_own(arguments, quick, tmp_path, capsys):
    """The only test that really starts processes; what it says must be what is on disk."""
    assert strategies.main([*arguments, "--strategies", "all"]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    written = json.loads((out / "strategies.json").read_text())
    run = written["runs"][0]
    manifest = json.loads((out / run["folder"] / "results" / "merged.json").read_text())
    assert run["saved_bytes"] == manifest["memory"]["saved_bytes"] > 0
    for name, task in manifest["tasks"].items():
        assert run["tasks"][name]["val"] == task["merged_acc"] >= task["target_acc"]
        assert run["tasks"][name]["test"] == task["test_acc"]
        assert run["tasks"][name]["unmerged_test"] == task["unmerged_test_acc"]
    assert {row["task"] for row in run["validations"]} == set(manifest["tasks"]), "the trainer's log was not understood"
    assert run["history"][0]["cpu_seconds"] > 0 and run["same_code"] and not run["reused"]
    assert "all seed 0: saved" in printed and "No run of gemel saved anything" in printed
    assert all((out / name).stat().st_size > 10_000 for name in ("strategies.png", "strategies_cpu.png"))


def test_a_benchmark_is_resumed_and_compares(arguments, quick, in_this_process, tmp_path, capsys):
    first = [*arguments, "--strategies", "gemel"]
    assert strategies.main(first) == 0 and len(in_this_process) == 1
    crashed = tmp_path / "out" / in_this_process[0]
    assert strategies.main([*arguments, "--strategies", "gemel-published", "gemel", "stem", "--seeds", "0", "0"]) == 0
    assert [name.split("-seed")[0] for name in in_this_process] == ["gemel", "gemel-published", "stem"]
    printed = capsys.readouterr().out
    assert "gemel seed 0" in printed and "(run earlier)" in printed and "100 % is what gemel ends with" in printed
    written = json.loads((tmp_path / "out" / "strategies.json").read_text())
    assert list(written["strategies"]) == ["gemel-published", "gemel", "stem"]
    level = written["strategies"]["gemel"]["to_level"]["1"]
    assert level["reached"] == 1 and level["seconds_of_gemel"] == {"value": 1.0, "at_least": False}
    assert (tmp_path / "out" / in_this_process[1] / "spec.json").exists()
    (crashed / one_run.FINISHED).unlink()
    assert strategies.main(first) == 0 and in_this_process[3:] == [crashed.name], "a run that crashed is run again"
    assert strategies.main([*first, "--fresh"]) == 0 and in_this_process[4:] == [crashed.name]
    assert strategies.main([*first, "--tolerance", "0.6"]) == 0 and in_this_process[5] != crashed.name


def test_the_published_settings(arguments, workload_file):
    bench = open_bench(strategies.parse_arguments(arguments))
    published = runs.run_spec(bench, strategies.VARIANTS["gemel-published"], 3)
    ours = runs.run_spec(bench, strategies.VARIANTS["gemel"], 3)
    changed = {k for k, v in ours["settings"]["options"].items() if published["settings"]["options"][k] != v}
    expected = {"learning_rate", "initial_weights", "statistics_batches", "average_decay", "warmup_steps"}
    assert changed == expected and published["settings"]["options"]["seed"] == 3


def test_a_failing_run_is_reported_and_does_not_stop_the_others(arguments, quick, in_this_process, monkeypatch, capsys):
    monkeypatch.setitem(strategies.VARIANTS, "broken", {"strategy": "all", "learning_rate": -1})
    assert strategies.main([*arguments, "--strategies", "broken", "all"]) == 1
    printed = capsys.readouterr().out
    assert "broken seed 0: failed with exit code 2, see" in printed and "all seed 0: saved" in printed


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["--strategies", "gemel", "best"],
            "benchmark: --strategies: got 'best'; allowed: gemel-published, gemel-frozen, adaptive,",
        ),
        (["--datasets", "nowhere"], "north_pico: dataset: got"),
        (["--workload", "nowhere.py"], "which is no file"),
        (["--tolerance", "1.5"], "tolerance: got 1.5"),
    ],
)
def test_wrong_input_is_an_error_before_anything_runs(arguments, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    assert strategies.main([*arguments, *changes]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


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


# ---- the arithmetic -------------------------------------------------------------------------------------


def result(variant: str, seed: int, *course: tuple[float, int], finished: bool = True, seconds: float = 100) -> Result:
    """A run that had kept so many bytes after so many seconds."""
    history = [
        {"seconds": s, "cpu_seconds": 2 * s, "steps": s, "samples": 10 * s, "saved_bytes": saved} for s, saved in course
    ]
    saved = course[-1][1] if course else 0
    task = {"val": 0.9, "test": 0.8, "unmerged_val": 1.0, "unmerged_test": 0.85, "target": 0.9}
    fixed = {"folder": variant, "reused": False, "same_code": True, "rounds": [], "validations": []}
    return Result(
        variant, seed, saved_bytes=saved, finished=finished, seconds=seconds, cpu_seconds=2 * seconds, history=history,
        tasks={"one": task}, **fixed,
    )  # fmt: skip


RESULTS = [
    result("gemel", 0, (10, 50), (40, 100)),
    result("gemel", 1, (20, 150), (60, 200)),
    result("gemel", 2, (80, 100)),
    result("gemel-published", 0, (50, 40), finished=False),
    result("gemel-published", 1, (30, 100), finished=False),
    result("gemel-published", 2, finished=False),
    result("quick", 0, (4, 100)),
    result("quick", 1, (5, 100), (6, 220)),
    result("quick", 2, (7, 90)),
]


def test_levels_are_what_the_baseline_ends_with_seed_by_seed():
    assert costs_to_level(RESULTS, "quick", 0.5, "seconds") == [4, 5, 7]
    assert costs_to_level(RESULTS, "quick", 1.0, "cpu_seconds") == [8, 12, math.inf]
    assert costs_to_level(RESULTS, "gemel", 0.9, "steps") == [40, 60, 80]
    assert cost_to(RESULTS[0], 51, "samples") == 400


def test_ratios_compare_seed_by_seed_and_say_when_they_are_a_lower_bound():
    assert ratio_to(RESULTS, "quick", "gemel", 0.5, "seconds", 100) == (4, False)  # 2.5, 4 and 11.4
    assert ratio_to(RESULTS, "quick", "gemel", 1.0, "seconds", 100) == (10, False)  # 10, 10 and never
    assert ratio_to(RESULTS, "quick", "gemel-published", 1.0, "seconds", 50) == (50 / 6, True)
    assert ratio_to(RESULTS, "gemel-published", "gemel", 1.0, "seconds", 100).value == 0
    assert ratio_to(RESULTS, "quick", "absent", 1.0, "seconds", 100) is None


def test_a_median_over_seeds_is_finite_only_if_most_seeds_reached_the_level():
    assert spread([3, math.inf, 5]).as_json() == {"median": 5, "min": 3, "max": None}
    assert spread([3, math.inf]).as_json() == {"median": None, "min": 3, "max": None}


def test_summaries_and_tables():
    summaries = {v: summarise(RESULTS, v, 1000, 250, 100) for v in ("gemel", "gemel-published", "quick")}
    assert summaries["quick"]["saved_of_optimal"] == {"median": 0.4, "min": 0.36, "max": 0.88}
    assert summaries["quick"]["test_change"]["median"] == pytest.approx(-0.05)
    assert summaries["quick"]["worst_accuracy_of_target"]["median"] == 1.0
    assert summaries["gemel-published"]["ended_by_itself"] == 0
    lines = strategies.level_table(summaries).splitlines()
    published = [line for line in lines if line.startswith("100 %") and "gemel-published" in line]
    assert len(lines) == 2 + 9 and published[0].count("> budget") == 4
    quick = next(line for line in lines if line.startswith("100 %") and "quick" in line)
    assert "10.0 x" in quick and "> " in quick
    assert "1 of 3" not in strategies.end_table(summaries) and "0 of 3" in strategies.end_table(summaries)


def test_a_result_below_target_is_said_aloud():
    bad = result("all", 0, (1, 100))
    bad.tasks["one"]["val"] = 0.8
    bench = SimpleNamespace(device=torch.device("cpu"))
    assert any(line.startswith("BELOW TARGET: all seed 0") for line in strategies.notes([bad], bench))


def test_unknown_variants_are_all_named_at_once():
    with pytest.raises(WorkloadError, match="2 problems") as error:
        strategies.pick_variants(["best", "gemel", "worst"])
    assert "'best'" in str(error.value) and "'worst'" in str(error.value)


def test_wall_times_from_a_busy_machine_are_flagged():
    bench = SimpleNamespace(device=torch.device("cpu"))
    busy = replace(result("all", 0, (1, 100)), cpu_seconds=30)
    assert "all seed 0 had 30.0 % of one core" in "\n".join(strategies.notes([busy], bench))
    assert "of one core" not in "\n".join(strategies.notes([result("all", 0, (1, 100))], bench))


def test_an_interrupted_benchmark_says_how_to_go_on(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert runs.exit_code_of(interrupted) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
