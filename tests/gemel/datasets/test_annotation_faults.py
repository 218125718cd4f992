"""Malformed annotations, one per row: refused with file and place, or repaired with a counted warning.

Every row (annotation_faults.py) damages one thing of a dataset of format_samples.py. A refused fault must be the only
problem, unless the row lists more; a repair must leave no problem and be counted.
"""

import logging
import os
import random

import pytest
from annotation_faults import JSON, PIXELS, REFUSED, REPAIRED, TEXT, XML, edit, swap
from format_samples import WRITERS
from pico import PicoDetector, detection_entry, to_tensor
from PIL import Image

from dataset_manager import check
from gemel.datasets.folders import open_split
from gemel.workload import read_workload


class Detector(PicoDetector):
    def forward(self, images, targets=None):
        return super().forward([image[:, :16, :16] for image in images], targets)


@pytest.fixture(scope="module")
def task():
    entry = detection_entry(Detector(), transforms={"train": to_tensor, "val": to_tensor})
    tasks, _ = read_workload({"street_pico": entry})
    return tasks["street_pico"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("gemel.datasets.layouts.num_classes_of", lambda model: model.num_classes)
    return tmp_path / "street_OD"


def lines_of(task, folder):
    return [str(problem) for problem in check({task.name: task}, [folder.parent])]


def test_there_are_enough_rows():
    assert len(REFUSED) + len(REPAIRED) >= 60
    assert {row[0].split("_")[0] for row in REFUSED} == {"readme", "yaml", "coco", "voc"}


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row[0]}-{row[2][:60]}")
def test_faults_are_refused_with_their_place(folder, task, row):
    """A number at the end of a row: how many problems there are, where others follow from the first."""
    layout, damage, *expected = row
    count = expected.pop() if isinstance(expected[-1], int) else len(expected)
    assert all(isinstance(start, str) for start in expected), row
    WRITERS[layout](folder)
    assert lines_of(task, folder) == []
    damage(folder)
    lines = lines_of(task, folder)
    assert len(lines) == count, lines
    for start in expected:
        colon = "" if start.startswith("got") else " "
        start = f"street_pico: dataset{': ' if not colon else ' '}{start}"
        assert any(line.startswith(start) for line in lines), (start, lines)
    assert all(len(line) < 700 for line in lines)


@pytest.mark.parametrize("row", REPAIRED, ids=lambda row: f"{row[0]}-{row[2]}")
def test_repairs_are_counted(folder, task, row, caplog):
    layout, damage, warning, count = row
    WRITERS[layout](folder)
    damage(folder)
    with caplog.at_level(logging.WARNING):
        assert lines_of(task, folder) == []
    expected = [f"street_pico: dataset: {count} times: {warning}"] if warning else []
    found = [record.getMessage() for record in caplog.records]
    assert [any(line.startswith(start) for line in found) for start in expected] == [True] * len(expected)
    assert bool(found) == bool(expected), found
    for split in ("train", "val"):
        for _, target in open_split(task, folder, split):
            assert len(target["boxes"]) == len(target["labels"])


def test_everything_is_listed_at_once_and_bounded(folder, task):
    WRITERS["coco"](folder)

    def many(content):
        entry = content["annotations"][1]
        content["annotations"] += [{**entry, "id": 1000 + i, "bbox": [0]} for i in range(25)]
        content["annotations"] += [{**entry, "id": 2000 + i, "category_id": 5} for i in range(3)]
        content["images"].append({"id": 5, "file_name": "nowhere.png"})

    edit(many)(folder)
    lines = lines_of(task, folder)
    kinds = [sum(kind in line for line in lines) for kind in (".bbox: got", "category_id: got 5", "no image 'nowhere")]
    assert kinds == [10, 3, 1] and len(lines) == 15
    assert f"street_pico: dataset: got 15 more problems of this kind; allowed: {PIXELS}" in lines


def test_what_breaks_after_the_check_names_the_place(folder, task):
    WRITERS["voc"](folder)
    dataset = open_split(task, folder, "train")
    swap(XML, "<xmin>3", "<xmin>x")(folder)
    with pytest.raises(RuntimeError, match=r"street_pico: .*a\.png: ValueError: .*a\.xml line 3: got xmin 'x'"):
        dataset[0]
    WRITERS["coco"](folder.with_name("other"))
    dataset = open_split(task, folder.with_name("other"), "train")
    Image.new("RGB", (80, 20)).save(folder.with_name("other") / "train2017" / "a.png")
    with pytest.raises(
        RuntimeError, match=r"a\.png: ValueError: got 80 x 20 pixels instead of 40 x 20, as .*train2017"
    ):
        dataset[0]
    edit(lambda content: content.clear(), "annotations/instances_val2017.json")(folder.with_name("other"))
    with pytest.raises(ValueError, match=r"street_pico: dataset: .*val2017\.json categories: got nothing.*and 2 more"):
        open_split(task, folder.with_name("other"), "val")


def damaged(content, generator):
    """A copy with a few bytes replaced, removed or doubled, or cut off."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(content) + 1)
        what = generator.choice([b"", b"-", b"nan", b"9" * 30, b"[", b"<", b"\0", b"\xff", b'"', b"\n", b": ", b"null"])
        content[place : place + generator.choice([0, 1, 1, 4])] = what
    return bytes(content[: generator.randrange(len(content) + 1)] if generator.random() < 0.2 else content)


def fuzz(folder, task, layout, seeds):
    WRITERS[layout](folder)
    files = [path for path in sorted(folder.rglob("*.*")) if path.suffix in (".txt", ".json", ".xml", ".yaml")]
    for seed in seeds:
        generator = random.Random(seed)
        file = generator.choice(files)
        content = file.read_bytes()
        file.write_bytes(damaged(content, generator))
        problems = check({task.name: task}, [folder.parent])
        if not problems:
            [sample for split in ("train", "val") for sample in open_split(task, folder, split)]
        file.write_bytes(content)
    assert lines_of(task, folder) == []


@pytest.mark.parametrize("layout", WRITERS)
def test_no_damage_is_a_crash(folder, task, layout):
    """Random damage is refused, or every sample can be read."""
    fuzz(folder, task, layout, range(15))


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", WRITERS)
def test_no_damage_is_a_crash_exhaustively(folder, task, layout):
    fuzz(folder, task, layout, range(3000))


@pytest.mark.parametrize("kind", ["text", "xml", "json"])
def test_a_file_that_cannot_be_read(folder, task, kind):
    layout, file = {"text": ("readme", TEXT), "xml": ("voc", XML), "json": ("coco", JSON)}[kind]
    WRITERS[layout](folder)
    (folder / file).unlink()
    os.symlink("nowhere", folder / file)
    lines = lines_of(task, folder)
    assert any(line.startswith(f"street_pico: dataset {file}: got FileNotFoundError") for line in lines), lines
