"""Imports by plain name where two folders have a module of that name: the checkout's and a user's transforms.py."""

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def imported_from(folder: Path) -> Iterator[None]:
    """Within it, the names of the Python files in the folder mean these files, whatever else was imported before.

    Behind it, a name means again what was imported under it before, or else what the import path finds first.
    """
    names = _modules_in(folder)
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules and not _is_in(folder, name)}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names & set(sys.modules):
            spec = PathFinder.find_spec(name)
            if spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent != folder:
                del sys.modules[name]
        sys.modules.update(before)


def prefer(folder: Path) -> None:
    """From now on, a plain name means the Python file of that name in this folder, if it has one.

    Files of the checkout that were imported under such a name stay with those who have imported them.
    """
    sys.path[:] = [str(folder), *(path for path in sys.path if path != str(folder))]
    if folder != CHECKOUT:
        for name in _modules_in(folder) & set(sys.modules):
            if _is_in(CHECKOUT, name):
                del sys.modules[name]


def _modules_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")}


def _is_in(folder: Path, name: str) -> bool:
    """Whether the imported module of that name is a file directly in the folder."""
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and Path(file).resolve().parent == folder
