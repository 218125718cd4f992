import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from gemel.fitting.batch_norm import channel_moments, match_statistics, reestimate_statistics

CPU = torch.device("cpu")


def network(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 6, 3), norm(6), nn.Dropout(0.5))
    for layer in (model[1], model[4]):
        layer.weight.data.uniform_(-1, 1)
        layer.bias.data.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    return model.eval()


@torch.no_grad()
def moments(model, images):
    outputs = []
    hooks = [
        model[i].register_forward_hook(lambda m, x, y: outputs.append(torch.var_mean(y, (0, 2, 3), correction=0)))
        for i in (1, 4)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_outputs_of_matched_layers_have_the_teachers_moments(norm):
    teacher, images = network(norm), torch.rand(16, 3, 12, 12)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model[0].weight.mul_(0.2).add_(0.1 * torch.rand(6, 3, 3, 3))
        model[3].weight.mul_(3).add_(0.1 * torch.rand(6, 6, 3, 3))
    wanted = moments(teacher, images)
    far = max(
        float((a - b).abs().max())
        for x, y in zip(wanted, moments(model, images), strict=True)
        for a, b in zip(x, y, strict=True)
    )
    match_statistics(model, teacher, [(images, None)], CPU)
    for x, y in zip(wanted, moments(model, images), strict=True):
        assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(x, y, strict=True))
    assert far > 0.1 and not model[5].training
    assert torch.equal(model[1].weight.sign(), teacher[1].weight.sign())


def test_matching_a_model_to_itself_changes_little():
    teacher, images = network(FrozenBatchNorm2d), torch.rand(16, 3, 12, 12)
    model = copy.deepcopy(teacher)
    match_statistics(model, teacher, [(images[:8], None), (images[8:], None)], CPU)
    assert (model(images) - teacher(images)).abs().max() < 0.15


def test_reestimated_statistics_are_averages_over_batches():
    model, images = network(nn.BatchNorm2d), torch.rand(16, 3, 12, 12)
    model[1].train()
    with torch.no_grad():
        features = model[0](images)
    reestimate_statistics(model, [[images[:8], None], [images[8:], None]], CPU)
    assert torch.allclose(model[1].running_mean, features.mean((0, 2, 3)), atol=1e-6)
    assert model[1].momentum == 0.1 and model[1].training and not model[4].training
    before = model[1].running_mean.clone()
    reestimate_statistics(model, [], CPU)
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(6, 5, 7, 4), (2, 3, 1, 1), (1, 3, 1, 1)])
def test_moments_are_those_of_each_channel_in_any_layout(layout, shape):
    values = 50 + 3 * torch.randn(shape)
    values[:, 1] = 7.0  # a channel that is dead
    found = channel_moments(values.to(memory_format=layout))
    var, mean = torch.var_mean(values.double(), (0, 2, 3), correction=0)
    assert found.num_values == values[:, 0].numel()
    assert torch.allclose(found.mean.double(), mean) and torch.allclose(found.var.double(), var, atol=1e-4)
    assert found.var[1] < 1e-6
