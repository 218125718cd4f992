"""Which class id a class gets where annotations name classes or number them freely: unambiguous, or refused."""

import json

import pytest
from format_samples import TRUTH, WRITERS, coco_dict, voc_object, write_coco, write_voc
from layout_samples import Detector, lines_of, targets_of, task_of
from pico import detection_entry

from dataset_manager import check
from gemel.datasets.layouts import open_layout
from gemel.workload import read_workload


@pytest.fixture
def unknown(monkeypatch):
    """The model does not show how many outputs it has."""
    monkeypatch.setattr("gemel.datasets.layouts.num_classes_of", lambda model: None)


def write_ids(folder, ids):
    write_coco(folder)
    for split, images in TRUTH.items():
        file = folder / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(coco_dict(images, ids)))


def labels_of(task, folder):
    return [target["labels"].tolist() for _, target in targets_of(task, folder, "train")]


def notes_of(task, folder):
    notes = {}
    assert check({task.name: task}, [folder.parent], notes) == []
    return notes[task.name]


SPARSE = {"car": 3, "person": 7}
ROOT = {"things": 0, "car": 1, "person": 2}  # as some exports have it, with no object of the first


@pytest.mark.parametrize("ids, outputs", [(SPARSE, 91), (SPARSE, None), (ROOT, None), ({"car": 2, "person": 3}, 10)])
def test_ids_of_two_meanings_are_refused_until_the_task_says_which(tmp_path, monkeypatch, ids, outputs):
    monkeypatch.setattr("gemel.datasets.layouts.num_classes_of", lambda model: outputs)
    folder = tmp_path / "street_OD"
    write_ids(folder, ids)
    (line,) = lines_of(task_of(), folder)
    assert (
        "categories: got category ids [" in line and "may be the model's class ids or only number its classes" in line
    )
    assert line.endswith("state class_ids ('in_order' or 'as_numbered'), or num_classes")
    car, person = (ids[name] for name in ("car", "person"))
    numbered = task_of(class_ids="as_numbered")
    assert lines_of(numbered, folder) == [] and labels_of(numbered, folder) == [[car], [person, car], []]
    first = 1 + sorted(ids).index("car") if ids is not ROOT else 2
    ordered = task_of(class_ids="in_order")
    assert labels_of(ordered, folder) == [[first], [first + 1, first], []]
    named = task_of(class_ids={"person": 1, "car": 2})
    assert lines_of(named, folder) == [] and labels_of(named, folder) == [[2], [1, 2], []]
    assert open_layout(named, folder).class_names == ("person", "car")


def test_the_number_of_outputs_decides_where_it_fits(tmp_path, unknown):
    folder = tmp_path / "street_OD"
    write_ids(folder, SPARSE)
    for outputs, labels in ((3, [[1], [2, 1], []]), (8, [[3], [7, 3], []])):
        (task,) = read_workload({"street_pico": entry_of(num_classes=outputs)})[0].values()
        assert lines_of(task, folder) == [] and labels_of(task, folder) == labels


def entry_of(**more):
    return detection_entry(Detector(3), **more)


@pytest.mark.parametrize("background, said", [(True, None), (False, "0 to 1")])
def test_ids_from_one_are_plain(tmp_path, unknown, background, said):
    folder = tmp_path / "street_OD"
    write_ids(folder, {"car": 1, "person": 2})
    task = task_of(background_class=background)
    found = [line for line in notes_of(task, folder) if "categories" in line]
    line = f"1 times: categories were numbered by their order, so the model's class ids are {said}"
    assert found == ([] if said is None else [f"{line} (class_ids: 'in_order')"])
    assert labels_of(task, folder) == ([[1], [2, 1], []] if background else [[0], [1, 0], []])


def test_names_without_a_class_id_are_refused(tmp_path, unknown):
    folder = tmp_path / "street_OD"
    write_ids(folder, SPARSE)
    line, *_ = lines_of(task_of(class_ids={"car": 1}), folder)
    assert "got objects of person; allowed: the classes of class_ids, with class ids from 1" in line
    line, *_ = lines_of(task_of(class_ids={"car": 0, "person": 1}), folder)
    assert "got objects of car; allowed: the classes of class_ids, with class ids from 1" in line
    write_voc(tmp_path / "voc" / "street_OD")
    line, *_ = lines_of(task_of(class_ids={"car": 1}), tmp_path / "voc" / "street_OD")
    assert "got objects of person; allowed: the classes of class_ids" in line


# ---- names alone: Pascal VOC --------------------------------------------------------------------------------


def add(folder, stem, name):
    file = folder / "Annotations" / f"{stem}.xml"
    file.write_text(file.read_text().replace("</annotation>", voc_object(name, 1, 1, 9, 9) + "</annotation>"))


def test_a_class_that_train_lacks_shifts_no_label(tmp_path, monkeypatch):
    folder = tmp_path / "street_OD"
    write_voc(folder)
    monkeypatch.setattr("gemel.datasets.layouts.num_classes_of", lambda model: 4)
    (line,) = lines_of(task_of(), folder)
    assert (
        "got 2 classes in train (car, person) for a model with 4 outputs; allowed: classes.txt in the dataset" in line
    )
    add(folder, "d", "bus")
    said = (
        "1 times: the class 'bus', of which train has no object, counts among the classes, as the model has 4 outputs"
    )
    assert said in notes_of(task_of(), folder)
    assert labels_of(task_of(), folder) == [[2], [3, 2], []]
    named = task_of(class_ids={"person": 1, "car": 2, "bus": 3})
    assert labels_of(named, folder) == [[2], [1, 2], []] and open_layout(named, folder).class_names[2] == "bus"
    (folder / "classes.txt").write_text("bus\ncar\nperson\n")
    assert labels_of(task_of(), folder) == [[2], [3, 2], []]


def test_names_are_said_where_nothing_confirms_them(tmp_path, unknown):
    folder = tmp_path / "street_OD"
    write_voc(folder)
    assert notes_of(task_of(), folder) == [
        "1 times: classes were numbered by their sorted names, from 1 for 'car' to 2 for 'person'"
    ]
    add(folder, "a", "Car")
    assert "1 times: 'Car' and 'car' differ in capital letters alone and are two classes" in notes_of(task_of(), folder)
    line, *_ = lines_of(task_of(class_ids="in_order"), folder)
    assert "got class_ids 'in_order'; allowed: a dictionary, as objects have names alone" in line


def test_text_files_state_class_ids_already(tmp_path, unknown):
    for layout in ("readme", "yaml"):
        folder = tmp_path / layout / "street_OD"
        WRITERS[layout](folder)
        (line,) = lines_of(task_of(class_ids={"car": 1, "person": 2}), folder)
        assert "got class_ids, though its annotations state class ids" in line


@pytest.mark.parametrize("value", ["order", {}, {"car": -1}, {1: 2}, {"car": 1, "person": 1}, {"car": True}, 3])
def test_class_ids_are_checked(value):
    (problem,) = read_workload({"street_pico": entry_of(class_ids=value)})[1]
    assert problem.key == "class_ids" and "'in_order', 'as_numbered', or a dictionary" in problem.allowed
