"""Small datasets, and a detection task whose model is not built here."""

import pytest
from layout_samples import task_of
from pico import write_classification, write_detection


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr("gemel.datasets.layouts.num_classes_of", lambda model: model.num_classes)
    return task_of()


@pytest.fixture
def cars(tmp_path):
    return write_classification(tmp_path, "cars_CL", classes=3, images=4)


@pytest.fixture
def boxes(tmp_path):
    """The val images are frame0 to frame7, of which frame5 has no annotation file."""
    return write_detection(tmp_path, "cars_OD", classes=2, images=8)
