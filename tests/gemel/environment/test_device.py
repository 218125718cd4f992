"""The device of a run."""

import pytest
import torch

from gemel.environment.device import has_device, pick_device


def test_auto_takes_cuda_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device().type == pick_device("cpu").type == "cpu"
    assert has_device("auto") and not has_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == pick_device("cuda").type == "cuda" and pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "name, message", [("gpu", "got 'gpu', allowed are auto, cpu, cuda"), ("cuda", "no CUDA device")]
)
def test_a_device_that_there_is_not(monkeypatch, name, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        pick_device(name)
