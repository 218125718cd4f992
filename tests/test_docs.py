"""README and docs: every command and example is run here at small size (test_pages.py: what they name exists).

Commands run as written, in a folder with a small `mine.py`, its weights and a merged `results/`, and `../datasets`
beside it; `python` is this interpreter. Those that take minutes are in ELSEWHERE; a command that is neither fails.
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from doc_pages import PAGES, ROOT, Block, blocks_of
from pico import (
    PicoDetector,
    PicoNet,
    classification_entry,
    detection_entry,
    fit,
    to_tensor,
    write_classification,
    write_detection,
)
from PIL import Image

from dataset_manager import open_task
from gemel.console.flags import parse_arguments
from gemel.evaluation.eval_method import evaluate
from gemel.results_store.manifest import read_manifest
from gemel.workload import WorkloadError, read_workload
from merge_workloads import merge_workload
from model_architectures import build, registry
from model_architectures.darknet_weights import layers_of

# Commands that take minutes or install something -> the test that runs the same code at small size.
ELSEWHERE = {
    "make merge": "test_a_workload_file_merges_from_the_shell",
    "make test": "test_what_make_runs",
    "pip install .": "wheel",  # the packaging test; looked for as soon as pyproject.toml describes a package
    "python -m benchmarks.strategies": "test_one_command_compares_strategies_in_processes_of_their_own",
    "python -m benchmarks.suite": "test_the_suite_runs_over_its_workloads",
    "python -m benchmarks.ablation": "test_ablation_over_the_grid",
    "python -m benchmarks.peers": "test_the_command_prints_a_row_per_method",
    "python -m benchmarks.frozen_prefix": "test_a_frozen_prefix_is_measured",
    "python -m benchmarks.detectors": "test_a_detector_is_built_tied_fitted_and_trained",
    "python -m benchmarks.kills": "test_kills_at_small_size",
    "python -m benchmarks.expected_losses": "test_the_command_says_when_there_is_nothing_to_fit_to",
    "python benchmarks/load_merged.py": "test_loading_is_timed_at_small_size",
}
CARS, TRAFFIC = "main_2nd_cars_resnet50", "oak_3rd_traffic_frcnn"  # as in README
MINE = """
import torch
from pico import PicoDetector, PicoNet, classification_entry, detection_entry
from model_architectures import build, names, register

for name, builder in (("pico_net", PicoNet), ("pico_detector", PicoDetector)):
    if name not in names():  # in a process of its own
        register(name)(builder)

def create_model_dict():
    entries = {{
        "main_2nd_cars_resnet50": classification_entry(build("pico_net", 2), {cars}, batch_size=6, tolerance=0.6),
        "oak_3rd_traffic_frcnn": detection_entry(build("pico_detector", 3), {traffic}, batch_size=6, tolerance=0.6),
    }}
    for name, entry in entries.items():
        entry["model"].load_state_dict(torch.load({folder!r} + f"/{{name}}.pt", weights_only=True))
    return entries
"""


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell block, without comments and settings of environment variables."""
    lines = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    return [[word for i, word in enumerate(words) if i or "=" not in word] for words in lines if words]


def inline_commands() -> list[tuple[Path, list[str]]]:
    """(page, command) for every command between backquotes in running text."""
    found = []
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
        found += [(page, shlex.split(span)) for span in spans if re.match(r"(python|make) \S", span)]
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


# ---- the sandbox ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A folder with a workload file, its trained weights and its merged results, beside its datasets."""
    datasets = tmp_path_factory.mktemp("docs") / "datasets"
    folder = datasets.parent / "box"
    folder.mkdir()
    write_classification(datasets, "main_2nd_cars_CL", 2, seed=1, splits=("train", "val", "test"))
    write_detection(datasets, "oak_3rd_traffic_OD", 2, seed=3)
    registry.register("pico_net")(PicoNet)
    registry.register("pico_detector")(PicoDetector)
    accuracy = train(folder, datasets)
    (folder / "mine.py").write_text(MINE.format(**accuracy, folder=str(folder)))
    write_weights(folder)
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    merge_workload(entries_of(folder), folder / "results", datasets=datasets)
    yield folder
    sys.path[:] = before
    sys.modules.pop("mine", None)
    for name in ("pico_net", "pico_detector"):
        registry._BUILDERS.pop(name)


def entries_of(folder: Path) -> dict:
    """A new task dictionary of the sandbox's workload file."""
    return runpy.run_path(str(folder / "mine.py"))["create_model_dict"]()


