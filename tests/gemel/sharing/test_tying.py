import copy

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.sharing.groups import Occurrence, find_groups, restrict, saved_bytes
from gemel.sharing.memory import Memory, distinct_bytes, distinct_tensors
from gemel.sharing.tying import (
    freeze,
    frozen_parameters,
    is_tied,
    restore_snapshot,
    retie,
    take_snapshot,
    tie,
    untie,
)
from model_architectures import build


@pytest.fixture
def models():
    torch.manual_seed(0)
    return nn.ModuleDict({"a_x": PicoNet(3, extra=1), "b_x": PicoNet(4), "c_x": PicoDetector()})


def state_of(models: nn.ModuleDict) -> dict:
    return {key: value.clone() for key, value in models.state_dict().items()}


def test_tied_layers_are_one_parameter_and_modules_stay_apart(models):
    groups = find_groups(models)
    assert not any(is_tied(models, group) for group in groups)
    tie(models, groups)
    assert all(is_tied(models, group) for group in groups)
    assert models["a_x"].conv1.weight is models["c_x"].conv1.weight
    assert models["a_x"].conv1 is not models["c_x"].conv1
    assert models["a_x"].bn1.weight is not models["b_x"].bn1.weight


def test_initial_weights(models):
    first = models["a_x"].conv1.weight.detach().clone()
    mean = torch.stack([models[t].conv1.weight.detach() for t in models]).mean(0)
    groups = find_groups(models)
    snapshot = take_snapshot(models)
    tie(models, groups, "first")
    assert torch.equal(models["b_x"].conv1.weight, first)
    restore_snapshot(snapshot)
    tie(models, groups, "mean")
    assert torch.allclose(models["b_x"].conv1.weight, mean)


def test_tying_again_changes_nothing(models):
    """Neither values nor parameters, on which an optimizer, a snapshot and a memory layout hold on."""
    groups = find_groups(models)
    tie(models, groups)
    parameters, values = dict(models.named_parameters(remove_duplicate=False)), state_of(models)
    tie(models, groups, "first")
    assert all(value is parameters[key] for key, value in models.named_parameters(remove_duplicate=False))
    assert all(torch.equal(values[key], value) for key, value in models.state_dict().items())


def test_the_layout_of_a_tied_parameter_is_that_of_the_first_task():
    for first in (torch.channels_last, torch.contiguous_format):
        models = nn.ModuleDict({"a_x": PicoNet().to(memory_format=first), "b_x": PicoNet(), "c_x": PicoNet()})
        strides = models["a_x"].conv2.weight.stride()
        models["b_x"].to(memory_format=torch.channels_last)
        tie(models, find_groups(models))
        assert models["c_x"].conv2.weight is models["a_x"].conv2.weight
        assert models["c_x"].conv2.weight.stride() == strides


