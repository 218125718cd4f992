"""The Pascal VOC layouts: class names, difficult objects, other elements, clipping."""

import logging

import numpy as np
from format_samples import voc_object, voc_text, write_voc
from layout_samples import lines_of, targets_of

from gemel.datasets.layouts import open_layout


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
    assert "street_pico: dataset: 1 times: a box that exceeded the image by rounding was clipped" in caplog.text
    (_, target), _ = targets_of(task, folder, "val")
    assert target["boxes"].tolist() == [[0, 0, 40, 20]]
