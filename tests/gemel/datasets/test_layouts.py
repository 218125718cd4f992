"""Every layout is recognised without being named, and says the same about the same images."""

import contextlib
import json
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from format_samples import NAMES, SIZE, TRUTH, WRITERS, coco_dict, voc_object, voc_text, write_coco, write_voc
from pico import PicoDetector, detection_entry, to_tensor
from PIL import Image

from dataset_manager import check, open_task
from eval_methods import frcnn_eval
from gemel.datasets.folders import open_split
from gemel.datasets.layouts import open_layout
from gemel.datasets.ultralytics import label_file
from gemel.merging.fingerprint import dataset_digest
from gemel.workload import read_workload


class Detector(PicoDetector):
    """Any image size."""

    def forward(self, images, targets=None):
        return super().forward([image[:, :16, :16] for image in images], targets)


def task_of(num_classes=3, **entry):
    tasks, problems = read_workload({"street_pico": detection_entry(Detector(num_classes), **entry)})
    assert not problems
    return tasks["street_pico"]


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr("gemel.datasets.checks.num_classes_of", lambda model: model.num_classes)
    monkeypatch.setattr("gemel.datasets.layouts.num_classes_of", lambda model: model.num_classes)
    return task_of()


def lines_of(task, folder):
    return [str(problem) for problem in check({task.name: task}, [folder.parent])]


def targets_of(task, folder, split):
    return [(image, target) for image, target in open_split(task, folder, split)]


# ---- all layouts alike --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_layout_gives_the_same_samples(tmp_path, task, name, caplog):
    folder = tmp_path / "street_OD"
    WRITERS[name](folder)
    with caplog.at_level(logging.WARNING):
        assert lines_of(task, folder) == []
    assert caplog.text == ""
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


# ---- recognition --------------------------------------------------------------------------------------------


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


# ---- data.yaml ----------------------------------------------------------------------------------------------


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
    assert ("its own folder was taken" in caplog.text) == (path == "/somewhere/else")


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


# ---- COCO ---------------------------------------------------------------------------------------------------


def change_coco(folder, split, change):
    file = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "outputs, background, ids, labels, names",
    [
        (3, True, {"car": 3, "person": 7}, [1, 2], ("car", "person")),
        (8, True, {"car": 3, "person": 7}, [3, 7], ("N/A", "N/A", "car", "N/A", "N/A", "N/A", "person")),
        (8, False, {"car": 3, "person": 7}, [3, 7], ("N/A", "N/A", "N/A", "car", "N/A", "N/A", "N/A", "person")),
        (2, False, {"car": 3, "person": 7}, [0, 1], ("car", "person")),
        (3, True, {"car": 0, "person": 1}, [1, 2], ("car", "person")),
        (3, True, {"car": 1, "person": 2}, [1, 2], ("car", "person")),
        (3, True, {"all": 0, "car": 1, "person": 2}, [1, 2], ("car", "person")),
        (4, True, {"car": 0, "person": 2, "van": 3}, [1, 2], ("car", "person", "van")),
        (4, True, {"all": 0, "car": 1, "person": 2}, [2, 3], ("all", "car", "person")),
    ],
)
def test_category_ids(tmp_path, task, outputs, background, ids, labels, names):
    """In the order of the ids; where the model has as many outputs as the ids ask for, the ids themselves."""
    folder = tmp_path / "street_OD"
    write_coco(folder)
    for split, images in TRUTH.items():
        file = folder / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(coco_dict(images, ids)))
    task = task_of(outputs, background_class=background)
    assert lines_of(task, folder) == []
    targets = [target for _, target in targets_of(task, folder, "train")]
    assert [target["labels"].tolist() for target in targets] == [labels[:1], labels[::-1], []]
    assert open_layout(task, folder).class_names == names


def test_crowds_are_not_trained_on_and_do_not_count(tmp_path, task):
    folder = tmp_path / "street_OD"
    write_coco(folder)
    for split in ("train", "val"):
        change_coco(folder, split, lambda content: content["annotations"][-1].update(iscrowd=1, category_id=3))
    assert [len(target["labels"]) for _, target in targets_of(task, folder, "train")] == [1, 1, 0]
    (line,) = lines_of(task, folder)
    assert line.startswith("street_pico: dataset val: got no image with an object")
    box = {"id": 1, "image_id": 11, "category_id": 3, "bbox": [0, 0, 20, 20]}
    change_coco(folder, "val", lambda content: content["annotations"].append(box))
    assert lines_of(task, folder) == []
    targets = [target for _, target in targets_of(task, folder, "val")]
    assert [target["iscrowd"].tolist() for target in targets] == [[1], [0]]
    val = open_split(task, folder, "val")
    assert [val.has_labels(index) for index in range(2)] == [False, True]

    class Fixed(torch.nn.Module):  # finds the crowd twice, with higher scores than what counts
        def forward(self, images):
            crowd = {"boxes": torch.tensor([[10.0, 5, 20, 15]] * 2), "labels": torch.tensor([1, 1])}
            found = {
                "boxes": torch.tensor([[0.0, 0, 20, 20]]),
                "labels": torch.tensor([1]),
                "scores": torch.ones(1) / 2,
            }
            return [{**crowd, "scores": torch.ones(2)}, found]

    data = open_task(task, [tmp_path], device=torch.device("cpu"), seed=0, batch_size=2)
    assert frcnn_eval(Fixed(), data.val) == pytest.approx(1)
    assert data.screen is data.val


