"""A task's dataset: found by its name and opened."""

from pathlib import Path

import pytest
from dataset_samples import classifier_task, opened

import dataset_manager
from dataset_manager import find_dataset


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
