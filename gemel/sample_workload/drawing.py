"""Draws the scenes of a camera, and writes the datasets of its tasks from them, laid out as users' own."""

import contextlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gemel.environment.seeds import derive_seed
from gemel.sample_workload.camera import CAMERAS
from gemel.sample_workload.files import Crops, Frames, write_scenes
from gemel.sample_workload.made import SEED, is_made, recipe, replaced
from gemel.sample_workload.tasks import CROP_SIZE, FRAME_SIZE, SPLITS, TASKS, Plan, SampleTask
from gemel.workload import CLASSIFICATION, DATASET_SUFFIX

RECIPE_FILE = ".recipe"  # in a dataset folder; hidden, so no split


def dataset_folders(root: Path, camera: str) -> dict[str, SampleTask]:
    """The dataset folders for a camera's tasks, below `root`."""
    return {
        root / "datasets" / (name.rsplit("_", 1)[0] + DATASET_SUFFIX[task.kind]): task
        for name, task in TASKS.items()
        if task.cameras == (camera,)
    }


def is_drawn(root: Path, camera: str, plan: Plan) -> bool:
    return all(is_made(folder / RECIPE_FILE, plan) for folder in dataset_folders(root, camera))


def draw_camera(root: Path, camera: str, plan: Plan, position: int = 0) -> None:
    """Draws the scenes of one camera, and writes the datasets of its tasks from them."""
    with contextlib.ExitStack() as stack:
        folders = {stack.enter_context(replaced(f)): task for f, task in dataset_folders(root, camera).items()}
        for split, scenes, crops in zip(SPLITS, plan.scenes, plan.crops, strict=True):
            rng = np.random.default_rng(derive_seed(SEED, "draw", camera, split))
            outputs = [_output(folder / split, task, crops) for folder, task in folders.items()]
            numbers = tqdm(range(scenes), f"drawing {camera} {split}", leave=False, position=position)
            write_scenes(CAMERAS[camera], numbers, outputs, rng)
        for folder in folders:
            (folder / RECIPE_FILE).write_text(recipe(plan))


def _output(folder: Path, task: SampleTask, crops: int) -> Frames | Crops:
    if task.kind == CLASSIFICATION:
        return Crops(folder, task.classes, CROP_SIZE, crops)
    return Frames(folder, task.classes, FRAME_SIZE)