def test_a_transform_that_loses_crowd_flags_is_refused(tmp_path):
    def halved(image, target):
        image, target = to_tensor(image, target)
        return image, {**target, "boxes": target["boxes"][:0], "labels": target["labels"][:0]}

    task = task_of(transforms={"train": to_tensor, "val": halved})
    write_coco(tmp_path / "street_OD")
    (line,) = lines_of(task, tmp_path / "street_OD")
    assert line.startswith("street_pico: transforms val: got TypeError: the transform returned 1 values of iscrowd")


def test_images_without_a_stated_size_and_boxes_without_a_side(tmp_path, task, caplog):
    folder = tmp_path / "street_OD"
    write_coco(folder)

    def change(content):
        for image in content["images"]:
            del image["width"], image["height"]
        content["annotations"].append({**content["annotations"][0], "id": 999, "bbox": [3, 3, 0, 5]})

    change_coco(folder, "train", change)
    with caplog.at_level(logging.WARNING):
        assert lines_of(task, folder) == []
    assert "street_pico: dataset: 3 times: the size of an image was taken from the image" in caplog.text
    assert "street_pico: dataset: 1 times: a box without width or height was left out" in caplog.text
    (_, target), *_ = targets_of(task, folder, "train")
    assert target["boxes"].tolist() == [[2, 4, 12, 14]]


def test_an_image_that_is_not_named_is_left_out_and_counted(tmp_path, task, caplog):
    folder = tmp_path / "street_OD"
    write_coco(folder)
    Image.new("RGB", SIZE).save(folder / "val2017" / "z.png")
    with caplog.at_level(logging.WARNING):
        assert lines_of(task, folder) == []
    assert "street_pico: dataset: 1 times: an image that the annotation file does not name" in caplog.text


def test_a_json_file_is_parsed_once(tmp_path, task, monkeypatch):
    folder = tmp_path / "street_OD"
    write_coco(folder)
    parsed = []
    loads = json.loads
    monkeypatch.setattr(
        "gemel.datasets.coco.json.loads", lambda *args, **more: parsed.append(1) or loads(*args, **more)
    )
    assert lines_of(task, folder) == [] and dataset_digest(task, folder)
    open_task(task, [tmp_path], device=torch.device("cpu"), seed=0, batch_size=2)
    assert len(parsed) == 2
    change_coco(folder, "val", lambda content: content["annotations"].clear())
    assert len(lines_of(task, folder)) == 1


# ---- Pascal VOC ---------------------------------------------------------------------------------------------


def test_classes_by_file_or_by_name(tmp_path, task):
    folder = tmp_path / "street_OD"
    write_voc(folder)
    (folder / "classes.txt").write_text("person\ncar\n")
    assert lines_of(task, folder) == [] and open_layout(task, folder).class_names == ("person", "car")
    assert [target["labels"].tolist() for _, target in targets_of(task, folder, "train")] == [[2], [1, 2], []]


def test_difficult_objects_are_not_trained_on_and_do_not_count(tmp_path, task):
    folder = tmp_path / "street_OD"
    write_voc(folder)
    hard = voc_object("car", 1, 1, 9, 9, "<difficult>1</difficult>")
    for stem in "ad":
        file = folder / "Annotations" / f"{stem}.xml"
        file.write_text(file.read_text().replace("</annotation>", hard + "</annotation>"))
    assert lines_of(task, folder) == []
    assert [len(target["labels"]) for _, target in targets_of(task, folder, "train")] == [1, 2, 0]
    assert [target["iscrowd"].tolist() for _, target in targets_of(task, folder, "val")] == [[0, 1], []]


def test_parts_of_objects_and_other_elements_are_passed_over(tmp_path, task):
    folder = tmp_path / "street_OD"
    write_voc(folder)
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part><polygon><x1>3</x1></polygon>"
    text = voc_text([]).replace("</annotation>", voc_object("person", 10.5, 5, 20, 15.25, part) + "</annotation>")
    (folder / "Annotations" / "d.xml").write_text(text)
    assert lines_of(task, folder) == []
    (_, target), _ = targets_of(task, folder, "val")
    assert np.allclose(target["boxes"], [[10.5, 5, 20, 15.25]])


def test_voc_files_that_count_from_zero_are_clipped(tmp_path, task, caplog):
    folder = tmp_path / "street_OD"
    write_voc(folder)
    (folder / "Annotations" / "d.xml").write_text(voc_text([("car", -1, -1, 40, 20)]))
    with caplog.at_level(logging.WARNING):
        assert lines_of(task, folder) == []
    assert "street_pico: dataset: 1 times: a box that left the image by rounding was clipped" in caplog.text
    (_, target), _ = targets_of(task, folder, "val")
    assert target["boxes"].tolist() == [[0, 0, 40, 20]]
