"""The layout of a data.yaml: paths, folders, outlines."""

import logging
import os

import pytest
from format_samples import WRITERS
from layout_samples import lines_of, targets_of

from dataset_manager import check
from gemel.datasets.ultralytics import label_file
from gemel.merging.fingerprint import dataset_digest


@pytest.mark.parametrize(
    "image, expected",
    [
        ("/d/images/train/a.jpg", "/d/labels/train/a.txt"),
        ("/images/x/images/a.b.jpg", "/images/x/labels/a.b.txt"),
        ("/d/train/a.jpg", "/d/train/a.txt"),
        ("/d/images.old/images", "/d/images.old/images.txt"),
    ],
)
def test_labels_lie_where_the_last_images_is_replaced(tmp_path, image, expected):
    assert str(label_file(tmp_path.joinpath(image))) == expected


@pytest.mark.parametrize("path", ["{root}/street_OD", "street_OD", ".", "../street_OD", "", "/somewhere/else"])
def test_the_path_of_a_yaml_file(tmp_path, task, path, caplog):
    folder = tmp_path / "street_OD"
    WRITERS["yaml"](folder)
    text = (folder / "data.yaml").read_text()
    (folder / "data.yaml").write_text(text.replace("path: .", f"path: {path.format(root=tmp_path)}"))
    with caplog.at_level(logging.WARNING):
        assert lines_of(task, folder) == []
    assert ("the folder of the yaml file was used" in caplog.text) == (path == "/somewhere/else")


def test_images_may_lie_beside_the_folder(tmp_path, task):
    WRITERS["yaml"](tmp_path / "elsewhere")
    folder = tmp_path / "street_OD"
    folder.mkdir()
    text = f"path: ../elsewhere\ntrain: {tmp_path}/elsewhere/images/train\nval: images/val\nnames: [car, person]\n"
    (folder / "data.yaml").write_text(text)
    assert lines_of(task, folder) == [] and dataset_digest(task, folder)
    (tmp_path / "elsewhere" / "labels" / "val" / "d.txt").write_text("0 1 2\n")
    (line,) = lines_of(task, folder)
    assert line.startswith(f"street_pico: dataset {tmp_path}/elsewhere/labels/val/d.txt line 1: got '0 1 2'")


def test_outlines_become_boxes_and_folders_are_searched(tmp_path, task):
    folder = tmp_path / "street_OD"
    WRITERS["yaml"](folder)
    for part in ("images", "labels"):
        (folder / part / "val" / "deep").mkdir()
        for path in list((folder / part / "val").glob("d.*")):
            path.rename(path.parent / "deep" / path.name)
    (folder / "labels" / "val" / "deep" / "d.txt").write_text("1 0.25 0.25 0.5 0.25 0.5 0.75\n")
    os.symlink("..", folder / "images" / "val" / "deep" / "up")
    assert lines_of(task, folder) == []
    (_, target), _ = sorted(targets_of(task, folder, "val"), key=lambda pair: -len(pair[1]["labels"]))
    assert target["boxes"].tolist() == [[10, 5, 20, 15]]


# ---- as exports and other machines write it -----------------------------------------------------------------


def notes_of(task, folder):
    notes = {}
    assert check({task.name: task}, [folder.parent], notes) == []
    return notes[task.name]


def rewrite(folder, text):
    (folder / "data.yaml").write_text(text)


HEAD = "names: [car, person]\n"
NO_TEST = "1 times: the test split was left out, as what the yaml file names does not exist"
TRAIN = "1 times: a path of the yaml file does not exist here, so train/images below the dataset's folder was used"
VALID = "1 times: a path of the yaml file does not exist here, so valid/images below the dataset's folder was used"


@pytest.mark.parametrize(
    "text, said",
    [
        ("train: ../train/images\nval: ../valid/images\ntest: ../test/images\n", [NO_TEST]),
        ("train: train/images\nval: valid/images\ntest: [test-dev.txt, more]\n", [NO_TEST]),
        ("train: /content/x-1/train/images\nval: /content/x-1/valid/images\n", [TRAIN, VALID]),
        ("train: x-1/train/images\nval: x-1/valid/images\n", [TRAIN, VALID]),
        ("train: train\\images\nval: ..\\valid\\images\n", [TRAIN, VALID]),
        ("train: train/images\nval: val/images\n", [VALID]),
        ("train: train/images\nvalid: valid/images\n", []),
    ],
)
def test_paths_whose_meaning_is_plain(tmp_path, task, text, said):
    folder = tmp_path / "street_OD"
    WRITERS["yaml_roboflow"](folder)
    rewrite(folder, HEAD + text)
    assert notes_of(task, folder) == said
    assert [len(target["labels"]) for _, target in targets_of(task, folder, "train")] == [1, 2, 0]


@pytest.mark.parametrize("path", ["/content/x/images", "../other/photos", "/images", "vallue/images"])
def test_paths_whose_meaning_is_not(tmp_path, task, path):
    """A folder `images` of another split, or of all, must not be taken."""
    folder = tmp_path / "street_OD"
    WRITERS["yaml_roboflow"](folder)
    (folder / "images").mkdir()
    rewrite(folder, f"{HEAD}train: train/images\nval: {path}\n")
    (line,) = lines_of(task, folder)
    assert f"val: got '{path}', which does not exist in" in line


@pytest.mark.parametrize("names", ["{'0': car, '1': person}", '{"1": person, "0": car}', "{0: car, '1': person}"])
def test_class_ids_as_text(tmp_path, task, names):
    folder = tmp_path / "street_OD"
    WRITERS["yaml"](folder)
    rewrite(folder, f"train: images/train\nval: images/val\nnames: {names}\n")
    assert lines_of(task, folder) == []
    assert [target["labels"].tolist() for _, target in targets_of(task, folder, "train")] == [[1], [2, 1], []]


@pytest.mark.parametrize("names", ["{'0': car, '01': person}", "{'0': car, 'x': person}", "{'0': car, 0: person}"])
def test_class_ids_that_are_none(tmp_path, task, names):
    folder = tmp_path / "street_OD"
    WRITERS["yaml"](folder)
    rewrite(folder, f"train: images/train\nval: images/val\nnames: {names}\n")
    assert any(" names: got " in line or "'0' again" in line for line in lines_of(task, folder))
