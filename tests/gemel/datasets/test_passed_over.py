"""What of a dataset is read, what is passed over, and that the latter is counted and named."""

import json
import os
import shutil

import format_samples
import pytest
import torch
from dataset_samples import classifier_task, detector_task, opened, save_image, write_detection_split
from format_samples import WRITERS
from layout_samples import targets_of, task_of
from pico import PicoNet, classification_entry, write_classification
from PIL import Image
from torchvision.datasets import ImageFolder

from dataset_manager import check
from gemel.datasets.folders import open_split
from gemel.evaluation.coco import IOU_THRESHOLDS, precision_of
from gemel.workload import read_workload


def notes_of(task, root):
    notes = {}
    assert check({task.name: task}, [root], notes) == []
    return notes[task.name]


def problems_of(task, root):
    return [str(problem) for problem in check({task.name: task}, [root])]


@pytest.fixture
def cars(tmp_path):
    return write_classification(tmp_path, "cars_CL", classes=3, images=4)


# ---- class folders ------------------------------------------------------------------------------------------


def test_class_folders_are_read_as_image_folder_reads_them(cars):
    """Subfolders by day, links, and every suffix that both read."""
    for split in ("train", "val"):
        for number, (path, suffix) in enumerate(
            zip(sorted((cars / split / "class1").iterdir()), SUFFIXES, strict=True)
        ):
            (cars / split / "class1" / f"day{number % 2}").mkdir(exist_ok=True)
            Image.open(path).save(cars / split / "class1" / f"day{number % 2}" / f"{path.stem}{suffix}")
            path.unlink()
    shutil.move(cars / "train" / "class2", cars / "elsewhere")
    os.symlink(cars / "elsewhere", cars / "train" / "class2")
    os.symlink("..", cars / "elsewhere" / "up")
    assert notes_of(classifier_task(), cars.parent) == []
    os.unlink(cars / "elsewhere" / "up")  # ImageFolder would follow it for ever
    for split in ("train", "val"):
        theirs = [(os.path.basename(path), label) for path, label in ImageFolder(cars / split).samples]
        ours = [(path.name, label) for path, label in open_split(classifier_task(), cars, split).samples]
        assert sorted(ours, key=lambda sample: sample[1]) == sorted(theirs, key=lambda sample: sample[1])


SUFFIXES = (".tif", ".ppm", ".WEBP", ".jpeg")


def test_what_is_no_image_of_a_class_is_counted_and_named(cars):
    (cars / "train" / "class0" / "notes.md").write_text("x")
    (cars / "train" / "class0" / "deep").mkdir()
    (cars / "train" / "class0" / "deep" / "raw.heic").write_bytes(b"x")
    (cars / "val" / "__MACOSX").mkdir()
    (cars / "val" / "__MACOSX" / "._0.png").write_bytes(b"x")
    save_image(cars / "val" / "lost.png", size=(16, 16))
    assert sorted(notes_of(classifier_task(), cars.parent)) == [
        "1 times: a file .heic was passed over, as it is no image (such as deep/raw.heic)",
        "1 times: a file .md was passed over, as it is no image (such as class0/notes.md)",
        "1 times: a file .png was passed over, as it lies in no class folder (such as val/lost.png)",
    ]


def test_a_class_without_an_image_is_said(cars):
    task = read_workload({"cars_pico": classification_entry(PicoNet(4))})[0]["cars_pico"]
    for split in ("train", "val"):
        (cars / split / "class1a").mkdir()
    shutil.rmtree(cars / "val" / "class2")
    assert notes_of(task, cars.parent) == [
        "1 times: the class class1a has no image in train",
        "1 times: the class class1a has no image in val",
        "1 times: the class class2 has no image in val",
    ]
    assert {label for _, label in open_split(task, cars, "train").samples} == {0, 1, 3}


