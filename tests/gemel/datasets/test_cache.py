"""Samples that stay in memory."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from dataset_samples import TO_FLOAT, classifier_task, detector_task, opened, random_transform
from pico import (
    write_classification,
    write_detection,
)

from gemel.datasets import cache
from gemel.datasets import folders as dataset_folders
from gemel.datasets.cache import CacheBudget
from gemel.datasets.loaders import plain_images


def counted(monkeypatch):
    """The files that are decoded from now on."""
    read = []
    load = dataset_folders.load_image
    monkeypatch.setattr(dataset_folders, "load_image", lambda path, turned: read.append(path) or load(path, turned))
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
    first, second = list(data.train), list(data.train)
    assert len(read) == len(set(read)) == len(data.train.dataset), "augmented images are decoded once as well"
    assert str(first) != str(second)


def test_no_more_than_the_given_bytes_stay_in_memory(tmp_path, monkeypatch):
    """Of val and train together."""
    write_classification(tmp_path, "cars_CL", classes=2, images=4)
    task = classifier_task(train=TO_FLOAT, val=TO_FLOAT)
    size = opened(task, tmp_path).val.dataset[0][0].numel()  # a byte a value
    data = opened(task, tmp_path, cache_bytes=5 * size + 1)
    read = counted(monkeypatch)
    first, second = (torch.cat([images for images, _ in data.val]) for _ in range(2))
    assert len(read) == 8 + 3 and torch.equal(first, second)
    assert data.val.dataset.cache.num_bytes == 5 * size
    del read[:]
    list(data.train), list(data.train)
    assert len(read) == 16 and data.train.dataset.cache.num_bytes == 0


def test_samples_of_a_transform_that_is_not_known_are_kept_whole(tmp_path, monkeypatch):
    write_classification(tmp_path, "cars_CL", classes=2, images=4)
    called = []
    task = classifier_task(val=lambda image: called.append(1) or random_transform(image))
    data = opened(task, tmp_path, cache_bytes=1 << 20)
    first, second = (torch.cat([images for images, _ in data.val]) for _ in range(2))
    assert torch.equal(first, second) and len(called) == 8
    assert data.val.dataset.cache.num_bytes == first.nbytes


def test_loader_processes_share_the_budget(monkeypatch):
    monkeypatch.setattr(cache, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    budget = pickle.loads(pickle.dumps(CacheBudget(600)))
    assert budget.take(60) and budget.take(40) and not budget.take(1)  # three splits, each with two processes


def test_a_sample_of_val_depends_on_its_index_alone(tmp_path):
    """Not on whether other samples come from memory, nor on the batches."""
    write_classification(tmp_path, "cars_CL", classes=2, images=4)
    task = classifier_task(val=random_transform)
    data = opened(task, tmp_path, cache_bytes=1 << 20)
    data.val.dataset[2]
    plain = opened(task, tmp_path, batch_size=1)
    assert torch.equal(torch.cat([x for x, _ in data.val]), torch.cat([x for x, _ in plain.val]))
