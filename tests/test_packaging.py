"""What `pip install .` gives a box that only loads results, in an environment with its dependencies and no more."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from results_samples import slim_models, write

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "torchvision", "numpy", "safetensors")
LOAD = """
import json, sys
import torch, torchvision
before = set(sys.modules)
from gemel import load_merged
import gemel
models = load_merged(sys.argv[1])
loaded = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
rooms = sorted({name for name in sys.modules if name.startswith("gemel.")})
print(json.dumps({"tasks": sorted(models), "new": loaded, "rooms": rooms, "file": gemel.__file__}))
"""


def closure(names) -> set[str]:
    """The distributions that these need, themselves included, on this machine and without extras."""
    found, left = set(), list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return found


def link_distribution(name: str, target: Path) -> None:
    """Links what the distribution put into site-packages into another environment's."""
    source = Path(sysconfig.get_paths()["purelib"])
    for file in importlib.metadata.distribution(name).files or ():
        top = file.parts[0]
        if top != ".." and not (target / top).exists() and (source / top).exists():
            (target / top).symlink_to(source / top)


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """The Python of an environment that holds the built wheel and its dependencies alone."""
    folder = tmp_path_factory.mktemp("box")
    source = folder / "source"  # a copy: building leaves files behind
    for name in ("gemel", "model_architectures"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    target = next((folder / "env" / "lib").glob("python*/site-packages"))
    for name in closure(NEEDED):
        link_distribution(name, target)
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return python


def test_the_wheel_depends_on_no_more_than_loading_needs(box):
    code = "import importlib.metadata as m, json; print(json.dumps(m.requires('gemel-merging')))"
    requires = json.loads(subprocess.run([box, "-c", code], capture_output=True, text=True, check=True).stdout)
    without_extras = [Requirement(line) for line in requires if "extra ==" not in line]
    assert {requirement.name for requirement in without_extras} == set(NEEDED)


def test_the_installed_wheel_loads_and_verifies_results_and_imports_nothing_else(box, tmp_path):
    write(tmp_path / "results", slim_models())
    done = subprocess.run(
        [box, "-c", LOAD, str(tmp_path / "results")], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    said = json.loads(done.stdout)
    assert said["tasks"] == sorted(slim_models()) and str(ROOT) not in said["file"]
    unwanted = {"pycocotools", "yaml", "tqdm", "scipy", "greenlet", "PIL", "hotcoco", "matplotlib"}
    assert not unwanted & set(said["new"])
    wanted = ("gemel.results_store", "gemel.sharing", "gemel.forward", "gemel.workload", "gemel.environment")
    assert all(room.startswith(wanted) for room in said["rooms"]), said["rooms"]
    command = [box, "-m", "gemel", "verify", str(tmp_path / "results"), "--device", "cpu"]
    verified = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_requirements_and_extras_name_the_same_packages():
    """What `pip install .[merge]` installs is what requirements.txt installs."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = sorted(line for line in lines if line and not line.startswith("#"))
    assert sorted([*project["dependencies"], *project["optional-dependencies"]["merge"]]) == required
