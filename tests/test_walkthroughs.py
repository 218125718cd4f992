"""The walkthroughs in docs/, each followed to its end: files written as shown, commands run as written, in order."""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from doc_pages import blocks_of
from pico import fit, write_classification, write_detection

import dataset_manager
from gemel.__main__ import main as gemel
from gemel.environment.seeds import derive_seed
from gemel.evaluation.eval_method import evaluate
from gemel.results_store.manifest import read_manifest
from gemel.workload import read_workload
from merge_workloads import main
from model_architectures import build

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "walkthroughs"
CLASSES = {"gate_vehicles": 3, "yard_vehicles": 4, "dock_vehicles": 2}


class Step(NamedTuple):
    """A file to write, or a command to run."""

    file: str | None
    text: str


def steps_of(page: str) -> list[Step]:
    """The blocks of a page: python blocks are files, named by the last `name.py` in the text above."""
    path = PAGES / page
    lines, found = path.read_text().splitlines(), []
    for block in blocks_of(path):
        if block.language == "python":
            above = re.findall(r"^`(\w+\.py)`", "\n".join(lines[: block.line]), re.MULTILINE)
            found.append(Step(above[-1], block.text))
        elif block.language == "sh":
            found += [Step(None, line) for line in block.text.splitlines() if line]
    return found


def follow(steps: list[Step], capsys) -> str:
    """Takes every step in this folder; returns what was printed."""
    for file, text in steps:
        if file is not None:
            Path(file).write_text(text)
            continue
        program, *arguments = shlex.split(text)
        assert program == "python", text
        if arguments[0] == "merge_workloads.py":
            code = main(arguments[1:])
        elif arguments[:2] == ["-m", "gemel"]:
            code = gemel(arguments[2:])
        else:
            runpy.run_path(arguments[0], run_name="__main__")
            code = 0
        assert code == 0, f"{text}\n{capsys.readouterr().err}"
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder beside its datasets, in which files written there can be imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    sys.path.insert(0, str(tmp_path / "work"))
    yield tmp_path / "work"
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


def train(entries: dict, datasets: Path, steps: int) -> None:
    """Trains the tasks' models, and leaves their weights and accuracies where the pages say that they are."""
    tasks, problems = read_workload(entries)
    assert not problems
    known = Path("accuracies.json")
    accuracies = json.loads(known.read_text()) if known.exists() else {}
    for name, task in tasks.items():
        data = dataset_manager.open_task(task, [datasets], device=torch.device("cpu"), seed=0, batch_size=6)
        torch.manual_seed(derive_seed(0, name))
        fit(task.model, data.train, steps)
        short = name.rpartition("_")[0]
        accuracies[short] = evaluate(task, data.val)
        torch.save(task.model.state_dict(), f"{short}.pt")
    known.write_text(json.dumps(accuracies))


def train_classifiers(datasets: Path) -> None:
    from eval_methods import classification_eval
    from transforms import classification_transforms

    entries = {}
    for i, (name, num_classes) in enumerate(CLASSES.items()):
        write_classification(datasets, f"{name}_CL", num_classes, seed=i)
        entries[f"{name}_slim"] = {
            "model": build("slim_resnet", num_classes, layers=(1, 1), width=8),
            "task": "image_classification",
            "eval_method": classification_eval,
            "transforms": classification_transforms(size=24),
            "unmerged_acc": 0.5,
        }
    train(entries, datasets, 60)


def test_classifiers_and_a_third_task(folder, capsys):
    train_classifiers(folder.parent / "datasets")
    steps = steps_of("classifiers.md")
    added = [step for step in steps if step.file == "three_cameras.py"]
    assert len(added) == 1 and added[0].text.count("\n") < 30
    said = follow(steps, capsys)
    manifest = read_manifest("results")
    assert len(manifest["tasks"]) == 3 and all(task["met"] for task in manifest["tasks"].values())
    assert "dock_vehicles_slim: a new task" in said and manifest["memory"]["saved_bytes"] > 0
    assert Path("results/report.html").is_file()


