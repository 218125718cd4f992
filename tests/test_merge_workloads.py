"""The script: flags, exit codes, the workload file, and bad input that leaves nothing behind."""

import argparse
import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico import PicoNet, write_classification
from results_samples import slim_models, write

import merge_workloads
from gemel.console.flags import parse_duration, parse_size
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.results_store.verify import OK, SKIP, verify
from gemel.sample_workload.tasks import dataset_roots
from gemel.workload import WorkloadError
from merge_workloads import main, merge_workload

ROOT = Path(__file__).resolve().parent.parent
WORKLOAD = """
import sys
sys.path.insert(0, {tests!r})
import torch
from pico import PicoNet, classification_entry

def create_model_dict():
    torch.manual_seed(0)
    return {{
        "north_pico": classification_entry(PicoNet(3), {acc}, batch_size=8),
        "south_pico": classification_entry(PicoNet(4), 0.01, batch_size=8),
    }}
"""


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield
    sys.modules.pop("mine", None)


@pytest.fixture
def workload_file(tmp_path):
    def write(acc: float) -> str:
        path = tmp_path / "mine.py"
        path.write_text(WORKLOAD.format(tests=str(ROOT / "tests"), acc=acc))
        return str(path)

    return write


def test_a_workload_file_merges_from_the_shell(workload_file, datasets, tmp_path):
    results = tmp_path / "out"
    command = [sys.executable, str(ROOT / "merge_workloads.py"), "--workload", workload_file(0.01)]
    command += ["--datasets", str(datasets), "--results", str(results), "--strategy", "all", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of optimal" in done.stdout and (results / "merged.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.py", "out"]


def test_exit_code_2_lists_every_problem_and_leaves_no_results_folder(workload_file, tmp_path, capsys):
    results = tmp_path / "out"
    code = main(["--workload", workload_file(1.7), "--datasets", str(tmp_path), "--results", str(results)])
    printed = capsys.readouterr()
    assert code == 2 and not results.exists()
    assert "north_pico: unmerged_acc: got 1.7; allowed: a number in (0, 1]" in printed.err
    assert "south_pico: dataset: got" in printed.err and "2 problems in the workload" in printed.err


@pytest.mark.parametrize("content, message", [(None, "which is no file"), ("x = 1", "without it")])
def test_a_workload_file_that_is_none(tmp_path, capsys, content, message):
    file = tmp_path / "mine.py"
    if content:
        file.write_text(content)
    assert main(["--workload", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_a_workload_file_must_not_take_the_name_of_a_module(tmp_path, capsys):
    file = tmp_path / "trainer.py"
    file.write_text("def create_model_dict(): return {}")
    assert main(["--workload", str(file)]) == 2
    assert "whose name is that of a module in use here; allowed: another file name" in capsys.readouterr().err


def test_a_workload_file_may_be_loaded_again_by_any_path(workload_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in (workload_file(0.9), "mine.py", "./mine.py"):
        assert main(["--workload", path, "--plan"]) == 0, capsys.readouterr().err


def test_plan_trains_nothing_and_writes_nothing(workload_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--workload", workload_file(0.9), "--plan"]) == 0
    assert "could save" in capsys.readouterr().out and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategy": "best"}, "options: strategy: got 'best'; allowed: adaptive, gemel, all, stem"),
        ({"initial_weights": "last"}, "options: initial_weights: got 'last'; allowed: first, mean"),
        ({"adapter_budget": 0.5}, "adapter_budget: got 0.5; allowed: None or a number in [0, 0.45]"),
        ({"adapter_budget": 0.1, "strategy": "gemel"}, "allowed: None or a number in [0, 0] with strategy gemel"),
        ({"learning_rate": -1}, "options: learning_rate: got -1; allowed: a number greater than 0"),
        ({"max_epochs": "many"}, "options: max_epochs: got 'many'; allowed: a number greater than 0"),
        ({"detection_batch_size": 1.5}, "detection_batch_size: got 1.5; allowed: a whole number of at least 2"),
        ({"warmup_steps": -1}, "warmup_steps: got -1; allowed: a whole number of at least 0 (none)"),
        ({"average_decay": 1}, "average_decay: got 1; allowed: a number from 0 (no average), below 1"),
        ({"lr": 0.1}, "options: lr: got 0.1; allowed: one of learning_rate"),
        ({"residual_price": 0.1}, "screening_images, strategy, tolerance, device"),
        (
            {"fit_memory": 1 << 20},
            "fit_memory: got 1048576; allowed: None or bytes, a whole number from 16777216 (16 MiB)",
        ),
        ({"fit_memory": 2.0**31}, "fit_memory: got 2147483648.0; allowed: None or bytes"),
        ({"num_threads": 0}, "options: num_threads: got 0; allowed: None or a whole number from 1 on"),
        ({"device": "tpu"}, "options: device: got 'tpu'; allowed: auto, cpu, cuda"),
        ({"time_budget": 0}, "options: time_budget: got 0; allowed: seconds, more than 0"),
        ({"time_budget": "30m"}, "options: time_budget: got '30m'; allowed: seconds, more than 0"),
        ({"strategy": ["all"]}, "options: strategy: got ['all']; allowed: adaptive, gemel, all, stem"),
        ({"num_workers": -1}, "options: num_workers: got -1; allowed: None or a whole number from 0 on"),
        ({"learning_rate": float("inf")}, "options: learning_rate: got inf; allowed: a number greater than 0"),
        ({"average_decay": 1.5}, "options: average_decay: got 1.5; allowed: a number from 0 (no average), below 1"),
        ({"seed": "x"}, "options: seed: got 'x'; allowed: a whole number from 0 on"),
        ({"tolerance": 1.5}, "options: tolerance: got 1.5; allowed: a number in (0, 1]"),
        ({"memory": 0}, "options: memory: got 0; allowed: None or bytes, a whole number from 1 on"),
        ({"memory": "3MiB"}, "options: memory: got '3MiB'; allowed: None or bytes"),
        ({"pareto": "points.png"}, "options: pareto: got 'points.png'; allowed: None or the name of a .json file"),
        (
            {"pareto": "/no/such/folder/points.json"},
            "allowed: None or the name of a .json file in a folder that exists",
        ),
    ],
)
def test_options_that_are_wrong(entries, datasets, tmp_path, options, message):
    with pytest.raises(WorkloadError) as error:
        merge_workload(entries, tmp_path / "out", datasets=datasets, **options)
    assert message in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(entries, datasets, tmp_path):
    with pytest.raises(WorkloadError, match="device: got 'cuda'; allowed: auto or cpu: torch sees no CUDA device"):
        merge_workload(entries, tmp_path / "out", datasets=datasets, device="cuda")


def test_a_results_folder_with_files_of_the_user_is_refused(entries, datasets, tmp_path):
    theirs = tmp_path / "weights" / "north_pico.pt"
    theirs.parent.mkdir()
    theirs.write_bytes(b"trained for a week")
    with pytest.raises(WorkloadError, match="options: results: got .* which holds weights/north_pico.pt of something"):
        merge_workload(entries, tmp_path, datasets=datasets)
    assert theirs.read_bytes() == b"trained for a week"


class NoLoss(PicoNet):
    """Right in eval mode, wrong in training; and it counts in a buffer, as batch normalisation does."""

    def forward(self, images):
        logits = super().forward(images)
        return [logits] if self.training else logits


def test_a_model_that_cannot_be_trained_is_found_before_anything_is_written(entries, datasets, tmp_path):
    entries["south_pico"]["model"] = NoLoss(4)
    states = {name: copy.deepcopy(entry["model"].state_dict()) for name, entry in entries.items()}
    with pytest.raises(WorkloadError) as error:
        merge_workload(entries, tmp_path / "out", datasets=datasets, device="cpu")
    (problem,) = error.value.problems
    assert str(problem).startswith("south_pico: model: got ValueError in training: south_pico: model: got list")
    assert not (tmp_path / "out").exists()
    for name, before in states.items():
        now = entries[name]["model"].state_dict()
        assert all(torch.equal(value, now[key]) for key, value in before.items())


@pytest.mark.parametrize("here", [False, True])
def test_a_damaged_manifest_is_named_and_fresh_keeps_it_aside(entries, datasets, tmp_path, monkeypatch, here):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "merged.json").write_text("{")
    monkeypatch.chdir(tmp_path / "out")
    results = "." if here else tmp_path / "out"
    options = {"datasets": datasets, "device": "cpu", "strategy": "all", "tolerance": 0.01}
    with pytest.raises(WorkloadError, match="results: got .*merged.json: cannot be read.* allowed: .*--fresh"):
        merge_workload(entries, results, **options)
    manifest = merge_workload(entries, results, fresh=True, **options)
    assert (tmp_path / "out-previous-1" / "merged.json").read_text() == "{"
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize(
    "has_results, said", [(True, "is stored, and the same command resumes"), (False, "nothing was")]
)
def test_an_interrupted_run_says_how_to_go_on(has_results, said, monkeypatch, capsys, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_workloads, "create_sample_model_dict", interrupted)
    if has_results:
        write(tmp_path, slim_models())
    assert main(["--results", str(tmp_path)]) == 130
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("45", 45)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "0m", "-3m", "3 days"])
def test_durations_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize(
    "text, size",
    [
        *(("600MiB", 600 << 20), ("1.5GiB", 3 << 29), ("800MB", 800_000_000), ("2 KB", 2000)),
        *(("1000", 1000), ("70B", 70), ("0.5KiB", 512)),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0MiB", "-3MiB", "3M", "600 megs", "3iB", "1TiB"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: a size such as 600MiB"):
        parse_size(text)


def test_any_other_failure_is_exit_code_1(workload_file, datasets, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    command = [sys.executable, str(ROOT / "merge_workloads.py"), "--workload", workload_file(0.01)]
    command += ["--datasets", str(datasets), "--results", str(blocked / "results"), "--device", "cpu"]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 1


# ---- paths, and what is said of datasets --------------------------------------------------------------------


def test_what_was_passed_over_is_printed_under_the_table(entries, datasets, tmp_path, capsys):
    shutil.copytree(datasets, tmp_path / "datasets")
    (tmp_path / "datasets" / "north_CL" / "train" / "class0" / "raw.heic").write_bytes(b"x")
    merge_workload(
        {"north_pico": entries["north_pico"]}, tmp_path / "out", datasets=tmp_path / "datasets", device="cpu"
    )
    table, said, _ = capsys.readouterr().out.split("\n\n", 2)
    assert "in all; sharing every identical layer would save" in table
    what = "a file .heic was passed over, as it is no image (such as class0/raw.heic)"
    assert said.splitlines() == ["of the datasets:", f"  north_pico: {what}"]


def test_a_tilde_is_the_home_folder(entries, datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    os.symlink(datasets, tmp_path / "data")
    merge_workload({"north_pico": entries["north_pico"]}, "~/out", datasets="~/data", device="cpu")
    assert (tmp_path / "out" / "merged.json").is_file() and not (tmp_path / "~").exists()
    assert set(load_merged("~/out", {"north_pico": PicoNet(3)})) == {"north_pico"}
    assert {check.status for check in verify("~/out")} <= {OK, SKIP}


@pytest.mark.parametrize("paths", [{"datasets": 3}, {"results_path": None}, {"results_path": 7, "datasets": 3}])
def test_what_is_no_path(entries, datasets, paths):
    with pytest.raises(WorkloadError) as error:
        merge_workload(entries, **{"datasets": datasets, **paths})
    assert [problem.key for problem in error.value.problems] == sorted(paths)
    assert all(problem.allowed == "the path of a folder" for problem in error.value.problems)


def test_only_the_embedded_default_looks_for_datasets_where_they_are_drawn(entries, tmp_path, monkeypatch):
    """A user's dataset that is missing must not be another of the same name, which was drawn."""
    drawn = write_classification(tmp_path / "drawn", "main_2nd_vehicles_CL")
    monkeypatch.setattr("gemel.sample_workload.tasks.DATASETS_ROOT", drawn.parent)
    mine = {"main_2nd_vehicles_pico": entries["north_pico"]}
    with pytest.raises(WorkloadError) as error:
        merge_workload(mine, tmp_path / "out", datasets=tmp_path)
    assert f"got no folder 'main_2nd_vehicles_CL' in {tmp_path};" in str(error.value)
    assert dataset_roots(["main_2nd_vehicles_resnet10"], tmp_path) == [tmp_path, drawn.parent]
    assert dataset_roots(["main_2nd_vehicles_resnet10", "x_y"], tmp_path) == [tmp_path]
