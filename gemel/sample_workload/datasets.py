"""Draws the datasets of one camera, a split at a time, in the same layouts as datasets of users."""

import contextlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gemel.environment.seeds import derive_seed
from gemel.sample_workload.artifacts import SEED, is_current, recipe_digest, replacement_of
from gemel.sample_workload.camera import CAMERAS
from gemel.sample_workload.dataset_files import Crops, Frames, write_scenes
from gemel.sample_workload.tasks import CROP_SIZE, FRAME_SIZE, SPLITS, TASKS, Plan, SampleTask
from gemel.workload import CLASSIFICATION, DATASET_SUFFIX

RECIPE_FILE = ".recipe-{}"  # of a split, in the dataset folder; hidden, so it is not taken for a split


def dataset_folders(root: Path, camera: str) -> dict[Path, SampleTask]:
    """The dataset folders below `root` of the tasks that use this camera alone -> their task."""
    return {
        root / "datasets" / (name.rsplit("_", 1)[0] + DATASET_SUFFIX[task.kind]): task
        for name, task in TASKS.items()
        if task.cameras == (camera,)
    }


def is_drawn(root: Path, camera: str, split: str, plan: Plan) -> bool:
    """Whether this split of all datasets of a camera exists and was drawn by this plan."""
    return all(is_current(_recipe_path(folder, split), plan) for folder in dataset_folders(root, camera))


def draw_split(root: Path, camera: str, split: str, plan: Plan, position: int = 0) -> None:
    """Draws the scenes of one split of a camera and writes this split of the datasets of its tasks.

    position: line of the progress bar. The folders of the split appear when all are complete, and then their recipes,
    without which they do not count.
    """
    number = SPLITS.index(split)
    folders = dataset_folders(root, camera)
    with contextlib.ExitStack() as stack:
        parts = {stack.enter_context(replacement_of(folder / split)): task for folder, task in folders.items()}
        rng = np.random.default_rng(derive_seed(SEED, "draw", camera, split))
        outputs = [_output(part, task, plan.crops[number]) for part, task in parts.items()]
        numbers = tqdm(range(plan.scenes[number]), f"drawing {camera} {split}", leave=False, position=position)
        write_scenes(CAMERAS[camera], numbers, outputs, rng)
    for folder in folders:
        _recipe_path(folder, split).write_text(recipe_digest(plan))


def _recipe_path(folder: Path, split: str) -> Path:
    return folder / RECIPE_FILE.format(split)


def _output(folder: Path, task: SampleTask, crops: int) -> Frames | Crops:
    """The output for one split of a task's dataset."""
    if task.kind == CLASSIFICATION:
        return Crops(folder, task.classes, CROP_SIZE, crops)
    return Frames(folder, task.classes, FRAME_SIZE)
