"""One bad input each; the message names the task, the place, what was got and what is allowed."""

import logging
import os
import random

import numpy as np
import pytest
import torch
from dataset_samples import classifier_lines, classifier_task, detector_lines, lines_of, opened, tiny_fcos
from pico import (
    PicoDetector,
    PicoNet,
    classification_entry,
    detection_entry,
    write_classification,
)
from PIL import Image
from torchvision.transforms import v2

from dataset_manager import check
from gemel.workload import read_workload

# ---- nothing wrong ------------------------------------------------------------------------------------------


def test_good_datasets_have_no_problem(cars, boxes, tmp_path):
    entries = {"cars_a": classification_entry(PicoNet(3)), "cars_b": detection_entry(PicoDetector())}
    tasks, _ = read_workload(entries)
    assert check(tasks, [tmp_path / "elsewhere", tmp_path]) == []


def test_what_is_legal(boxes):
    """Windows files, rounding over the edge, empty files, a labelling tool's classes.txt, classes that do not occur."""
    folder = boxes / "val" / "annotations"
    (folder / "frame0.txt").write_bytes("\ufeff1.0 0.5 0.5 1.0009 1\r\n\r\n0 0.9 0.5 0.2 0.2\r\n".encode())
    (folder / "frame1.txt").write_text("")
    (folder / "classes.txt").write_text("car\ntruck\n")
    assert detector_lines(boxes, tiny_fcos(9)) == []


