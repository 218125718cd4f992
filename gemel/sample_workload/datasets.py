"""Draws the datasets of one camera, in the same layouts as datasets of users."""

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

RECIPE_FILE = ".recipe"  # in a dataset folder; hidden, so it is not taken for a split


def dataset_folders(root: Path, camera: str) -> dict[Path, SampleTask]:
    """The dataset folders below `root` of the tasks that use this camera alone -> their task."""
    return {
        root / "datasets" / (name.rsplit("_", 1)[0] + DATASET_SUFFIX[task.kind]): task
        for name, task in TASKS.items()
        if task.cameras == (camera,)
    }


def is_drawn(root: Path, camera: str, plan: Plan) -> bool:
    """Whether all datasets of a camera exist and were drawn by this plan."""
    return all(is_current(folder / RECIPE_FILE, plan) for folder in dataset_folders(root, camera))


def draw_camera(root: Path, camera: str, plan: Plan, position: int = 0) -> None:
    """Draws the scenes of one camera and writes the datasets of its tasks.

    position: line of the progress bar. The folders appear when all are complete.
    """
    with contextlib.ExitStack() as stack:
        folders = {stack.enter_context(replacement_of(f)): task for f, task in dataset_folders(root, camera).items()}
        for split, scenes, crops in zip(SPLITS, plan.scenes, plan.crops, strict=True):
            rng = np.random.default_rng(derive_seed(SEED, "draw", camera, split))
            outputs = [_output(folder / split, task, crops) for folder, task in folders.items()]
            numbers = tqdm(range(scenes), f"drawing {camera} {split}", leave=False, position=position)
            write_scenes(CAMERAS[camera], numbers, outputs, rng)
        for folder in folders:
            (folder / RECIPE_FILE).write_text(recipe_digest(plan))


def _output(folder: Path, task: SampleTask, crops: int) -> Frames | Crops:
    """The output for one split of a task's dataset."""
    if task.kind == CLASSIFICATION:
        return Crops(folder, task.classes, CROP_SIZE, crops)
    return Frames(folder, task.classes, FRAME_SIZE)
