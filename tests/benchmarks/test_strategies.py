"""The comparison of strategies: one real run in a process of its own, others in this one, and the tables."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmark_samples import RESULTS, result

from benchmarks import one_run, strategies
from benchmarks.summary import summarise
from gemel.workload import WorkloadError


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
def test_a_benchmark_is_resumed_and_compares(arguments, quick, in_this_process, tmp_path, capsys):
    first = [*arguments, "--strategies", "gemel"]
    assert strategies.main(first) == 0 and len(in_this_process) == 1
    crashed = tmp_path / "out" / in_this_process[0]
    assert strategies.main([*arguments, "--strategies", "gemel-published", "gemel", "stem", "--seeds", "0", "0"]) == 0
    assert [name.split("-seed")[0] for name in in_this_process] == ["gemel", "gemel-published", "stem"]
    printed = capsys.readouterr().out
    assert "gemel seed 0" in printed and "(run earlier)" in printed and "100 % is what gemel saves" in printed
    written = json.loads((tmp_path / "out" / "strategies.json").read_text())
    assert list(written["strategies"]) == ["gemel-published", "gemel", "stem"]
    level = written["strategies"]["gemel"]["to_level"]["1"]
    assert level["reached"] == 1 and level["seconds_of_gemel"] == {"value": 1.0, "at_least": False}
    assert (tmp_path / "out" / in_this_process[1] / "spec.json").exists()
    (crashed / one_run.FINISHED).unlink()
    assert strategies.main(first) == 0 and in_this_process[3:] == [crashed.name], "a run that crashed is run again"
    assert strategies.main([*first, "--fresh"]) == 0 and in_this_process[4:] == [crashed.name]
    assert strategies.main([*first, "--tolerance", "0.6"]) == 0 and in_this_process[5] != crashed.name


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


def test_summaries_and_tables():
    summaries = {v: summarise(RESULTS, v, 1000, 250, 100) for v in ("gemel", "gemel-published", "quick")}
    assert summaries["quick"]["saved_of_optimal"] == {"median": 0.4, "min": 0.36, "max": 0.88}
    assert summaries["quick"]["test_change"]["median"] == pytest.approx(-0.05)
    assert summaries["quick"]["worst_accuracy_of_target"]["median"] == 1.0
    assert summaries["gemel-published"]["search_finished"] == 0
    lines = strategies.level_table(summaries).splitlines()
    published = [line for line in lines if line.startswith("100 %") and "gemel-published" in line]
    assert len(lines) == 2 + 9 and published[0].count("> budget") == 4
    quick = next(line for line in lines if line.startswith("100 %") and "quick" in line)
    assert "10.0 x" in quick and "> " in quick
    assert "1 of 3" not in strategies.end_table(summaries) and "0 of 3" in strategies.end_table(summaries)


def test_a_result_below_target_is_reported():
    bad = result("all", 0, (1, 100))
    bad.tasks["one"]["val"] = 0.8
    bench = SimpleNamespace(workload=SimpleNamespace(device=torch.device("cpu")))
    assert any(line.startswith("BELOW TARGET: all seed 0") for line in strategies.notes([bad], bench))


def test_unknown_variants_are_all_named_at_once():
    with pytest.raises(WorkloadError, match="2 problems") as error:
        strategies.pick_variants(["best", "gemel", "worst"])
    assert "'best'" in str(error.value) and "'worst'" in str(error.value)


def test_wall_times_from_a_busy_machine_are_flagged():
    bench = SimpleNamespace(workload=SimpleNamespace(device=torch.device("cpu")))
    busy = replace(result("all", 0, (1, 100)), cpu_seconds=30)
    assert "all seed 0 had 30.0 % of one core" in "\n".join(strategies.notes([busy], bench))
    assert "of one core" not in "\n".join(strategies.notes([result("all", 0, (1, 100))], bench))
