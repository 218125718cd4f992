"""The drawn datasets: layouts, splits, interruptions."""

import numpy as np
import pytest
from PIL import Image
from tiny_sample import TINY

from gemel.sample_workload import datasets as sample_datasets
from gemel.sample_workload.objects import KINDS
from gemel.sample_workload.tasks import FRAME_SIZE, TASKS, Plan
from gemel.workload import CLASSIFICATION, DATASET_SUFFIX

FRAMES_PARTS = ("images", "annotations")


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_datasets_have_the_layout(prepared):
    root = prepared / "datasets"
    expected = {name.rsplit("_", 1)[0] + DATASET_SUFFIX[task.kind] for name, task in TASKS.items()}
    assert {path.name for path in root.iterdir()} == expected
    for name, task in TASKS.items():
        folder = root / (name.rsplit("_", 1)[0] + DATASET_SUFFIX[task.kind])
        for split, scenes, crops in zip(("train", "val", "test"), TINY.scenes, TINY.crops, strict=True):
            if task.kind == CLASSIFICATION:
                counts = {path.name: len(list(path.glob("*.jpg"))) for path in (folder / split).iterdir()}
                assert set(counts) == set(task.classes) and all(0 < count <= crops for count in counts.values())
            else:
                stems = {part: {path.stem for path in (folder / split / part).iterdir()} for part in FRAMES_PARTS}
                assert stems["images"] == stems["annotations"] and len(stems["images"]) == scenes


def test_annotations_are_inside_the_image_and_some_are_empty(prepared):
    texts = [path.read_text() for path in prepared.glob("datasets/*_OD/*/annotations/*.txt")]
    assert any(not text for text in texts)
    rows = np.array([line.split() for text in texts for line in text.splitlines()], dtype=float)
    assert set(rows[:, 0]) == set(range(len(KINDS)))
    assert (rows[:, 3:] > 0).all()
    assert (rows[:, 1:3] - rows[:, 3:] / 2 > -1e-5).all() and (rows[:, 1:3] + rows[:, 3:] / 2 < 1 + 1e-5).all()
    sizes = {Image.open(path).size for path in prepared.glob("datasets/*_OD/*/images/*.jpg")}
    assert sizes == {(FRAME_SIZE, FRAME_SIZE)}


def test_the_splits_share_no_image(prepared):
    pictures = [path.read_bytes() for path in prepared.glob("datasets/*/*/*/*.jpg")]
    assert len(set(pictures)) == len(pictures) > 100


def test_an_interrupted_drawing_is_drawn_again(prepared, tmp_path, monkeypatch):
    """Killed when all files are written, before the end: the split is not there, and then it is the same one."""
    draw = sample_datasets.write_scenes

    def interrupted(*arguments):
        draw(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_datasets, "write_scenes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_datasets.draw_split(tmp_path, "main_2nd", "val", TINY)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not sample_datasets.is_drawn(tmp_path, "main_2nd", "val", TINY)
    monkeypatch.setattr(sample_datasets, "write_scenes", draw)
    sample_datasets.draw_split(tmp_path, "main_2nd", "val", TINY)
    assert sample_datasets.is_drawn(tmp_path, "main_2nd", "val", TINY)
    assert not sample_datasets.is_drawn(tmp_path, "main_2nd", "train", TINY)
    for folder in (tmp_path / "datasets").iterdir():
        assert files_of(folder / "val") == files_of(prepared / "datasets" / folder.name / "val")


def test_a_split_without_its_recipe_is_drawn_again(tmp_path, monkeypatch):
    """Killed between the files and the recipe."""
    plan = Plan(scenes=(2, 2, 2), crops=(1, 1, 1))
    with monkeypatch.context() as patched:
        patched.setattr(sample_datasets, "recipe_digest", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample_datasets.draw_split(tmp_path, "elm_1st", "test", plan)
    assert list(tmp_path.glob("datasets/*/test/images/*.jpg"))
    assert not sample_datasets.is_drawn(tmp_path, "elm_1st", "test", plan)
    sample_datasets.draw_split(tmp_path, "elm_1st", "test", plan)
    assert sample_datasets.is_drawn(tmp_path, "elm_1st", "test", plan)


def test_a_dataset_of_another_recipe_is_replaced(tmp_path):
    for scenes in (3, 2):
        plan = Plan(scenes=(scenes,) * 3, crops=(1, 1, 1))
        sample_datasets.draw_split(tmp_path, "elm_1st", "train", plan)
        assert sample_datasets.is_drawn(tmp_path, "elm_1st", "train", plan)
        assert len(list(tmp_path.glob("datasets/elm_1st_traffic_OD/train/images/*.jpg"))) == scenes
    assert not sample_datasets.is_drawn(tmp_path, "elm_1st", "train", TINY)
