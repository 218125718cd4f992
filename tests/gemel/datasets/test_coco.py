"""The COCO layouts: category ids, crowds, images without a size."""

import json
import logging

import pytest
import torch
from format_samples import SIZE, TRUTH, coco_dict, write_coco
from layout_samples import lines_of, targets_of, task_of
from pico import to_tensor
from PIL import Image

from dataset_manager import open_task
from eval_methods import frcnn_eval
from gemel.datasets.folders import open_split
from gemel.datasets.layouts import open_layout
from gemel.merging.fingerprint import dataset_digest


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


def test_a_transform_that_loses_crowd_flags_is_refused(tmp_path, task):
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
    assert "street_pico: dataset: 3 times: the size of an image was read from the image" in caplog.text
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


def test_names_as_other_systems_and_tools_write_them(tmp_path, task, caplog):
    """Backslashes, subsets in capitals, and `iscrowd: null` have one meaning."""
    folder = tmp_path / "street_OD"
    write_coco(folder)
    before = [target["boxes"].tolist() for _, target in targets_of(task, folder, "train")]

    def change(content):
        for image in content["images"]:
            image["file_name"] = "images\\Train\\" + image["file_name"]
        for entry in content["annotations"]:
            entry["iscrowd"] = None

    change_coco(folder, "train", change)
    (folder / "images").mkdir()
    (folder / "train2017").rename(folder / "images" / "Train")
    (folder / "annotations" / "instances_train2017.json").rename(folder / "annotations" / "instances_Train.json")
    with caplog.at_level(logging.WARNING):
        assert lines_of(task, folder) == []
    assert "3 times: a backslash in the name of an image was read as a slash" in caplog.text
    assert [target["boxes"].tolist() for _, target in targets_of(task, folder, "train")] == before
