import copy

import pytest
import torch
from pico import Mixed, PicoDetector, PicoNet
from torch import nn

from gemel.fitting.sensitivity import METHODS, predict_sensitivity
from gemel.sharing.groups import find_groups
from gemel.sharing.tying import tie


def generator():
    return torch.Generator().manual_seed(0)


def workload():
    """Two classifiers and a detector of one ancestor; in b_x alone the second convolution was trained far away."""
    torch.manual_seed(0)
    ancestor = PicoNet()
    models = nn.ModuleDict({"a_x": copy.deepcopy(ancestor), "b_x": copy.deepcopy(ancestor), "c_x": PicoDetector()})
    models["c_x"].load_state_dict(ancestor.state_dict(), strict=False)
    with torch.no_grad():
        models["b_x"].conv2.weight.add_(0.3 * torch.randn(8, 8, 3, 3))
        models["a_x"].conv1.weight.add_(0.001 * torch.randn(8, 3, 3, 3))
    images = {"a_x": [torch.rand(5, 3, 16, 16)] * 2, "b_x": [torch.rand(5, 3, 16, 16)]}
    images["c_x"] = [[torch.rand(3, 16, 16)] * 3] * 2
    teachers = {task: copy.deepcopy(model).eval() for task, model in models.items()}
    groups = find_groups(models)
    tie(models, groups)
    return models, teachers, groups, images


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_whose_weights_changed_scores_higher_than_one_that_is_the_same(method):
    models, teachers, groups, images = workload()
    states = copy.deepcopy(models.state_dict())
    scores = predict_sensitivity(models, teachers, groups, images, method=method, generator=generator())
    named = {(group.occurrences[0].layer, task): value for (group, task), value in scores.items()}
    assert set(scores) == {(group, task) for group in groups for task in group.tasks}
    assert all(value >= 0 for value in scores.values())
    assert named["conv2", "b_x"] > 10 * named["conv1", "b_x"] and named["conv2", "a_x"] > 10 * named["conv1", "a_x"]
    assert all(torch.equal(states[key], value) for key, value in models.state_dict().items())
    assert not any(layer._forward_hooks for model in teachers.values() for layer in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_equal_have_no_sensitivity(method):
    torch.manual_seed(0)
    models = nn.ModuleDict({"a_x": PicoNet()})
    models["b_x"] = copy.deepcopy(models["a_x"])
    teachers = {task: copy.deepcopy(model) for task, model in models.items()}
    groups = find_groups(models)
    tie(models, groups)
    images = {task: [torch.rand(4, 3, 16, 16)] for task in models}
    scores = predict_sensitivity(models, teachers, groups, images, method=method, generator=generator())
    assert max(scores.values()) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_every_group_has_a_score_also_where_nothing_can_be_fitted(method):
    torch.manual_seed(0)
    models = nn.ModuleDict({"a_x": Mixed(), "b_x": Mixed()})
    teachers = {task: copy.deepcopy(model) for task, model in models.items()}
    groups = find_groups(models)
    tie(models, groups)
    images = {task: [torch.rand(4, 3, 16, 16)] for task in models}
    scores = predict_sensitivity(models, teachers, groups, images, method=method, generator=generator())
    assert {group.occurrences[0].layer for group, _ in scores} >= {"attention", "attention.out_proj", "fc"}
    assert all(value > 0 for value in scores.values())


def test_a_method_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="method: got 'guess'; allowed: weight_distance"):
        predict_sensitivity(nn.ModuleDict(), {}, (), {}, method="guess", generator=generator())
