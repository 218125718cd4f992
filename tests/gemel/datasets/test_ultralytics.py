"""The layout of a data.yaml: paths, folders, outlines."""

import logging
import os

import pytest
from format_samples import WRITERS
from layout_samples import lines_of, targets_of

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
