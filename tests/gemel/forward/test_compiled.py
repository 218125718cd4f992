"""A module runs compiled within, with the hooks that it has then, and is compiled once for each form."""

import copy

import pytest
import torch
from pico import PicoNet

from gemel.forward import compiled
from gemel.forward.compiled import Compiled
from gemel.forward.hooks import hooked

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were handed to the compiler."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    return found


def test_models_of_one_architecture_are_compiled_once_and_run_compiled_within_alone(graphs):
    models = [PicoNet(3).train() for _ in range(12)]
    for _ in range(2):  # as in two rounds
        for model in models:
            expected = model(IMAGES)
            with Compiled(model).within():
                assert torch.allclose(model(IMAGES), expected, atol=1e-6)
    assert len(graphs) == 1
    copied = copy.deepcopy(models[0])
    with Compiled(models[0]).within():
        copied(IMAGES[:1].expand(7, -1, -1, -1))
    assert len(graphs) == 1, "a copy is not compiled"


def test_hooks_of_now_are_called_with_gradients(graphs):
    model, seen = PicoNet(3).train(), []

    def keep(name, module, inputs, output):
        seen.append(output)

    with Compiled(model).within():
        model(IMAGES)
    with hooked(model, ["conv1"], keep):
        with Compiled(model).within():
            model(IMAGES)
        model(IMAGES)
    with Compiled(model).within():
        model(IMAGES)
    assert len(seen) == 2, "in each pass with the hook, compiled or not"
    found, expected = (torch.autograd.grad(y.square().sum(), model.conv1.weight)[0] for y in seen)
    assert torch.allclose(found, expected, rtol=1e-4) and float(expected.norm()) > 0
    assert 2 <= len(graphs) <= 3


def test_what_is_frozen_is_another_form(graphs):
    model = PicoNet(3).train()
    for frozen in (False, True):
        model.conv1.requires_grad_(not frozen)
        with Compiled(model).within():
            model(IMAGES).sum().backward()
        assert (model.conv1.weight.grad is None) == frozen
        model.zero_grad(set_to_none=True)
    assert len(graphs) == 2