def test_a_class_that_only_val_has_counts_where_the_model_has_an_output_for_it(cars):
    shutil.rmtree(cars / "train" / "class1")
    task = read_workload({"cars_pico": classification_entry(PicoNet(3), num_classes=3)})[0]["cars_pico"]
    said = (
        "1 times: the class class1 has a folder in val alone, and counts among the classes, as the model has 3 outputs"
    )
    assert said in notes_of(task, cars.parent)
    assert {label for _, label in open_split(task, cars, "train").samples} == {0, 2}
    assert {label for _, label in open_split(task, cars, "val").samples} == {0, 1, 2}
    (line,) = problems_of(classifier_task(), cars.parent)
    assert "got a class folder 'class1'; allowed: the class folders of train: class0, class2 (or num_classes" in line


def test_a_task_numbers_its_classes(cars):
    ids = {"class2": 0, "class0": 1, "class1": 2}
    task = read_workload({"cars_pico": classification_entry(PicoNet(3), class_ids=ids)})[0]["cars_pico"]
    assert notes_of(task, cars.parent) == []
    found = {path.parent.name: label for path, label in open_split(task, cars, "val").samples}
    assert found == ids and opened(task, cars.parent).class_names == ("class2", "class0", "class1")
    del ids["class1"]
    task = read_workload({"cars_pico": classification_entry(PicoNet(3), class_ids=ids)})[0]["cars_pico"]
    assert "got a class folder 'class1'; allowed: the class folders of class_ids" in problems_of(task, cars.parent)[0]


@pytest.mark.parametrize("name", ["valid", "Val", "validation"])
def test_the_val_folder_by_its_other_names(cars, name):
    (cars / "val").rename(cars / name)
    (cars / "train").rename(cars / "Train")
    assert notes_of(classifier_task(), cars.parent) == []
    assert len(opened(classifier_task(), cars.parent).val.dataset) == 12


def test_outputs_other_than_stated_are_a_problem(cars):
    task = read_workload({"cars_pico": classification_entry(PicoNet(3), num_classes=5)})[0]["cars_pico"]
    assert "num_classes: got 5; allowed: 3, the number of outputs of the model" in problems_of(task, cars.parent)[0]


# ---- annotations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["readme", "yaml", "coco", "voc"])
def test_rows_that_stand_twice_count_once(tmp_path, task, layout):
    """With a copy that nothing finds, the precision of a perfect detector would be one half."""
    folder = tmp_path / "street_OD"
    WRITERS[layout](folder)
    before = [target["boxes"].tolist() for _, target in targets_of(task, folder, "train")]
    DOUBLE[layout](folder)
    assert any(line.startswith("3 times: an object that stands twice in an image") for line in notes_of(task, tmp_path))
    targets = [target for _, target in targets_of(task, folder, "train")]
    assert [target["boxes"].tolist() for target in targets] == before
    found = [rows_of(target) for target in targets]
    assert precision_of(targets, found, IOU_THRESHOLDS).mean() == pytest.approx(1)


def rows_of(target):
    boxes = target["boxes"].as_subclass(torch.Tensor).double()
    ones = torch.ones(len(boxes), dtype=torch.float64)
    return torch.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], ones, target["labels"].double()])


def double_text(pattern):
    def double(folder):
        for file in folder.glob(pattern):
            file.write_text(file.read_text() * 2)

    return double


def double_coco(folder):
    file = folder / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"] += [{**entry, "id": 1000 + entry["id"]} for entry in content["annotations"]]
    file.write_text(json.dumps(content))


def double_voc(folder):
    for stem in "abc":
        file = folder / "Annotations" / f"{stem}.xml"
        head, *objects = file.read_text().replace("</annotation>\n", "").split("<object>")
        file.write_text(head + "".join(f"<object>{one}" for one in objects * 2) + "</annotation>\n")


DOUBLE = {
    "readme": double_text("train/annotations/*.txt"),
    "yaml": double_text("labels/train/*.txt"),
    "coco": double_coco,
    "voc": double_voc,
}