def test_parameters_of_the_container_stand_once_and_memory_counts_them_once(models):
    before, groups = distinct_bytes(models), find_groups(models)
    tie(models, groups)
    parameters = list(models.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    memory = Memory(before, distinct_bytes(models), saved_bytes(groups))
    assert memory.saved_bytes == saved_bytes(groups) > 0 and memory.saved_of_optimal == 1.0
    assert sum(t.nbytes for t in distinct_tensors(models)) == memory.merged_bytes


def test_ties_survive_a_move(models):
    groups = find_groups(models)
    tie(models, groups)
    models.to(torch.float64)
    for model in models.values():
        model.to(torch.float32)  # each by itself
    assert all(is_tied(models, group) for group in groups)


def test_untie_gives_a_copy(models):
    groups = find_groups(models)
    tie(models, groups)
    untie(models, Occurrence("b_x", "conv1"))
    assert models["b_x"].conv1.weight is not models["a_x"].conv1.weight
    assert torch.equal(models["b_x"].conv1.weight, models["a_x"].conv1.weight)
    assert models["a_x"].conv1.weight is models["c_x"].conv1.weight


def test_a_parameter_used_twice_in_a_model_moves_as_one():
    def twin():
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    models = nn.ModuleDict({"a_x": twin(), "b_x": twin()})
    tie(models, find_groups(models))
    assert len(list(models.parameters())) == 1
    assert models["a_x"][0].weight is models["b_x"][1].weight


def test_recurrent_layers_use_the_tied_parameters():
    models = nn.ModuleDict({"a_x": nn.Sequential(nn.LSTM(4, 4)), "b_x": nn.Sequential(nn.LSTM(4, 4))})
    tie(models, find_groups(models), "first")
    inputs = torch.rand(2, 1, 4)
    assert torch.equal(models["a_x"](inputs)[0], models["b_x"](inputs)[0])


def test_undo_is_exact(models):
    """A round that is undone leaves weights, buffers, ties, flags and modes bit for bit as they were."""
    groups = find_groups(models)
    tie(models, groups[1:2])
    for private_or_tied in (models["b_x"].bn1, models["b_x"].fc):
        private_or_tied.weight.requires_grad_(False)
    models["a_x"].bn1.eval()
    values, objects = state_of(models), [id(p) for p in models.parameters()]
    snapshot = take_snapshot(models)

    tie(models, groups)
    models.train().requires_grad_(True)
    optimizer = torch.optim.Adam(models.parameters(), 0.1)
    models["a_x"](torch.rand(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(models["a_x"].bn1.running_mean, values["a_x.bn1.running_mean"])

    restore_snapshot(snapshot)
    assert all(torch.equal(values[key], value) for key, value in models.state_dict().items())
    assert [id(p) for p in models.parameters()] == objects
    assert is_tied(models, groups[1]) and not is_tied(models, groups[0])
    assert not models["b_x"].fc.weight.requires_grad and models["a_x"].fc.weight.requires_grad
    assert not models["b_x"].bn1.weight.requires_grad
    assert not models["a_x"].bn1.training and models["a_x"].conv1.weight.grad is None


def test_detectors_and_a_classifier_over_one_backbone_share_it_and_sum_their_gradients():
    torch.manual_seed(0)
    size = {"min_size": 64, "max_size": 64, "weights_backbone": None}
    models = nn.ModuleDict(
        {
            "a_frcnn": build("fasterrcnn_resnet50_fpn", 3, **size),
            "b_retina": build("retinanet_resnet50_fpn", 3, **size),
            "c_resnet50": build("resnet50", 5),
        }
    )
    for other, share in (("b_retina", 0.371), ("c_resnet50", 0.361)):
        pair = nn.ModuleDict({name: models[name] for name in ("a_frcnn", other)})
        assert saved_bytes(find_groups(pair)) / distinct_bytes(pair) == pytest.approx(share, abs=1e-3)
    tie(models, find_groups(models))
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in images]

    def backward(name):
        torch.manual_seed(1)  # which proposals are sampled
        if name == "c_resnet50":
            nn.functional.cross_entropy(models[name](torch.stack(images)), torch.tensor([0, 1])).backward()
        else:
            sum(models[name](images, targets).values()).backward()

    separate: dict[str, torch.Tensor] = {}
    for name in models:
        models.zero_grad()
        backward(name)
        for key, parameter in models.named_parameters():
            if parameter.grad is not None:
                separate[key] = separate.get(key, 0) + parameter.grad.double()
    models.zero_grad()
    for name in models:
        backward(name)
    for key, parameter in models.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - separate[key]).abs().max() <= 1e-6 * separate[key].abs().max(), key
    torch.optim.SGD(models.parameters(), 1e-4).step()
    models.eval()
    with torch.inference_mode():
        assert len(models["a_frcnn"](images)) == len(models["b_retina"](images)) == 2


def test_a_tied_parameter_keeps_its_layout_in_memory(models):
    models.to(memory_format=torch.channels_last)
    groups = find_groups(models)
    tie(models, groups)
    untie(models, groups[0].occurrences[0])
    for model in models.values():
        assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_layers_that_came_frozen_stay_frozen():
    """A shared layer is frozen if any of its tasks has frozen it; the other layers are trained."""
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet(), "c_x": PicoNet()})
    models["a_x"].conv1.requires_grad_(False)
    given = {name: frozen_parameters(model) for name, model in models.items()}
    assert given == {"a_x": ["conv1.weight", "conv1.bias"], "b_x": [], "c_x": []}
    unmerged, groups = copy.deepcopy(models), find_groups(models)
    tie(models, groups)
    freeze(models, given)
    assert {name for name, p in models["b_x"].named_parameters() if not p.requires_grad} == set(given["a_x"])
    only = restrict(groups, ["b_x", "c_x"])
    retie(models, groups, only, unmerged)
    freeze(models, given)
    assert frozen_parameters(models["a_x"]) == given["a_x"]
    assert frozen_parameters(models["b_x"]) == frozen_parameters(models["c_x"]) == []
