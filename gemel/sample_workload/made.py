"""What is made already, and putting what is new in its place in one step."""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gemel.sample_workload.camera import CAMERAS
from gemel.sample_workload.tasks import ANCESTORS, TASKS, Plan

RECIPE = 1  # raise it when drawing or training changes: what was made by another recipe is made again
SEED = 0
PARTIAL, PARTIAL_SECONDS = ".partial-", 24 * 3600.0  # names of what is being written; when nobody can be writing it


def recipe(plan: Plan) -> str:
    """What identifies drawings and weights that need not be made again."""
    return hashlib.sha256(repr((RECIPE, SEED, plan, CAMERAS, ANCESTORS, TASKS)).encode()).hexdigest()[:16]


def is_made(stamp: Path, plan: Plan) -> bool:
    return stamp.is_file() and recipe(plan) in stamp.read_text()


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Another path beside `path`, for a folder or a file, which takes its place when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    remove(unfinished)
    try:
        yield unfinished
        if path.is_dir():  # a folder cannot be exchanged at once; a missing one is drawn again
            remove(path)
        unfinished.replace(path)
    finally:
        remove(unfinished)


def remove_leftovers(root: Path) -> None:
    """What killed processes have left unfinished; of a younger one the process may be alive."""
    for path in root.glob(f"*/{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):  # alive, and has just finished
            if time.time() - path.stat().st_mtime > PARTIAL_SECONDS:
                remove(path)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
