"""Samples of one split: labels, image modes, pairing, boxes, failures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_samples import TO_FLOAT, classifier_task, detector_task, opened, save_image, write_detection_split
from pico import (
    write_classification,
)
from PIL import Image
from torchvision import tv_tensors

from gemel.datasets.folders import open_split


def test_labels_are_the_sorted_class_folders_of_train_in_every_split(tmp_path):
    for split, names in {"train": "cab", "val": "ca", "test": "b"}.items():
        for name in names:
            save_image(tmp_path / "cars_CL" / split / name / "1.png", "abc".index(name) * 50)
    save_image(tmp_path / "cars_CL" / "train" / ".hidden" / "1.png")
    data = opened(classifier_task(), tmp_path)
    assert data.class_names == ("a", "b", "c")
    for loader, expected in ((data.train, [0, 1, 2]), (data.val, [0, 2]), (data.test, [1])):
        (images, labels) = next(iter(loader))
        assert sorted(labels.tolist()) == expected and labels.dtype == torch.int64
        assert (images[:, 0, 0, 0] * 255).round().tolist() == [50 * label for label in labels.tolist()]
        assert images.shape[1:] == (3, 10, 20) and type(images) is torch.Tensor


def test_image_suffixes_and_hidden_files(tmp_path):
    for name in ("a.jpg", "b.JPEG", "c.PNG", "d.bmp", "e.webp", ".f.jpg"):
        save_image(tmp_path / "cars_CL" / "train" / "x" / name)
    (tmp_path / "cars_CL" / "train" / "x" / "notes.txt").write_text("no image")
    names = [path.name for path, _ in open_split(classifier_task(), tmp_path / "cars_CL", "train").samples]
    assert names == ["a.jpg", "b.JPEG", "c.PNG", "d.bmp", "e.webp"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "cars_CL" / "train" / "x" / ("a.jpg" if mode == "CMYK" else "a.png")
    path.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4), (200, 0, 0)).convert(mode).save(path)
    image, _ = open_split(classifier_task(), tmp_path / "cars_CL", "train")[0]
    assert image.shape == (3, 4, 4)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    path = tmp_path / "cars_CL" / "train" / "x" / "a.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.array([[0, 257 * 10], [257 * 200, 65535]], dtype=np.uint16)).save(path)
    image, _ = open_split(classifier_task(), tmp_path / "cars_CL", "train")[0]
    assert (image * 255).round().tolist() == [[[0, 10], [200, 255]]] * 3


def test_exif_orientation_is_applied_in_both_kinds(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright
    save_image(tmp_path / "cars_CL" / "train" / "x" / "a.jpg", exif=exif)
    save_image(tmp_path / "cars_OD" / "train" / "images" / "a.jpg", exif=exif)
    (tmp_path / "cars_OD" / "train" / "annotations").mkdir()
    (tmp_path / "cars_OD" / "train" / "annotations" / "a.txt").write_text("0 0.5 0.25 1 0.5")
    assert open_split(classifier_task(), tmp_path / "cars_CL", "train")[0][0].shape == (3, 20, 10)
    image, target = open_split(detector_task(), tmp_path / "cars_OD", "train")[0]
    assert image.shape == (3, 20, 10) and target["boxes"].tolist() == [[0, 0, 10, 10]]


def test_images_and_annotations_pair_by_stem(tmp_path):
    """By sorted position, the missing file of f10 would give that image the boxes of f2."""
    stems = ["f10", "f2", "a", "a-b", "a_b", "f1"]
    texts = {stem: None if stem == "f10" else f"{number} 0.5 0.5 0.1 0.1" for number, stem in enumerate(stems)}
    write_detection_split(tmp_path / "cars_OD" / "train", texts)
    dataset = open_split(detector_task(), tmp_path / "cars_OD", "train")
    assert [path.stem for path, _ in dataset.samples] == ["a-b", "a", "a_b", "f1", "f10", "f2"]
    for (path, _), (image, target) in zip(dataset.samples, (dataset[i] for i in range(6)), strict=True):
        number = stems.index(path.stem)
        assert round(float(image[0, 0, 0]) * 255) == number  # the image is the one that the stem says
        assert target["labels"].tolist() == ([] if path.stem == "f10" else [number + 1])


@pytest.mark.parametrize("background_class, first", [(True, 1), (False, 0)])
def test_labels_keep_their_classes(tmp_path, background_class, first):
    text = "2 0.5 0.5 0.2 0.4\n0 0.25 0.5 0.5 1\n\n1.0 0.5 0.5 1 1\n"
    write_detection_split(tmp_path / "cars_OD" / "train", {"a": "", "b": text})
    _, target = open_split(detector_task(background_class=background_class), tmp_path / "cars_OD", "train")[1]
    assert target["labels"].tolist() == [2 + first, first, 1 + first] and target["labels"].dtype == torch.int64
    assert torch.allclose(target["boxes"], torch.tensor([[8.0, 3, 12, 7], [0, 0, 10, 10], [0, 0, 20, 10]]))
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and target["boxes"].canvas_size == (10, 20)
    assert target["image_id"] == 1


def test_boxes_that_a_transform_empties_go_with_their_labels(tmp_path):
    def crop_left_half(image, target):
        left = target["boxes"].clamp(torch.zeros(4), torch.tensor([10.0, 10, 10, 10]))
        target["boxes"] = tv_tensors.wrap(left, like=target["boxes"])
        return TO_FLOAT(image.crop((0, 0, 10, 10)), {**target, "iscrowd": torch.tensor([0, 1, 0])})

    text = "0 0.25 0.5 0.1 0.1\n1 0.75 0.5 0.1 0.1\n2 0.5 0.5 0.2 0.2\n"
    write_detection_split(tmp_path / "cars_OD" / "train", {"a": text})
    _, target = open_split(detector_task(train=crop_left_half), tmp_path / "cars_OD", "train")[0]
    assert target["labels"].tolist() == [1, 3] and target["iscrowd"].tolist() == [0, 0]
    assert torch.allclose(target["boxes"], torch.tensor([[4.0, 4.5, 6, 5.5], [8, 4, 10, 6]]))
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)


def test_empty_images_are_legal_in_training_and_evaluation(tmp_path):
    texts = {"a": None, "b": "", "c": "0 0.25 0.5 0.4 0.8"}
    for split in ("train", "val"):
        write_detection_split(tmp_path / "cars_OD" / split, texts, size=(16, 16))
    task = detector_task()
    data = opened(task, tmp_path, batch_size=3)
    images, targets = next(iter(data.train))
    assert sorted(len(target["labels"]) for target in targets) == [0, 0, 1]
    assert {tuple(target["boxes"].shape) for target in targets} == {(0, 4), (1, 4)}
    loss = sum(task.model.train()(images, targets).values())
    assert torch.isfinite(loss)
    assert 0 <= task.eval_method(task.model, data.val) <= 1


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:40])])
def test_an_image_that_breaks_later_is_named(tmp_path, damage):
    write_classification(tmp_path, "cars_CL", images=2)
    data = opened(classifier_task(), tmp_path)
    broken = tmp_path / "cars_CL" / "val" / "class1" / "0.png"
    damage(broken)
    with pytest.raises(RuntimeError, match=f"cars_pico: {broken}: "):
        list(data.val)


def test_an_annotation_that_breaks_later_is_named(tmp_path):
    write_detection_split(tmp_path / "cars_OD" / "train", {"a": "0 0.5 0.5 0.2 0.2\n0 0.5 x 0.2 0.2"})
    with pytest.raises(RuntimeError, match=r"cars_pico: .*a\.png: ValueError: .*a\.txt line 2: got '0 0.5 x 0.2 0.2'"):
        open_split(detector_task(), tmp_path / "cars_OD", "train")[0]
