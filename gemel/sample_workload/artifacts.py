"""Drawn and trained files: whether they are up to date, and how they are replaced safely."""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gemel.sample_workload.camera import CAMERAS
from gemel.sample_workload.tasks import ANCESTORS, TASKS, Plan

RECIPE = 2  # increase it when drawing or training changes: files of another recipe are made again
SEED = 0
PARTIAL, PARTIAL_SECONDS = ".partial-", 24 * 3600.0  # prefix of unfinished files; age at which they are abandoned


def recipe_digest(plan: Plan) -> str:
    """A digest of everything that drawn and trained files depend on."""
    return hashlib.sha256(repr((RECIPE, SEED, plan, CAMERAS, ANCESTORS, TASKS)).encode()).hexdigest()[:16]


def is_current(stamp: Path, plan: Plan) -> bool:
    """Whether a stamp file exists and holds the digest of this plan."""
    return stamp.is_file() and recipe_digest(plan) in stamp.read_text()


@contextlib.contextmanager
def replacement_of(path: Path) -> Iterator[Path]:
    """A temporary path for a folder or file that replaces `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    remove(unfinished)
    try:
        yield unfinished
        if path.is_dir():  # a folder cannot be replaced atomically; if it is lost it is drawn again
            remove(path)
        unfinished.replace(path)
    finally:
        remove(unfinished)


def remove_leftovers(root: Path) -> None:
    """Removes unfinished files of killed processes; the process of a recent file may still be running."""
    for path in root.glob(f"**/{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):  # its process is running and has just finished
            if time.time() - path.stat().st_mtime > PARTIAL_SECONDS:
                remove(path)


def remove(path: Path) -> None:
    """Removes a folder or a file, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
