"""Folders, samples and loaders: labels, pairing, order, batches, seeds."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import (
    PicoDetector,
    PicoNet,
    classification_entry,
    detection_entry,
    write_classification,
    write_detection,
)
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

import dataset_manager
from dataset_manager import find_dataset, open_task
from gemel.datasets import folders as dataset_folders
from gemel.datasets.folders import open_split
from gemel.datasets.loaders import plain_images, reseed
from gemel.datasets.records import BYTE_ORDER_MARK, WINDOWS_LINES
from gemel.datasets.yolo import TextFile
from gemel.workload import read_workload

CPU = torch.device("cpu")
TO_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def task_of(name, entry, **transforms):
    if transforms:
        entry = {**entry, "transforms": {**entry["transforms"], **transforms}}
    tasks, problems = read_workload({name: entry})
    assert not problems
    return tasks[name]


def classifier_task(name="cars_pico", **transforms):
    return task_of(name, classification_entry(PicoNet()), **transforms)


def detector_task(name="cars_pico", background_class=True, **transforms):
    return task_of(name, detection_entry(PicoDetector(), background_class=background_class), **transforms)


def opened(task, root, batch_size=4, seed=0, **more):
    return open_task(task, [root], device=CPU, seed=seed, batch_size=batch_size, **more)


def save_image(path, colour=0, size=(20, 10), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, colour, colour)).save(path, **more)


def write_detection_split(split, annotations, size=(20, 10)):
    """annotations: stem -> text, or None for an image without a file."""
    for number, (stem, text) in enumerate(annotations.items()):
        save_image(split / "images" / f"{stem}.png", number, size)
        (split / "annotations").mkdir(exist_ok=True)
        if text is not None:
            (split / "annotations" / f"{stem}.txt").write_text(text)


def random_transform(image):
    """Draws from every global generator."""
    return torch.tensor([torch.rand(()), random.random(), np.random.rand()], dtype=torch.float32).reshape(3, 1, 1)


# ---- finding ------------------------------------------------------------------------------------------------


def test_the_first_root_that_has_the_dataset_is_taken(tmp_path):
    task = classifier_task()
    (tmp_path / "b" / "cars_CL").mkdir(parents=True)
    (tmp_path / "c" / "cars_CL").mkdir(parents=True)
    assert find_dataset(task, [tmp_path / "a", tmp_path / "b", tmp_path / "c"]) == tmp_path / "b" / "cars_CL"
    assert find_dataset(task, [tmp_path / "a"]) is None
    with pytest.raises(ValueError, match=f"cars_pico.*no folder 'cars_CL' in {tmp_path / 'a'}"):
        opened(task, tmp_path / "a")


def test_the_default_root_lies_beside_the_checkout():
    checkout = Path(dataset_manager.__file__).resolve().parent
    assert checkout.parent / "dataset_formation" / "datasets" == dataset_manager.DEFAULT_ROOT


# ---- classification -----------------------------------------------------------------------------------------


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


# ---- detection ----------------------------------------------------------------------------------------------


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


def test_bom_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff1 0.5 0.5 0.2 0.2\r\n\r\n0 0.5 0.5 0.1 0.1\r\n".encode())
    objects = TextFile(path).read()
    assert [(box.place, box.class_id) for box in objects.boxes] == [("line 1", 1), ("line 3", 0)]
    assert objects.faults == [] and objects.repairs == {BYTE_ORDER_MARK: 1, WINDOWS_LINES: 1}


def test_boxes_are_clipped_to_the_image(tmp_path):
    write_detection_split(tmp_path / "cars_OD" / "train", {"a": "0 0.9502 0.5 0.1 1.0008"})
    _, target = open_split(detector_task(), tmp_path / "cars_OD", "train")[0]
    assert torch.allclose(target["boxes"], torch.tensor([[18.004, 0, 20, 10]]), atol=1e-4)


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


def test_detection_batches_are_lists_of_plain_tensors(tmp_path):
    write_detection(tmp_path, "cars_OD", images=6)
    data = opened(detector_task(), tmp_path)
    images, targets = next(iter(data.val))
    assert isinstance(images, list) and isinstance(targets, list) and len(images) == len(targets) == 4
    assert type(images[0]) is torch.Tensor and images[0].dtype == torch.float32
    assert data.test is None and data.class_names == ()
    assert [target["image_id"] for _, part in data.val for target in part] == list(range(6))


# ---- failures -----------------------------------------------------------------------------------------------


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


# ---- batches and order --------------------------------------------------------------------------------------


def sizes(loader):
    return [len(labels) for _, labels in loader]


def test_a_trailing_batch_is_dropped_in_training_only(tmp_path):
    write_classification(tmp_path, "cars_CL", classes=3, images=3)
    data = opened(classifier_task(), tmp_path, batch_size=4)
    assert sizes(data.train) == [4, 4] and len(data.train) == 2  # the ninth image alone would break BatchNorm
    assert sizes(data.val) == [8, 1]
    assert sizes(opened(classifier_task(), tmp_path, batch_size=16).train) == [9]  # less than a batch, but all there is
    assert sizes(opened(classifier_task(), tmp_path, batch_size=9).train) == [9]


def order(loader):
    return [label for _, labels in loader for label in labels.tolist()]


def test_train_order_is_a_function_of_the_seed(tmp_path):
    write_classification(tmp_path, "cars_CL", classes=4, images=6)
    task = classifier_task()
    data = opened(task, tmp_path)
    first, second = order(data.train), order(data.train)
    assert first != second and sorted(first) == sorted(second) == sorted([0, 1, 2, 3] * 6)
    again = opened(task, tmp_path)
    assert (order(again.train), order(again.train)) == (first, second)
    assert order(opened(task, tmp_path, seed=1).train) != first
    write_classification(tmp_path, "vans_CL", classes=4, images=6)
    assert order(opened(classifier_task("vans_pico"), tmp_path).train) != first  # every task has an order of its own
    assert order(data.val) == sorted(first)


def test_reseed_makes_a_round_reproducible_wherever_it_starts(tmp_path):
    write_classification(tmp_path, "cars_CL", classes=4, images=6)
    task = classifier_task(train=random_transform)

    def passes(data):
        return [torch.cat([images.flatten(1).sum(1), labels]) for _ in range(2) for images, labels in data.train]

    data = opened(task, tmp_path)
    reseed(data, 0, "round", 3)
    expected = passes(data)
    next(iter(data.train))  # a pass that is not finished
    reseed(data, 0, "round", 3)
    assert all(map(torch.equal, passes(data), expected))
    fresh = opened(task, tmp_path, seed=9)
    reseed(fresh, 0, "round", 3)
    assert all(map(torch.equal, passes(fresh), expected))
    reseed(fresh, 0, "round", 4)
    assert not all(map(torch.equal, passes(fresh), expected))


def test_loaders_neither_depend_on_the_global_generators_nor_draw_from_them(tmp_path):
    write_classification(tmp_path, "cars_CL", classes=2, images=4)
    task = classifier_task(train=random_transform, val=random_transform)

    def run(seed):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        data = opened(task, tmp_path)
        images = torch.cat([images for loader in (data.train, data.val) for images, _ in loader])
        return images, (torch.rand(()).item(), random.random(), np.random.rand())

    (images, drawn), (same_images, other_drawn) = run(1), run(2)
    assert torch.equal(images, same_images) and drawn != other_drawn
    assert len(images.flatten(1).unique(dim=0)) == len(images)  # every sample is drawn for on its own
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert drawn == (torch.rand(()).item(), random.random(), np.random.rand())


def test_workers_change_nothing_and_stay(tmp_path):
    write_detection(tmp_path, "cars_OD", images=6)
    task = detector_task()
    plain, workers = opened(task, tmp_path), opened(task, tmp_path, num_workers=1)
    assert workers.train.persistent_workers and plain.train.num_workers == 0
    assert workers.train.multiprocessing_context.get_start_method() != "fork"
    for _ in range(2):
        for (images, targets), (other_images, other_targets) in zip(plain.train, workers.train, strict=True):
            assert all(map(torch.equal, images, other_images))
            assert [t["image_id"] for t in targets] == [t["image_id"] for t in other_targets]
            assert all(isinstance(t["boxes"], tv_tensors.BoundingBoxes) for t in other_targets)


# ---- memory ---------------------------------------------------------------------------------------------------


def counted(monkeypatch):
    """The files that are decoded from now on."""
    read = []
    load = dataset_folders.load_image
    monkeypatch.setattr(dataset_folders, "load_image", lambda path: read.append(path) or load(path))
    return read


@pytest.mark.parametrize("kind", ["CL", "OD"])
def test_what_is_evaluated_is_decoded_once_and_is_the_same_each_time(tmp_path, monkeypatch, kind):
    write = write_classification if kind == "CL" else write_detection
    write(tmp_path, f"cars_{kind}", images=3)
    task = classifier_task() if kind == "CL" else detector_task()
    plain, data = opened(task, tmp_path), opened(task, tmp_path, cache_bytes=1 << 20)
    wanted = [(images, targets) for images, targets in plain.val]
    read = counted(monkeypatch)
    for _ in range(3):
        for (images, targets), (other, other_targets) in zip(wanted, data.val, strict=True):
            assert all(map(torch.equal, images, other)) and str(targets) == str(other_targets)
            for image in other:
                image.zero_()  # an eval method may do what it likes with its batch
            if kind == "OD":
                [target["boxes"].zero_() for target in other_targets]
    assert len(read) == len(data.val.dataset) == len(set(read))
    del read[:]
    for _ in range(2):
        plain_images(data, 1 << 20, 0, "fit")
    assert len(read) == len(set(read)) == len(data.plain.dataset)
    del read[:]
    for _ in range(2):
        list(data.train)
    assert len(read) > len(set(read)), "augmented images are never the same"


def test_no_more_than_the_given_bytes_stay_in_memory(tmp_path, monkeypatch):
    write_classification(tmp_path, "cars_CL", classes=2, images=4)
    size = opened(classifier_task(), tmp_path).val.dataset[0][0].nbytes
    data = opened(classifier_task(), tmp_path, cache_bytes=2 * (3 * size + 1))  # half of it is for train
    read = counted(monkeypatch)
    first, second = (torch.cat([images for images, _ in data.val]) for _ in range(2))
    assert len(read) == 8 + 5 and torch.equal(first, second)


def test_a_sample_of_val_depends_on_its_index_alone(tmp_path):
    """Whether its neighbours come from memory or not, and in whatever batches it is asked for."""
    write_classification(tmp_path, "cars_CL", classes=2, images=4)
    task = classifier_task(val=random_transform)
    data = opened(task, tmp_path, cache_bytes=1 << 20)
    data.val.dataset[2]
    plain = opened(task, tmp_path, batch_size=1)
    assert torch.equal(torch.cat([x for x, _ in data.val]), torch.cat([x for x, _ in plain.val]))


def test_plain_images_come_in_large_batches_where_they_are_of_one_size(tmp_path):
    write_classification(tmp_path, "cars_CL", classes=2, images=4)
    data = opened(classifier_task(), tmp_path, batch_size=3)
    pixels = data.plain.dataset[0][0][0].numel()
    small, large = (plain_images(data, 8 * pixels, 0, "fit", batch_pixels=p) for p in (0, 7 * pixels))
    assert [len(batch) for batch in small] == [6, 2] and [len(batch) for batch in large] == [7, 1]
    assert torch.equal(torch.cat(small), torch.cat(large))
    for split in ("train", "val"):
        write_detection_split(tmp_path / "vans_OD" / split, {"a": None, "b": None, "c": None})
    data = opened(detector_task("vans_pico"), tmp_path, batch_size=1)
    assert [len(batch) for batch in plain_images(data, 600, 0, "fit", batch_pixels=600)] == [3]
    save_image(tmp_path / "vans_OD" / "train" / "images" / "a.png", size=(30, 10))
    assert [len(batch) for batch in plain_images(data, 900, 0, "fit", batch_pixels=900)] == [1, 1, 1]


def test_transforms_that_cannot_be_pickled_load_in_the_main_process(tmp_path, caplog):
    write_classification(tmp_path, "cars_CL", images=2)
    task = classifier_task(train=lambda image: TO_FLOAT(image))
    with caplog.at_level(logging.WARNING):
        data = opened(task, tmp_path, num_workers=1)
    assert data.train.num_workers == 0 and data.val.num_workers == 1
    assert "cars_pico: loads in the main process" in caplog.text
    assert sum(sizes(data.train)) == 4