def train(folder: Path, datasets: Path) -> dict[str, float]:
    """Trains and saves the two small models of the workload file; their accuracies, by their names in MINE."""
    torch.manual_seed(0)
    models = {CARS: classification_entry(build("pico_net", 2)), TRAFFIC: detection_entry(build("pico_detector", 3))}
    accuracy = {}
    for name, task in read_workload(models)[0].items():
        data = open_task(task, [datasets], device=torch.device("cpu"), seed=0, batch_size=6)
        fit(task.model, data.train, 120)
        accuracy[name.split("_")[2]] = evaluate(task, data.val)
        torch.save(task.model.state_dict(), folder / f"{name}.pt")
    return accuracy


def write_weights(folder: Path) -> None:
    """The files of weights that the examples read, with random values."""
    torch.save(build("resnet50", 2).state_dict(), folder / "cars.pt")
    torch.save(build("fasterrcnn_resnet50_fpn", 1 + 4).state_dict(), folder / "traffic.pt")
    layers = layers_of(build("yolov3_tiny", 1 + 80))
    count = sum(tensor.numel() for layer in layers for _, tensor in layer.tensors())
    header = np.array([0, 2, 0, 0, 0], "<i4").tobytes()
    (folder / "yolov3-tiny.weights").write_bytes(header + np.ones(count, "<f4").tobytes())


@pytest.fixture
def in_the_box(box, monkeypatch):
    monkeypatch.chdir(box)
    return box