def test_check_leaves_models_and_generators_as_they_were(cars):
    model = PicoNet(3).train()
    model.conv2.eval()  # one of its own mode; the norm would count its batches in train mode
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    jitter = v2.Compose([v2.ColorJitter(0.2), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    assert classifier_lines(cars, model, train=jitter) == []
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


# ---- folders and images -------------------------------------------------------------------------------------


def test_missing_dataset_says_where_it_looked_and_what_is_near(cars):
    (line,) = lines_of(cars.parent, classification_entry(PicoNet()), name="Car_pico")
    assert line.startswith(f"Car_pico: dataset: got no folder 'Car_CL' in {cars.parent}")
    assert "did you mean 'cars_CL'?" in line
    (line,) = lines_of(cars.parent / "wrong", classification_entry(PicoNet()))
    assert f"{cars.parent / 'wrong'} (which does not exist)" in line and "did you mean" not in line


def test_missing_and_empty_splits(cars):
    for path in (cars / "val").rglob("*.png"):
        path.rename(cars / path.name)
    (line,) = classifier_lines(cars)
    assert line.startswith("cars_pico: dataset val: got no images (the folder holds class0, class1, class2); allowed:")
    assert "at least 1 image as val/<class>/*.jpg" in line
    (cars / "train").rename(cars / "training")
    line, other = classifier_lines(cars)
    assert line.startswith("cars_pico: dataset train: got no such folder; allowed: at least 2 images as train/<class>")
    assert other.startswith("cars_pico: dataset val: got no images")


@pytest.mark.parametrize("place", [None, "0.png", "unknown/0.png"])
def test_a_test_folder_without_labels_is_left_out_and_said(cars, place, caplog):
    (cars / "test").mkdir()
    if place:
        (cars / "test" / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(cars / "test" / place)
    with caplog.at_level(logging.WARNING):
        assert classifier_lines(cars) == []
    said = "cars_pico: dataset: 1 times: the test split was left out, as it has no image with a label"
    assert [record.getMessage() for record in caplog.records] == [said]
    assert opened(classifier_task(), cars.parent).test is None


def test_one_train_image_is_too_few(cars, boxes):
    for keep, folder in ((("class0", "0.png"), cars / "train"), (("images", "frame0.png"), boxes / "train")):
        for path in folder.rglob("*.*"):
            if path.parts[-2:] != keep and path.stem != "frame0":
                path.unlink()
    (line,) = classifier_lines(cars)
    assert line.startswith("cars_pico: dataset train: got 1 image; allowed: at least 2 images as train/<class>/*.jpg")
    (line,) = detector_lines(boxes)
    assert line.startswith("cars_pico: dataset train: got 1 image; allowed: at least 2 images as train/images/*.jpg")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_lacks(cars, split):
    (cars / "val").rename(cars / split)
    if split == "test":
        write_classification(cars.parent, "cars_CL", classes=3, images=4, splits=("val",))
    (cars / split / "class0").rename(cars / split / "klass0")
    (line,) = classifier_lines(cars)
    allowed = "the class folders of train: class0, class1, class2 (or num_classes or class_ids, from which"
    assert line.startswith(f"cars_pico: dataset {split}: got a class folder 'klass0'; allowed: {allowed}")


def test_class_ids_beyond_the_outputs(cars):
    task = read_workload(
        {"cars_pico": classification_entry(PicoNet(3), class_ids={"class0": 0, "class1": 1, "class2": 7})}
    )
    (problem,) = check(task[0], [cars.parent])
    said = "class_ids: got {'class2': 7}; allowed: class ids 0 to 2, as the model has 3 outputs"
    assert str(problem) == f"cars_pico: {said}"


def test_more_classes_than_outputs(cars):
    expected = "cars_pico: dataset train: got 3 class folders (class0, class1, class2); allowed: at most 2"
    (line,) = classifier_lines(cars, PicoNet(2))
    assert line.startswith(expected)

    class Wrapped(PicoNet):  # an output with logits, as other libraries have it
        def forward(self, images):
            return type("Output", (), {"logits": super().forward(images)})()

    (line,) = classifier_lines(cars, Wrapped(2))
    assert line.startswith(expected)
    assert classifier_lines(cars, Wrapped(4)) == []


@pytest.mark.parametrize("kind", ["classification", "detection"])
def test_broken_images_are_named(cars, boxes, kind):
    folder, lines = (cars / "val" / "class1", classifier_lines) if kind == "classification" else (boxes, detector_lines)
    folder = folder if kind == "classification" else boxes / "val" / "images"
    names = sorted(path.name for path in folder.iterdir())
    (folder / names[0]).write_bytes(b"")
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:100])
    (folder / names[2]).write_text("<html>not found</html>")
    (folder / names[3]).unlink()
    os.symlink("nowhere.png", folder / names[3])
    place = folder.relative_to(cars if kind == "classification" else boxes)
    found = lines(cars if kind == "classification" else boxes)
    assert len(found) == 4
    errors = ["an empty file", "OSError", "UnidentifiedImageError", "FileNotFoundError"]
    for line, name, got in zip(found, names, errors, strict=False):
        assert line.startswith(f"cars_pico: dataset {place}/{name}: got {got}")
        assert line.endswith("allowed: images that can be decoded")


def test_images_are_sampled_evenly_and_empty_files_always_found(tmp_path):
    folder = write_classification(tmp_path, "cars_CL", classes=1, images=100, splits=("train",))
    write_classification(tmp_path, "cars_CL", classes=1, images=2, splits=("val",))
    images = sorted((folder / "train" / "class0").iterdir())
    for path in images[50:]:
        path.write_text("broken")
    images[1].write_bytes(b"")
    found = classifier_lines(folder)
    assert any("0/1.png" not in line and "UnidentifiedImageError" in line for line in found)
    assert f"train/class0/{images[1].name}: got an empty file" in found[0]
    assert found[-1].startswith("cars_pico: dataset: got 7 more problems")  # 16 of 32 sampled, and the empty file
    assert len(found) == 11


def test_the_last_image_is_in_the_sample(cars):
    write_classification(cars.parent, "cars_CL", classes=3, images=40, splits=("val",))
    last = sorted((cars / "val" / "class2").iterdir())[-1]
    last.write_text("broken")
    (line,) = classifier_lines(cars)
    assert f"dataset val/class2/{last.name}: got UnidentifiedImageError" in line


# ---- annotations --------------------------------------------------------------------------------------------

FIVE_NUMBERS = "5 numbers: class x_center y_center width height"
WHOLE = "class ids that are whole numbers from 0"
INSIDE = "boxes inside the image, relative to its width and height"
AREA = "boxes with a width and a height above 0"


@pytest.mark.parametrize(
    "line, got, allowed",
    [
        ("0 0.5 0.5 0.2", "'0 0.5 0.5 0.2'", FIVE_NUMBERS),
        ("0 0.5 0.5 0.2 0.2 0.9", "'0 0.5 0.5 0.2 0.2 0.9'", FIVE_NUMBERS),
        ("car 0.5 0.5 0.2 0.2", "'car 0.5 0.5 0.2 0.2'", FIVE_NUMBERS),
        ("0 0.5 nan 0.2 0.2", "'0 0.5 nan 0.2 0.2'", "finite numbers"),
        ("0 0.5 0.5 inf 0.2", "'0 0.5 0.5 inf 0.2'", "finite numbers"),
        ("-1 0.5 0.5 0.2 0.2", "class id -1", WHOLE),
        ("0.5 0.5 0.5 0.2 0.2", "class id 0.5", WHOLE),
        ("0 0.95 0.5 0.2 0.2", "the box 0.95 0.5 0.2 0.2", INSIDE),
        ("0 0.5 0.05 0.2 0.2", "the box 0.5 0.05 0.2 0.2", INSIDE),
        ("0 120 60 40 40", "the box 120 60 40 40", INSIDE),
        ("0 0.5 0.5 0 0.2", "the box 0.5 0.5 0 0.2", AREA),
        ("0 0.5 0.5 0.2 -0.2", "the box 0.5 0.5 0.2 -0.2", AREA),
    ],
)
def test_bad_lines_are_named(boxes, line, got, allowed):
    (boxes / "val" / "annotations" / "frame2.txt").write_text(f"0 0.5 0.5 0.2 0.2\n\n{line}\n")
    expected = f"cars_pico: dataset val/annotations/frame2.txt line 3: got {got}; allowed: {allowed}"
    assert detector_lines(boxes) == [expected]


def test_a_file_that_is_no_text(boxes):
    (boxes / "val" / "annotations" / "frame2.txt").write_bytes("0 0.5 0.5 0.2 0.2".encode("utf-16"))
    expected = "cars_pico: dataset val/annotations/frame2.txt line 1: got the byte 0xff; allowed: UTF-8 text"
    assert detector_lines(boxes) == [expected]


def test_a_file_that_cannot_be_read(boxes):
    path = boxes / "val" / "annotations" / "frame2.txt"
    path.unlink()
    os.symlink("nowhere.txt", path)
    (line,) = detector_lines(boxes)
    assert line.startswith("cars_pico: dataset val/annotations/frame2.txt: got FileNotFoundError")


@pytest.mark.parametrize("background_class, highest", [(True, 1), (False, 2)])
def test_class_ids_outside_the_outputs_of_the_model(boxes, background_class, highest):
    rows = "\n".join(f"{class_id} 0.5 0.5 0.2 0.2" for class_id in range(5))
    (boxes / "train" / "annotations" / "frame2.txt").write_text(rows)
    allowed = f"class ids 0 to {highest}, the classes of the model"
    expected = [
        f"cars_pico: dataset train/annotations/frame2.txt line {i + 1}: got class id {i}; allowed: {allowed}"
        for i in range(highest + 1, 5)
    ]
    assert detector_lines(boxes, tiny_fcos(3), background_class=background_class) == expected


def test_an_annotation_without_an_image(boxes):
    path = boxes / "train" / "annotations" / "frame3.txt"
    path.rename(path.with_name("Frame3.txt"))
    expected = "cars_pico: dataset train/annotations/Frame3.txt: got no image Frame3.*"
    assert detector_lines(boxes) == [f"{expected}; allowed: annotation files named after an image"]


def test_two_images_with_one_stem(boxes):
    Image.new("RGB", (16, 16)).save(boxes / "train" / "images" / "frame3.jpg")
    expected = "cars_pico: dataset train/images/frame3.jpg: got the same stem as frame3.png"
    assert detector_lines(boxes) == [f"{expected}; allowed: one image for every stem"]


@pytest.mark.parametrize("how", ["empty files", "another folder"])
def test_a_split_without_objects(boxes, how):
    if how == "another folder":
        (boxes / "val" / "annotations").rename(boxes / "val" / "labels")
    else:
        for path in (boxes / "val" / "annotations").iterdir():
            path.write_text("\n")
    (line,) = detector_lines(boxes)
    folders = "images, labels" if how == "another folder" else "annotations, images"
    assert line.startswith(f"cars_pico: dataset val: got no image with an object (the folder holds {folders})")
    assert "allowed: objects in val/annotations/<stem of the image>.txt" in line and "mAP is undefined" in line


def test_what_is_listed_is_capped_per_task_and_kind(boxes):
    (boxes / "val" / "annotations" / "frame0.txt").write_text("0 0.5\n" * 25 + "0 0.5 0.5 0 0\n" * 10)
    lines = detector_lines(boxes)
    kinds = [line.rsplit("allowed: ", 1)[1] for line in lines]
    assert kinds == [FIVE_NUMBERS] * 11 + [AREA] * 10
    assert lines[10] == f"cars_pico: dataset: got 15 more problems of this kind; allowed: {FIVE_NUMBERS}"


def test_all_problems_of_all_tasks_at_once(cars, boxes):
    (boxes / "val" / "annotations" / "frame0.txt").write_text("0 0.5\n0 0.5 0.5 0 0\n")
    (boxes / "train" / "images" / "frame1.png").write_bytes(b"")
    (cars / "val" / "class9").mkdir()
    entries = {
        "cars_a": classification_entry(PicoNet(2)),
        "cars_b": detection_entry(PicoDetector()),
        "vans_c": detection_entry(PicoDetector()),
    }
    tasks, _ = read_workload(entries)
    found = [(problem.task, problem.key) for problem in check(tasks, [cars.parent])]
    assert found == [
        ("cars_a", "dataset val"),
        ("cars_b", "dataset train/images/frame1.png"),
        ("cars_b", "dataset val/annotations/frame0.txt line 1"),
        ("cars_b", "dataset val/annotations/frame0.txt line 2"),
        ("vans_c", "dataset"),
    ]