@pytest.mark.parametrize("layout", ["readme", "yaml_roboflow"])
def test_label_files_in_capitals_and_missing_ones(tmp_path, task, layout):
    folder = tmp_path / "street_OD"
    WRITERS[layout](folder)
    before = [target["labels"].tolist() for _, target in targets_of(task, folder, "train")]
    places = folder / "train" / ("annotations" if layout == "readme" else "labels")
    (places / "a.txt").rename(places / "a.TXT")
    (places / "c.txt").unlink()
    assert notes_of(task, tmp_path) == ["1 times: an image without an annotation file was taken as one without objects"]
    assert [target["labels"].tolist() for _, target in targets_of(task, folder, "train")] == before


def test_images_and_annotations_in_folders_below(tmp_path):
    write_detection_split(tmp_path / "cars_OD" / "train", {"a": "0 0.5 0.5 0.2 0.2", "b": "1 0.5 0.5 0.2 0.2"})
    for part in ("images", "annotations"):
        place = tmp_path / "cars_OD" / "train" / part
        (place / "day1").mkdir()
        for path in list(place.glob("a.*")):
            path.rename(place / "day1" / path.name)
    dataset = open_split(detector_task(), tmp_path / "cars_OD", "train")
    assert [path.name for path, _ in dataset.samples] == ["b.png", "a.png"]
    assert [dataset[index][1]["labels"].tolist() for index in range(2)] == [[2], [1]]


def test_an_annotation_of_a_file_that_is_no_image_says_so(tmp_path, task):
    WRITERS["readme"](tmp_path / "street_OD")
    image = tmp_path / "street_OD" / "train" / "images" / "a.png"
    image.rename(image.with_suffix(".heic"))
    (line,) = problems_of(task, tmp_path)
    assert "got no image a.*, but a.heic, which cannot be read; allowed: annotation files named after an image" in line


@pytest.mark.parametrize("values, labels", [(3, [1]), (2, [1])])
def test_keypoints_behind_a_box_are_not_read(tmp_path, task, values, labels):
    """With two values a keypoint, such a row has as many numbers as an outline."""
    folder = tmp_path / "street_OD"
    WRITERS["yaml"](folder)
    points = " 0.9 0.9 2" * 4 if values == 3 else " 0.9 0.9" * 4
    (folder / "labels" / "val" / "d.txt").write_text(f"0 0.25 0.5 0.1 0.2{points}\n")
    text = (folder / "data.yaml").read_text()
    (folder / "data.yaml").write_text(f"{text}kpt_shape: [4, {values}]\n")
    assert problems_of(task, tmp_path) == []
    target = targets_of(task, folder, "val")[0][1]
    assert target["labels"].tolist() == labels and target["boxes"].round().tolist() == [[8, 8, 12, 12]]
    (folder / "labels" / "val" / "d.txt").write_text("0 0.1 0.1 0.9 0.1 0.9 0.9\n")
    (line,) = problems_of(task, tmp_path)
    assert "and none or" in line and "keypoints, as kpt_shape says" in line
    (folder / "data.yaml").write_text(f"{text}kpt_shape: 17\n")
    assert "kpt_shape: got 17; allowed: [number of keypoints, 2 or 3]" in problems_of(task, tmp_path)[0]


def test_outlines_are_counted(tmp_path, task):
    folder = tmp_path / "street_OD"
    WRITERS["yaml_roboflow"](folder)
    (folder / "valid" / "labels" / "d.txt").write_text("1 0.25 0.25 0.5 0.25 0.5 0.75\n")
    assert notes_of(task, tmp_path) == ["1 times: the outline of an object was replaced by the box around it"]