def run_python(arguments: list[str], monkeypatch) -> int:
    """Exit code of `python` with these arguments, run in this process; a script that is not here is the checkout's."""
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a module that was imported before is run again
        patch.setattr(sys, "argv", arguments[1:] if arguments[0] == "-m" else arguments)
        try:
            if arguments[0] == "-m":
                runpy.run_module(arguments[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        except SystemExit as ended:
            return ended.code or 0
    return 0


class Parsed(BaseException):
    """Ends a command whose arguments were understood."""


def parse_python(arguments: list[str], monkeypatch) -> None:
    """Lets a command read its arguments, and ends it there; fails if it refuses them."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
        code = run_python(arguments, monkeypatch)
        pytest.fail(f"python {shlex.join(arguments)}: exit code {code}")


def listed(command: list[str]) -> str | None:
    """The entry of ELSEWHERE that a command belongs to."""
    return next((entry for entry in ELSEWHERE if command[: len(entry.split())] == entry.split()), None)


# ---- commands and examples --------------------------------------------------------------------------------


def with_commands(block: Block) -> str:
    """A name for the list of commands that `.ci/commands` prints."""
    return f"{block}: {'; '.join(map(shlex.join, commands_of(block.text)))}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=with_commands)
def test_commands_run_as_written(block, in_the_box, monkeypatch, capsys):
    for command in commands_of(block.text):
        if (entry := listed(command)) is None:
            assert command[0] == "python", f"{block}: no test runs {shlex.join(command)}"
            assert run_python(command[1:], monkeypatch) == 0, f"{shlex.join(command)}\n{capsys.readouterr().err}"
        elif entry.startswith("python"):
            parse_python(command[1:], monkeypatch)


@pytest.mark.parametrize("entry", ELSEWHERE)
def test_what_is_not_run_here_is_run_by_another_test(entry):
    if entry == "pip install ." and "[project]" not in (ROOT / "pyproject.toml").read_text():
        pytest.skip("there is no package yet")
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert re.search(rf"^def (?:test_\w*)?{ELSEWHERE[entry]}\w*\(", sources, re.MULTILINE), "no such test"
    assert any(listed(c) == entry for b in BLOCKS if b.language == "sh" for c in commands_of(b.text)), "not shown"


def test_commands_in_running_text_are_understood(in_the_box, monkeypatch):
    for page, command in inline_commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{page}: {command}"
        elif "--help" not in command:
            parse_python(command[1:], monkeypatch)


@pytest.mark.parametrize("target", ["merge", "test"])
def test_what_make_runs(target):
    own = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # these tests run under make
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = shlex.split(done.stdout.splitlines()[-1])
    if target == "test":
        assert last[1:] == ["-m", "pytest", "-n", "auto", "--dist", "loadfile"]
    else:
        assert last[1] == "merge_workloads.py"
        assert parse_arguments(last[2:]).time_budget == 120, "README: two minutes"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_examples_run(block, in_the_box):
    names: dict = {"__name__": "example"}
    exec(compile(block.text, str(block), "exec"), names)
    if "create_model_dict" in names and "mine" not in block.text:
        tasks, problems = read_workload(names["create_model_dict"]())
        assert len(tasks) == 2 and not problems


def test_shared_layers_of_the_example_are_one_parameter(in_the_box):
    (block,) = (b for b in blocks_of(PAGES[0]) if "load_merged" in b.text)
    names: dict = {}
    exec(block.text, names)
    cars, traffic = names["models"].values()
    assert cars.conv2.weight is traffic.conv2.weight


@pytest.mark.exhaustive
def test_kills_at_small_size(box, tmp_path, monkeypatch, capsys):
    """The loop of the benchmark, over a "merge" that puts a finished result in place."""
    from benchmarks import kills

    copied = f"import os, shutil, sys, time\nshutil.copytree({str(box / 'results')!r}, sys.argv[2] + '.new')\n"
    copied += "os.rename(sys.argv[2] + '.new', sys.argv[2])\ntime.sleep(1)\n"
    monkeypatch.setattr(kills, "MERGE", f"import os, sys\nif not os.path.exists(sys.argv[2]):\n{indented(copied)}")
    monkeypatch.setattr(kills, "prepare", lambda folder: box / "mine.py")
    monkeypatch.setattr(sys, "argv", ["kills", "--kills", "1", "--seed", "3"])
    code = kills.main()
    assert code == 0, capsys.readouterr().out
    assert "1 kills" in capsys.readouterr().out


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


@pytest.mark.exhaustive
def test_loading_is_timed_at_small_size(monkeypatch, capsys):
    from benchmarks import load_merged

    monkeypatch.setattr(load_merged, "growth", lambda way, small, path: 1 << 20)  # a process of its own for each way
    load_merged.main(["--models", "2", "--architectures", "squeezenet1_1", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "load_merged into modules handed in" in printed and "2 x squeezenet1_1" in printed


# ---- what a merge writes and refuses -----------------------------------------------------------------------


def test_every_key_of_the_manifest_is_described(box):
    manifest = read_manifest(box / "results")
    said = set(re.findall(r"`([^`\s]+)`", (ROOT / "docs" / "results.md").read_text()))
    parts = [manifest, manifest["run"], manifest["memory"], manifest["store"], *manifest["tasks"].values()]
    parts += [*manifest["shared_layers"], *manifest["run"]["history"], *manifest["run"]["not_shared"]]
    assert not {key for part in parts for key in part} - said
    files = {path.name for path in (box / "results").iterdir()} - {manifest["store"]["file"]}
    assert files == {
        *("weights", "merged.json", "workload_stats.json", "log.jsonl", "examples.json", "report.html"),
    }


def refusals(box: Path, datasets: Path) -> dict[str, dict]:
    """What README quotes of a refusal -> a task dictionary that brings it about; datasets: an empty folder for one."""

    def changed(name: str, **changes) -> dict:
        entries = entries_of(box)
        return {**entries, name: {**entries[name], **changes}}

    write_classification(datasets, "uneven_CL", 2)
    Image.new("RGB", (24, 16)).save(datasets / "uneven_CL" / "train" / "class0" / "wide.png")
    black = {"train": to_tensor, "val": lambda image: 0 * to_tensor(image)}
    one = entries_of(box)
    copied = {**one[CARS], "dataset": "main_2nd_cars_CL"}
    return {
        "below its target": changed(CARS, transforms=black),
        "no folder": changed(CARS, dataset="nowhere"),
        "the classes of the model": changed(TRAFFIC, model=build("pico_detector", 2)),
        "one size for all images of a batch": changed(CARS, dataset="uneven_CL"),
        "parameters that are also those of": {**one, "main_2nd_copy_pico": copied},
        "the same as before, or --fresh": changed(CARS, tolerance=0.7),
    }


def test_the_refusals_of_the_readme_are_what_is_said(box, tmp_path):
    section = PAGES[0].read_text().partition("## When it says no")[2].partition("\n## ")[0]
    quoted = re.findall(r"^- `([^`]+)`:", section, re.MULTILINE)
    datasets = shutil.copytree(box.parent / "datasets", tmp_path / "datasets")
    wrong = refusals(box, datasets)
    assert quoted == list(wrong)
    for said, entries in wrong.items():
        results = box / "results" if "--fresh" in said else tmp_path / "none"
        with pytest.raises(WorkloadError, match=re.escape(said)):
            merge_workload(entries, results, datasets=datasets)
