"""The workload of a benchmark: the embedded default, wrong input, exit codes."""

import argparse

import pytest
import torch

from benchmarks import workloads
from gemel.workload import Problem, WorkloadError


def flags_of(*arguments):
    parser = argparse.ArgumentParser()
    workloads.add_workload_arguments(parser)
    return parser.parse_args(arguments)


def test_without_a_file_the_embedded_default_is_measured(entries, datasets, monkeypatch):
    monkeypatch.setattr(workloads, "create_sample_model_dict", lambda: entries)
    opened = workloads.open_workload(flags_of("--datasets", str(datasets), "--device", "cpu"))
    assert opened.file is None and list(opened.tasks) == list(entries)
    assert opened.roots[0] == datasets and opened.folder_of(opened.tasks["north_pico"]) == datasets / "north_CL"
    assert opened.device == torch.device("cpu")


def test_a_file_is_loaded_instead(workload_file, datasets):
    opened = workloads.open_workload(flags_of("--workload", str(workload_file), "--datasets", str(datasets)), 0.5)
    assert opened.file == str(workload_file) and opened.datasets == str(datasets)
    assert {task.tolerance for task in opened.tasks.values()} == {0.5}


def test_all_problems_are_reported_at_once(entries, tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "create_sample_model_dict", lambda: {**entries, "a b": {}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WorkloadError) as error:
        workloads.open_workload(flags_of("--datasets", str(tmp_path), "--device", "cuda"))
    for problem in ("a b: name", "benchmark: --device", "north_pico: dataset", "east_pico: dataset"):
        assert problem in str(error.value)


def test_exit_codes(capsys):
    def refused():
        raise WorkloadError([Problem("one", "task", "nothing", "a task")])

    assert workloads.run_command(lambda: None) == 0 and workloads.run_command(lambda: ["a failure"]) == 1
    assert workloads.run_command(refused) == 2 and "one: task: got nothing" in capsys.readouterr().err


def test_an_interrupted_benchmark_says_how_to_resume(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert workloads.run_command(interrupted) == 130
    assert "the same command resumes from there" in capsys.readouterr().err
