"""Loaders: batches, order by seed, processes, images without augmentation."""

import logging
import random

import numpy as np
import torch
from dataset_samples import (
    TO_FLOAT,
    classifier_task,
    detector_task,
    opened,
    random_transform,
    save_image,
    write_detection_split,
)
from pico import (
    write_classification,
    write_detection,
)
from torchvision import tv_tensors

from gemel.datasets.loaders import batch_size_of, num_samples, plain_images, reseed, restarted, with_half_batches
from model_architectures import build


def test_detection_batches_are_lists_of_plain_tensors(tmp_path):
    write_detection(tmp_path, "cars_OD", images=6)
    data = opened(detector_task(), tmp_path)
    images, targets = next(iter(data.val))
    assert isinstance(images, list) and isinstance(targets, list) and len(images) == len(targets) == 4
    assert type(images[0]) is torch.Tensor and images[0].dtype == torch.float32
    assert data.test is None and data.class_names == ()
    assert [target["image_id"] for _, part in data.val for target in part] == list(range(6))


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


# ---- detectors: no image's result depends on the images beside it ------------------------------------------

SIZES = [(24, 16), (16, 24), (24, 16), (32, 32), (24, 16), (16, 24)]  # (width, height)


def write_mixed_sizes(root):
    for split in ("train", "val"):
        for number, size in enumerate(SIZES):
            write_detection_split(root / "vans_OD" / split, {str(number): "0 0.5 0.5 0.5 0.5\n"}, size)


def shapes(loader):
    return [[tuple(image.shape[-2:]) for image in images] for images, _ in loader]


def test_batches_of_a_detector_have_images_of_one_size(tmp_path):
    write_mixed_sizes(tmp_path)
    data = opened(detector_task("vans_pico"), tmp_path, batch_size=2, screening_images=4)
    assert [len(batch) for batch in shapes(data.val)] == [2, 1, 2, 1]
    for loader in (data.val, data.screen, with_half_batches(data.val), restarted(data.val)):
        assert all(len(set(batch)) == 1 for batch in shapes(loader))
    assert [len(batch) for batch in shapes(with_half_batches(data.val))] == [1] * 6
    assert sorted(target["image_id"] for _, targets in data.val for target in targets) == list(range(6))
    assert batch_size_of(data.val) == 2 and num_samples(data.screen) == 4
    for batch in plain_images(data, 10**6, 0, "fit"):
        assert len({image.shape for image in batch}) == 1
    assert any(len(set(batch)) > 1 for batch in shapes(data.train)), "in training the neighbours change anyway"


def test_images_that_the_transform_brings_to_one_size_share_batches(tmp_path):
    def resized(image, target):
        return TO_FLOAT(image.resize((16, 16))), target

    write_mixed_sizes(tmp_path)
    data = opened(detector_task("vans_pico", val=resized), tmp_path, batch_size=4)
    assert [len(batch) for batch in shapes(data.val)] == [4, 2]


def test_what_a_detector_finds_does_not_depend_on_the_batch_size(tmp_path):
    torch.manual_seed(0)
    write_mixed_sizes(tmp_path)
    model = build("fcos_model", 2, backbone="slim_resnet", layers=(1, 1, 1, 1), width=8, out_channels=32, min_size=160)
    model.eval().score_thresh = 0.0
    found = {}
    for batch_size in (4, 1):
        data = opened(detector_task("vans_pico"), tmp_path, batch_size=batch_size)
        found[batch_size] = {
            target["image_id"]: output
            for images, targets in data.val
            for target, output in zip(targets, model(images), strict=True)
        }
    for number in range(len(SIZES)):
        together, alone = found[4][number], found[1][number]
        assert torch.allclose(together["boxes"], alone["boxes"], atol=1e-3) and len(alone["boxes"]) > 0
        assert torch.allclose(together["scores"], alone["scores"], atol=1e-5)
