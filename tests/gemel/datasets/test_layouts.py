"""Every layout is recognised from its files and gives the same samples for the same images."""

import contextlib
import logging
import shutil

import pytest
import torch
from format_samples import NAMES, SIZE, TRUTH, WRITERS, write_coco, write_voc
from layout_samples import lines_of, task_of

from dataset_manager import open_task
from gemel.datasets.folders import open_split
from gemel.merging.fingerprint import dataset_digest


@pytest.mark.parametrize("name", WRITERS)
def test_every_layout_gives_the_same_samples(tmp_path, task, name, caplog):
    folder = tmp_path / "street_OD"
    WRITERS[name](folder)
    with caplog.at_level(logging.WARNING):
        assert lines_of(task, folder) == []
    missing = "2 times: an image without an annotation file was taken as one without objects"
    found = [record.getMessage() for record in caplog.records]
    assert found == ([f"street_pico: dataset: {missing}"] if name == "yaml" else [])
    for split, images in TRUTH.items():
        dataset = open_split(task, folder, split)
        assert [path.stem for path, _ in dataset.samples] == list(images)
        for index, objects in enumerate(images.values()):
            image, target = dataset[index]
            assert image.shape == (3, SIZE[1], SIZE[0])
            assert target["boxes"].tolist() == [list(map(float, box)) for _, *box in objects]
            assert target["labels"].tolist() == [NAMES.index(label) + 1 for label, *_ in objects]
            marked = split == "val" and name.startswith(("coco", "voc"))
            assert ("iscrowd" in target) == marked and not any(target.get("iscrowd", []))
    data = open_task(task, [tmp_path], device=torch.device("cpu"), seed=0, batch_size=2)
    assert data.class_names == (() if name == "readme" else NAMES) and data.test is None


@pytest.mark.parametrize("name", WRITERS)
def test_a_changed_dataset_is_noticed(tmp_path, task, name):
    folder = tmp_path / "street_OD"
    WRITERS[name](folder)
    before = dataset_digest(task, folder)
    (folder / "README.txt").write_text("notes")
    assert dataset_digest(task, folder) == before
    changed = 0
    for path in [path for path in sorted(folder.rglob("*")) if path.suffix in (".txt", ".json", ".xml")]:
        for old, new in (("car", "van"), ('"category_id": 3', '"category_id": 7'), ("0.", "0.0"), ("14<", "13<")):
            if old in (text := path.read_text()) and path.name[0] not in "R":
                path.write_text(text.replace(old, new, 1))
                with contextlib.suppress(ValueError):  # or it is refused
                    assert dataset_digest(task, folder) != before, (path, old)
                path.write_text(text)
                changed += 1
    assert changed >= 2 and dataset_digest(task, folder) == before
    image = next(path for path in sorted(folder.rglob("*.png")))
    image.write_bytes(image.read_bytes() + b"0")
    assert dataset_digest(task, folder) != before


@pytest.mark.parametrize("name", WRITERS)
def test_a_test_split_is_found(tmp_path, task, name, monkeypatch):
    monkeypatch.setitem(TRUTH, "test", {"f": [("car", 0, 0, 10, 10)]})
    folder = tmp_path / "street_OD"
    WRITERS[name](folder)
    for path in folder.glob("*.yaml"):
        test = {"yaml": "images/test", "yaml_roboflow": "test/images", "yaml_lists": "test.txt"}[name]
        path.write_text(path.read_text().replace("test:\n", "") + f"test: {test}\n")
    assert lines_of(task, folder) == []
    (image, target) = open_split(task, folder, "test")[0]
    assert target["labels"].tolist() == [1]
    data = open_task(task, [tmp_path], device=torch.device("cpu"), seed=0, batch_size=2)
    assert len(data.test.dataset) == 1


@pytest.mark.parametrize("name", WRITERS)
def test_class_ids_outside_the_outputs_of_the_model(tmp_path, task, name):
    folder = tmp_path / "street_OD"
    WRITERS[name](folder)
    lines = lines_of(task_of(2), folder)
    named = "" if name == "readme" else " (person)"
    assert len(lines) == 2 and all(f"got class id 1{named}; allowed: class ids 0 to 0, the" in line for line in lines)
    assert lines_of(task_of(2, background_class=False), folder) == []


def test_nothing_that_is_known(tmp_path, task):
    folder = tmp_path / "street_OD"
    (folder / "pictures").mkdir(parents=True)
    (line,) = lines_of(task, folder)
    assert line.startswith(
        "street_pico: dataset: got no detection dataset (the folder holds pictures); allowed: one of"
    )


def test_two_layouts_are_refused_and_the_own_wins(tmp_path, task):
    folder = tmp_path / "street_OD"
    write_coco(folder)
    shutil.rmtree(folder / "train2017")
    write_voc(folder)
    (line,) = lines_of(task, folder)
    both = "COCO JSON (annotations/instances_train2017.json) and Pascal VOC XML (Annotations/*.xml)"
    assert line.startswith(f"street_pico: dataset: got {both}; allowed: one of")
    WRITERS["readme"](folder)
    assert lines_of(task, folder) == []
