"""The rules of the house (docs/architecture.md): what the root holds, floors, circles, sizes, what is never written."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemel.console.flags import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
IN_THE_ROOT = {
    *("merge_workloads.py", "merger.py", "trainer.py", "dataset_manager.py", "eval_methods.py", "transforms.py"),
    *("model_architectures", "gemel", "benchmarks", "docs", "tests"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff"),
    *("requirements.txt", "requirements-dev.txt", "pyproject.toml", "Makefile", ".ci", ".gitignore"),
}
# Rooms of gemel/ by floor, the ground floor first. Rooms on one floor may import each other, but not in a circle.
FLOORS = (
    ("workload", "thresholds", "environment", "forward"),
    ("sharing",),
    ("alignment",),
    ("datasets", "evaluation", "fitting", "strategies"),
    ("results_store", "training"),
    ("console", "options"),
    ("trials",),
    ("merging",),
    ("report", "edge", "sample_workload"),
)
# Above the rooms: gemel's own door (load_merged), the files of the root, the commands, what measures all of it.
ROOT_FLOORS = (
    *("gemel", "transforms", "eval_methods", "dataset_manager", "trainer", "merger", "merge_workloads"),
    *("gemel.__main__", "benchmarks"),
)
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_FIELDS = 450, 60, 8, 12
FLAGS = {
    *("--workload", "--datasets", "--results", "--tolerance", "--strategy", "--device"),
    *("--time-budget", "--fresh", "--per-class", "--plan", "--seed", "--memory", "--pareto", "--tensorboard"),
    *("--check", "--html", "--json", "--quiet", "--debug", "--store-dtype", "--precision", "--compile", "--share-norm"),
    *("--keep-unmerged", "--retry", "--data"),
}

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
SOURCES = [path for path in (ROOT / name for name in TRACKED) if path.suffix == ".py" and path.is_file()]
SOURCES = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"]
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def module_of(path: Path) -> str:
    """The dotted name that a file is imported by."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """Modules of the project that a file imports, wherever in it: at the top, in functions, for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            parts = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {part if part in MODULES else node.module for part in parts}
    return {name for name in found if name in MODULES}


def room_of(module: str) -> str:
    """A folder or file of gemel/, as "gemel.sharing"; elsewhere the folder or file in the root."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "gemel" else parts[0]


def floor_of(room: str) -> int:
    """Where a room stands: model_architectures and the rooms of gemel/ below the files of the root."""
    if room == "model_architectures":
        return -1
    if room not in ROOT_FLOORS:
        return next(floor for floor, rooms in enumerate(FLOORS) if room.removeprefix("gemel.") in rooms)
    return 10 + ROOT_FLOORS.index(room)


def test_the_root_holds_what_a_user_reads_and_edits():
    assert {Path(name).parts[0] for name in TRACKED} == IN_THE_ROOT


@each_source
def test_a_file_imports_only_from_floors_below(path):
    room = room_of(module_of(path))
    others = {room_of(module) for module in imports_of(path)} - {room}
    wrong = {other for other in others if floor_of(other) > floor_of(room)}
    if room in ROOT_FLOORS:  # root files import each other downwards only
        wrong |= {other for other in others if floor_of(other) == floor_of(room)}
    assert not wrong, f"{room} imports {wrong}"


def test_gemel_imports_nothing_from_the_root_but_model_architectures():
    for module, path in MODULES.items():
        if module.startswith("gemel") and module != "gemel.__main__":
            outside = {name for name in imports_of(path) if not name.startswith(("gemel", "model_architectures"))}
            assert not outside, f"{path} imports {outside}"


@pytest.mark.parametrize("by", [str, room_of], ids=["files", "rooms"])
def test_no_circle_of_imports(by):
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if module != "gemel":  # imports load_merged when it is asked for; nothing in gemel/ imports it
            graph.setdefault(by(module), set()).update({by(name) for name in imports_of(path)} - {by(module)})
    tuple(graphlib.TopologicalSorter(graph).static_order())


@each_source
def test_files_stay_readable(path):
    source = path.read_text()
    assert source.count("\n") <= MAX_LINES
    assert ast.get_docstring(ast.parse(source)), "a file says in its header what it is for"


def definitions(path: Path, kinds: tuple) -> Iterator:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))


@each_source
def test_functions_stay_small(path):
    for function in definitions(path, (ast.FunctionDef, ast.AsyncFunctionDef)):
        length = function.end_lineno - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{path}:{function.lineno}: {function.name} has {length} lines"
        given = function.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
        assert len(names) <= MAX_PARAMETERS, f"{path}:{function.lineno}: {function.name} takes {len(names)} parameters"


@each_source
def test_dataclasses_stay_small(path):
    for kind in definitions(path, ast.ClassDef):
        if "dataclass" in " ".join(map(ast.unparse, kind.decorator_list)) and not kind.name.endswith("Options"):
            fields = [node for node in kind.body if isinstance(node, ast.AnnAssign)]
            assert len(fields) <= MAX_FIELDS, f"{path}:{kind.lineno}: {kind.name} has {len(fields)} fields"


@each_source
def test_no_device_is_hard_coded(path):
    """Published fault: CUDA is hard-coded. The device is picked in one place and handed on."""
    source = path.read_text()
    assert ".cuda(" not in source
    if "environment" not in path.parts:
        assert not re.search(r"""["']cuda(:\d+)?["']""", source.replace('device.type == "cuda"', ""))


@each_source
def test_what_is_never_written(path):
    room = room_of(module_of(path))
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: a bare except"
        if isinstance(node, ast.ImportFrom):
            assert node.names[0].name != "*", f"{path}:{node.lineno}: a star import"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            may_print = floor_of(room) > 2 or path.name in ("interrupts.py", "alive.py")  # why a process ends
            assert may_print, f"{path}:{node.lineno}: a ground floor prints"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            assert safe, f"{path}:{node.lineno}: torch.load without weights_only=True"
        if isinstance(node, ast.Call):
            assert not ast.unparse(node.func).startswith("pickle.load"), f"{path}:{node.lineno}: unpickles"


def test_every_room_says_what_it_is_for():
    for folder in (path.parent for path in SOURCES if path.name == "__init__.py"):
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert said and len(said.splitlines()) >= 2, f"{folder}: what it is for, and which file to open first"


def test_the_flags_are_the_contract():
    source = (ROOT / "gemel" / "console" / "flags.py").read_text()
    assert set(re.findall(r'add_argument\("(--[a-z-]+)"', source)) == FLAGS
    flags = parse_arguments([])
    assert (flags.results, flags.device, flags.seed, flags.plan, flags.fresh) == ("results", "auto", 0, False, False)


def test_python_is_new_enough():
    assert sys.version_info >= (3, 10)
