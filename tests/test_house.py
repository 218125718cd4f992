"""The rules of the house (README, "The house"): floors, sizes, and what must never be written."""

import ast
import re
import sys
from pathlib import Path

import pytest

from merge_workloads import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "sample_data", "tests"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
FLOORS = {
    "environment": 1,
    "workload": 1,
    "eval_methods": 1,
    "transforms": 1,
    "model_architectures": 1,
    "street_scenes": 1,
    "sharing": 2,
    "dataset_manager": 2,
    "losses": 2,
    "sample_workload": 2,
    "trainer": 3,
    "results_store": 3,
    "tables": 3,
    "fingerprint": 3,
    "interrupts": 3,
    "merger": 4,
    "merge_workloads": 5,
    "benchmarks": 6,
}
# Files that are parts of one room, by their prefix.
PREFIXES = {
    "dataset_": "dataset_manager",
    "eval_": "eval_methods",
    "losses_": "losses",
    "merger_": "merger",
    "results_": "results_store",
    "trainer_": "trainer",
    "workload_": "workload",
}
MAX_LINES = 450
FLAGS = {
    *("--workload", "--datasets", "--results", "--tolerance", "--strategy", "--device"),
    *("--time-budget", "--fresh", "--per-class", "--plan", "--seed"),
}


def room_of(path: Path) -> str:
    """A room is a folder, a file, or the files that one prefix marks as the parts of one room."""
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return next((room for prefix, room in PREFIXES.items() if name.startswith(prefix)), name)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module.split(".")[0])
    return found & set(FLOORS)


def test_every_file_has_a_floor():
    assert {room_of(path) for path in SOURCES} == set(FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_floors_below(path):
    room = room_of(path)
    wrong = {other for other in imports_of(path) - {room} if FLOORS[other] >= FLOORS[room]}
    assert not wrong, f"{room} (floor {FLOORS[room]}) imports {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path):
    source = path.read_text()
    assert source.count("\n") <= MAX_LINES
    assert ast.get_docstring(ast.parse(source)), "a file says in its header what it is for"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_device_is_hard_coded(path):
    """Published fault: CUDA is hard-coded. The device is picked in environment.py and handed on."""
    source = path.read_text()
    assert ".cuda(" not in source
    if path.name not in ("environment.py", "merge_workloads.py"):
        assert not re.search(r"""["']cuda(:\d+)?["']""", source.replace('device.type == "cuda"', ""))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_never_written(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: a bare except"
        if isinstance(node, ast.ImportFrom):
            assert node.names[0].name != "*", f"{path}:{node.lineno}: a star import"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert FLOORS[room_of(path)] > 1, f"{path}:{node.lineno}: nothing prints on the ground floor"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            assert safe, f"{path}:{node.lineno}: torch.load without weights_only=True"
        if isinstance(node, ast.Call):
            assert not ast.unparse(node.func).startswith("pickle.load"), f"{path}:{node.lineno}: unpickles"


def test_the_flags_are_the_contract():
    parser_source = (ROOT / "merge_workloads.py").read_text()
    assert set(re.findall(r'add_argument\("(--[a-z-]+)"', parser_source)) == FLAGS
    flags = parse_arguments([])
    assert (flags.results, flags.device, flags.seed, flags.plan, flags.fresh) == ("results", "auto", 0, False, False)


def test_the_readme_names_every_file_of_the_house():
    readme = (ROOT / "README.md").read_text()
    for path in SOURCES:
        assert path.name in readme or f"{room_of(path)}/" in readme, path


def test_python_is_new_enough():
    assert sys.version_info >= (3, 10)
