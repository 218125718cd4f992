"""Mistakes that users make: each ends with exit code 2 and a message that names the fix, and leaves no file behind."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from results_samples import tree

from gemel.__main__ import main as gemel
from merge_workloads import main

ROOT = Path(__file__).resolve().parent.parent
MINE = """
import sys
sys.path.insert(0, {tests!r})
import copy
import torch
from pico import PicoDetector, PicoNet, classification_entry, detection_entry, to_tensor

def fails(*given):
    raise KeyError("no such thing")

def create_model_dict():
    torch.manual_seed(0)
    entries = {{
        "north_pico": classification_entry(PicoNet(3), 0.01, batch_size=6),
        "south_pico": classification_entry(PicoNet(4), 0.01, batch_size=6),
    }}
    north = entries["north_pico"]
    {change}
    return entries
"""
# What is wrong in the dictionary -> what the message says.
DICTIONARY = {
    "entries.clear()": "at least one task",
    "entries['north'] = entries.pop('north_pico')": "ending in _<model>",
    "entries['NORTH_pico'] = copy.deepcopy(north)": "names that differ in more than case",
    "del north['transforms']": "transforms: got nothing; allowed: a dictionary",
    "north['transform'] = north['transforms']": "did you mean 'transforms'",
    "north['task'] = 'image_clasification'": "did you mean 'image_classification'",
    "north['model'] = north['model'].state_dict()": "allowed: a torch.nn.Module with its weights loaded",
    "north['model'] = PicoNet": "allowed: a torch.nn.Module with its weights loaded",
    "north['model'] = north['model'].to('meta')": "has no weights",
    "north['model'].fc.weight.data[0] = float('nan')": "not finite",
    "north['model'] = entries['south_pico']['model']": "copy.deepcopy",
    "north['model'] = PicoNet(2)": "the number of outputs of the model",
    "north['eval_method'] = 'top1'": "allowed: a callable f(model, data_loader)",
    "north['eval_method'] = fails": "KeyError: 'no such thing'; allowed: f(model, data_loader) -> float in [0, 1]",
    "north['transforms'] = to_tensor": "allowed: a dictionary {'train': callable, 'val': callable}",
    "north['transforms'] = {'train': lambda image: image, 'val': to_tensor}": "image -> float tensor [C, H, W]",
    "north['transforms'] = {'train': fails, 'val': to_tensor}": "north_pico: transforms",
    "north['unmerged_acc'] = 97": "allowed: a number in (0, 1]",
    "north['unmerged_acc'] = 1.0": "below its target",
    "north['tolerance'] = 0": "allowed: a number in (0, 1]",
    "north['batch_size'] = 1": "a whole number of at least 2",
    "north['dataset'] = '../north_CL'": "the name of a folder in the datasets root",
    "north['dataset'] = 'nort_CL'": "north_CL",
    "north['task'] = 'object_detection'": "north_OD",
    "north['background_class'] = 'yes'": "allowed: True or False",
}
# Arguments besides those of a right call -> what the message says.
FLAGS = {
    "--strategy best": "invalid choice: 'best' (choose from",
    "--time-budget soon": "allowed: a duration such as 90s",
    "--memory 3X": "allowed: a size such as 600MiB",
    "--memory 1KiB": "memory",
    "--device tpu": "invalid choice: 'tpu'",
    "--seed -1": "a whole number from 0 on",
    "--tolerance 1.5": "allowed: a number in (0, 1]",
    "--pareto nowhere/points.json": "a .json file in a folder that exists",
    "--plan --html nowhere/plan.html": "a .html file in a folder that exists",
    "--plan --json plan.txt": "a .json file in a folder that exists",
    "--workload nowhere.py": "nowhere.py, which is no file; allowed: a Python file that defines create_model_dict()",
}
COMMANDS = {
    "plan resnt18": "resnet18",
    "plan resnet18:many": "resnet18:N",
    "plan nowhere.py": "nowhere.py, which is no file",
    "report nowhere": "not found, so this folder holds no result",
    "watch nowhere": "no merge has begun",
    "verify nowhere --workload nowhere.py": "nowhere.py, which is no file",
}


pytestmark = pytest.mark.usefixtures("forgets_mine")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, arguments: list[str]) -> int:
    try:
        return command(arguments)
    except SystemExit as ended:  # argparse
        return ended.code


def refused(command, arguments: list[str], here: Path, capsys) -> str:
    """What is said on standard error of a call that must be refused and leave no file."""
    before = tree(here)
    code, printed = run(command, arguments), capsys.readouterr()
    assert code == 2, printed.out + printed.err
    changed = {name for name in tree(here) if "__pycache__" not in name} - set(before)
    assert not changed and "Traceback" not in printed.err
    return " ".join(printed.err.split())


def write_mine(change: str = "pass") -> list[str]:
    Path("mine.py").write_text(MINE.format(tests=str(ROOT / "tests"), change=change))
    return ["--workload", "mine.py", "--device", "cpu"]


@pytest.mark.parametrize("change", DICTIONARY)
def test_in_the_dictionary(change, here, datasets, capsys):
    arguments = [*write_mine(change), "--datasets", str(datasets)]
    assert DICTIONARY[change] in refused(main, arguments, here, capsys)


@pytest.mark.parametrize("given", FLAGS)
def test_in_the_flags(given, here, datasets, capsys):
    arguments = [*write_mine(), "--datasets", str(datasets), *given.split()]
    assert FLAGS[given] in refused(main, arguments, here, capsys)


@pytest.mark.parametrize("given", COMMANDS)
def test_in_the_commands(given, here, capsys):
    assert COMMANDS[given] in refused(gemel, given.split(), here, capsys)


def broken_image(folder: Path) -> str:
    next((folder / "north_CL" / "train" / "class0").iterdir()).write_bytes(b"no image")
    return "class0"


def uneven_images(folder: Path) -> str:
    Image.new("RGB", (40, 20)).save(folder / "north_CL" / "train" / "class0" / "wide.png")
    return "one size for all images of a batch"


def no_val(folder: Path) -> str:
    shutil.rmtree(folder / "north_CL" / "val")
    return "got no such folder; allowed: at least 1 image as val/<class>/*.jpg"


def no_datasets(folder: Path) -> str:
    shutil.rmtree(folder / "north_CL")
    return "no folder"


@pytest.mark.parametrize("break_it", [broken_image, uneven_images, no_val, no_datasets])
def test_in_the_datasets(break_it, here, datasets, capsys):
    folder = shutil.copytree(datasets, here / "datasets")
    said = break_it(folder)
    assert said in refused(main, [*write_mine(), "--datasets", str(folder)], here, capsys)


def test_debug_also_says_where_in_the_code(here, datasets, capsys):
    arguments = [*write_mine("north['batch_size'] = 1"), "--datasets", str(datasets), "--debug"]
    assert main(arguments) == 2 and "Traceback" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nowhere.py, which is no file"):
        gemel(["--debug", "plan", "nowhere.py"])


def test_there_are_at_least_thirty():
    assert len(DICTIONARY) + len(FLAGS) + len(COMMANDS) + 4 >= 30
