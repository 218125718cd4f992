"""A detection task whose model is not built here."""

import pytest
from layout_samples import task_of


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr("gemel.datasets.layouts.num_classes_of", lambda model: model.num_classes)
    return task_of()