@pytest.mark.parametrize(
    "row, corners, said",
    [
        ("0.5 0.5 0.5 0.4 0.25 0.3 0.75 0.3 0.75 0.7 0.25 0.7", [10, 6, 30, 14], "read by its box"),
        ("0.5 0.5 0.5 0.4 0.3 0.35 0.7 0.35 0.7 0.65", [10, 6, 30, 14], "read by its box"),  # not drawn to its edges
        ("0.5 0.5 0.5 0.4 0.4 0.4 0.6 0.4 0.6 0.6", [16, 8, 24, 12], "replaced by the box"),  # points of a smaller one
        ("0.25 0.5 0.2 0.4 0.6 0.3 0.9 0.3 0.9 0.7", [8, 6, 36, 14], "replaced by the box"),  # points elsewhere
    ],
)
def test_a_box_before_its_outline_is_no_part_of_the_outline(tmp_path, task, row, corners, said):
    folder = tmp_path / "street_OD"
    WRITERS["yaml"](folder)
    (folder / "labels" / "val" / "d.txt").write_text(f"1 {row}\n")
    assert [note for note in notes_of(task, tmp_path) if said in note]
    assert targets_of(task, folder, "val")[0][1]["boxes"].round().tolist() == [corners]


@pytest.mark.parametrize("layout", ["readme", "yaml_roboflow", "coco_roboflow", "voc_roboflow"])
def test_a_test_split_without_objects_is_left_out(tmp_path, task, layout, monkeypatch):
    monkeypatch.setitem(format_samples.TRUTH, "test", {"f": [], "g": []})
    folder = tmp_path / "street_OD"
    WRITERS[layout](folder)
    if layout == "yaml_roboflow":
        (folder / "data.yaml").write_text((folder / "data.yaml").read_text() + "test: ../test/images\n")
    said = "1 times: the test split was left out, as it has no image with an object"
    assert notes_of(task, tmp_path) == [said]
    assert opened(task_of(), tmp_path).test is None


def test_pictures_that_are_turned_or_cut_are_counted(cars):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(cars / "val" / "class0" / "0.png", size=(16, 16), exif=exif)
    Image.new("I;16", (16, 16), 7400).save(cars / "val" / "class0" / "1.png")
    Image.new("P", (16, 16)).save(cars / "val" / "class0" / "2.png")
    Image.new("RGBA", (16, 16)).save(cars / "val" / "class0" / "3.png")
    turned, *more = notes_of(classifier_task(), cars.parent)
    assert turned == "1 times: an image with an EXIF orientation was turned as it says (exif_orientation)"
    assert [line[:32] for line in more] == [
        "1 times: 16-bit or 32-bit grey w",
        "1 times: colours of a palette we",
        "1 times: the alpha channel was d",
        "1 times: of the 256 levels of 8 ",
    ]
    assert "an image has 1 or fewer, as its 16-bit values lie between 7400 and 7400" in more[3]


def test_a_task_reads_images_as_they_are_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ("train", "val"):
        for number in range(2):
            save_image(tmp_path / "cars_CL" / split / "x" / f"{number}.jpg", exif=exif)
    entry = classification_entry(PicoNet())
    for turned, shape in ((True, (3, 20, 10)), (False, (3, 10, 20))):
        task = read_workload({"cars_pico": {**entry, "exif_orientation": turned}})[0]["cars_pico"]
        (line,) = notes_of(task, tmp_path)
        assert line.startswith("4 times: an image with an EXIF") and ("was not turned" in line) == (not turned)
        assert open_split(task, tmp_path / "cars_CL", "val")[0][0].shape == shape


@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_sizes_of_pixels_as_stored_name_the_key(tmp_path, task, layout, monkeypatch):
    folder = tmp_path / "street_OD"
    WRITERS[layout](folder)
    exif = Image.Exif()
    exif[0x0112] = 8
    for path in folder.rglob("*.png"):
        Image.open(path).save(path, exif=exif)
    lines = problems_of(task, tmp_path)
    assert len(lines) == 5 and all(
        "followed (exif_orientation: False); allowed: the size that" in line for line in lines
    )
    stored = task_of(exif_orientation=False)
    assert problems_of(stored, tmp_path) == []
    assert targets_of(stored, folder, "val")[0][1]["boxes"].tolist() == [[10, 5, 20, 15]]