@pytest.mark.exhaustive
def test_a_detector_with_an_export(folder, capsys):
    datasets = folder.parent / "datasets"
    write_detection(datasets, "station_people_OD", 2, seed=1)
    source, export = write_detection(datasets, "crossing_OD", 2, seed=2), datasets / "crossing_export"
    export.mkdir()
    for split, name in (("train", "train"), ("val", "valid")):
        (source / split / "annotations").rename(source / split / "labels")
        (source / split).rename(export / name)
    (export / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: [person, bicycle]\n")
    steps = steps_of("detector.md")
    names = {"ACCURACIES": {}}
    code = steps[0].text.replace('json.loads(Path("accuracies.json").read_text())', "{}")
    exec(compile(code, "two_detectors", "exec"), names)
    names["load_weights"] = lambda model, path: model
    names["ACCURACIES"].update(crossing_people=0.5, station_people=0.5)
    train(names["create_model_dict"](), datasets, 70)
    follow(steps, capsys)
    manifest = read_manifest("results")
    assert all(task["met"] for task in manifest["tasks"].values()) and Path("check.html").is_file()
    assert manifest["tasks"]["crossing_people_fcos"]["class_names"] == ["person", "bicycle"]


def test_a_model_of_ones_own(folder, capsys):
    datasets = folder.parent / "datasets"
    for i, name in enumerate(("gate_vehicles", "yard_vehicles")):
        write_classification(datasets, f"{name}_CL", CLASSES[name], seed=i)
    steps = steps_of("own_model.md")
    names: dict = {}
    code = steps[0].text.replace('json.loads(Path("accuracies.json").read_text())', "{}")
    exec(
        compile(code.replace('model.load_state_dict(torch.load(f"{name}.pt", weights_only=True))', ""), "o", "exec"),
        names,
    )
    names["ACCURACIES"].update(gate_vehicles=0.5, yard_vehicles=0.5)
    train(names["create_model_dict"](), datasets, 120)
    said = follow(steps, capsys)
    assert "(1, 3)" in said and "(1, 4)" in said and "FAIL" not in said
    assert read_manifest("results")["memory"]["saved_bytes"] > 0


def test_a_box_without_the_training_code(folder, capsys):
    train_classifiers(folder.parent / "datasets")
    (two_cameras,) = (step for step in steps_of("classifiers.md") if step.file == "two_cameras.py")
    steps = steps_of("box.md")
    merging, (serve, last) = steps[:2], steps[2:]
    follow([two_cameras, *merging], capsys)
    box = folder.parent / "box"  # nothing but the package, the results and the file of the page
    (box / "package").mkdir(parents=True)
    for name in ("gemel", "model_architectures"):
        (box / "package" / name).symlink_to(ROOT / name)
    Path("results").rename(box / "results")
    (box / serve.file).write_text(serve.text)
    own = {**os.environ, "PYTHONPATH": str(box / "package")}
    command = [sys.executable, *shlex.split(last.text)[1:]]
    done = subprocess.run(command, cwd=box, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merged, alone = map(int, re.search(r"(\d+) bytes in place of (\d+)", done.stdout).groups())
    assert merged < 0.8 * alone


def test_the_notebook(monkeypatch, capsys):
    """Every cell in order, in docs/, as a notebook runs them."""
    file = ROOT / "docs" / "first_merge.ipynb"
    notebook = json.loads(file.read_text())
    assert notebook["nbformat"] == 4 and len(file.read_bytes()) < 60_000
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        *body, last = tree.body
        shown = last.value if isinstance(last, ast.Expr) else None
        exec(compile(ast.Module(body if shown else tree.body, []), str(file), "exec"), names)
        value = eval(compile(ast.Expression(shown), str(file), "eval"), names) if shown else None
        is_map = any("text/html" in output.get("data", {}) for output in cell["outputs"])
        assert not is_map or value._repr_html_().count("<svg") == 1
    shutil.rmtree(names["folder"])
    assert capsys.readouterr().out.endswith("True False\n") and not (file.parent / "results").exists()


def test_links_of_the_walkthroughs_lead_somewhere():
    from test_pages import slugs

    for page in PAGES.glob("*.md"):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), target
            assert not anchor or anchor in slugs((page.parent / path).resolve()), target
