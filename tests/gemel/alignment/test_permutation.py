"""Every family of torchvision's classifiers in miniature by default, every classifier itself with `-m slow`."""

import copy

import pytest
import torch
import torchvision
from pico import PicoDetector, PicoNet
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from gemel.alignment.permutation import ChannelSpaces, find_channel_spaces, inverse, permute
from gemel.fitting.batch_norm import reestimate_statistics

TOLERANCE = 1e-9
CLASSIFIERS = models.list_models(module=models)
INPUT_SIZES = {"vit": 224, "maxvit": 224, "inception": 96}  # of the others 64
MINIATURES = {
    "resnet": lambda: models.ResNet(models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=5),
    "resnext": lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 5, groups=4, width_per_group=4),
    "squeezenet": lambda: models.squeezenet1_1(num_classes=5),
    "densenet": lambda: models.DenseNet(8, (2, 3), 16, num_classes=5),
    "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=5, width_mult=0.25),
    "mobilenet_v3": lambda: models.mobilenet_v3_small(num_classes=5, width_mult=0.5),
    "mnasnet": lambda: models.MNASNet(0.25, num_classes=5),
    "shufflenet": lambda: models.shufflenet_v2_x0_5(num_classes=5),
    "efficientnet": lambda: models.efficientnet_b0(num_classes=5),
    "regnet": lambda: models.regnet_y_400mf(num_classes=5),
    "convnext": lambda: models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], num_classes=5),
    "swin": lambda: models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5),
    "swin_v2": lambda: models.SwinTransformer(
        *([4, 4], 16, [1, 1], [2, 2], [4, 4]),
        num_classes=5,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2,
    ),
    "vit": lambda: models.VisionTransformer(64, 16, 2, 2, 16, 32, num_classes=5),
    "maxvit": lambda: models.MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 8, 0.2, num_classes=5),
    "vgg": lambda: small_vgg(),
}


def small_vgg() -> nn.Module:
    with torch.device("meta"):  # its own classifier holds 100 million weights
        model = models.VGG(nn.Sequential(), init_weights=False)
    model.features = models.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True)
    model.classifier = nn.Sequential(nn.Linear(16 * 7 * 7, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5))
    return model


def build(name: str) -> nn.Module:
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=5, **quick)


@torch.no_grad()
def unlike_new(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Random scales and biases, and matching statistics, so that a channel that is not permuted changes the output.

    The statistics are measured, not drawn: in 200 layers, drawn ones let the signal die, or grow until rounding shows.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
        elif not parameter.any() or parameter.ndim == 3:  # heads that start at zero, scales of residual branches
            parameter.normal_(0, 0.3, generator=generator)
    reestimate_statistics(model, [(images, None)], images.device)
    return model.eval().double()  # so that a difference is no rounding


def shuffle(model: nn.Module, found: ChannelSpaces) -> None:
    generator = torch.Generator().manual_seed(1)
    for space in found.spaces:
        permute(model, space, torch.randperm(space.size, generator=generator).tolist())


@torch.no_grad()
def change(model: nn.Module, images: torch.Tensor) -> float:
    """How far the output moves, relative to its scale, when every space is permuted at random."""
    model, images = model.double(), images.double()
    found = find_channel_spaces(model, images)
    assert found.spaces
    before = model(images)
    shuffle(model, found)
    after = model(images)
    scale = before.abs().max()
    assert scale > 1e-3 and (before - before[0]).abs().max() > 1e-3 * scale, "an output that could not show a change"
    return float((before - after).abs().max() / scale)


@pytest.mark.parametrize("family", MINIATURES)
def test_permuting_every_space_of_a_family_changes_nothing(family):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    assert change(unlike_new(MINIATURES[family](), images), images) < TOLERANCE


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_permuting_every_space_of_a_classifier_changes_nothing(name):
    torch.manual_seed(0)
    size = INPUT_SIZES.get(name.split("_")[0], 64)
    images = torch.randn(4, 3, size, size)
    assert change(unlike_new(build(name), images), images) < TOLERANCE


def test_leaving_out_a_member_changes_the_output():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    model = unlike_new(PicoNet(), images)
    images = images.double()
    before = model(images)
    found = find_channel_spaces(model)
    assert len(found.spaces) == 2
    for space in found.spaces:
        for i in range(len(space.members)):
            broken = copy.deepcopy(model)
            less = space.members[:i] + space.members[i + 1 :]
            permute(broken, type(space)(space.name, space.size, less), [*range(1, space.size), 0])
            assert (broken(images) - before).abs().max() > 1e-4 * before.abs().max(), space.members[i]


def test_residual_streams_are_one_space_each():
    found = find_channel_spaces(models.resnet18(num_classes=5))
    assert len(found.spaces) == 12  # the stem and stage 1 together, three further stages, eight blocks inside
    assert found.unaligned == (("fc", "output"),)
    stream = next(space for space in found.spaces if space.name == "conv1")
    assert {member.key.split(".")[0] for member in stream.members} == {"conv1", "bn1", "layer1", "layer2"}
    fc = [m for space in found.spaces for m in space.members if m.key == "fc.weight"]
    assert [(m.axis, m.offset, m.inner) for m in fc] == [(1, 0, 1)]


def test_what_is_left_unaligned_says_why():
    grouped = dict(find_channel_spaces(MINIATURES["resnext"]()).unaligned)
    assert grouped["layer1.0.conv2"] == "grouped convolution" and "layer1.0.conv3" not in grouped
    assert "MultiheadAttention" in dict(find_channel_spaces(MINIATURES["vit"]()).unaligned)["conv_proj"]


class Net(nn.Module):
    """A body given as a function of the module."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.body(self, x)


def add_both(parts):
    return parts[0] + parts[1]


def conv(num_in: int, num_out: int, **more) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, 3, padding=1, **more)


NETS = {
    "positions after a flatten": Net(
        lambda m, x: m.b(torch.flatten(F.relu(m.a(x)), 1)), a=conv(3, 4), b=nn.Linear(1024, 5)
    ),
    "view": Net(lambda m, x: m.b(m.a(x).view(x.size(0), -1)), a=conv(3, 4), b=nn.Linear(1024, 5)),
    "positions before channels": Net(
        lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 2).permute(0, 2, 3, 1).flatten(1)),
        a=conv(3, 4),
        b=nn.Linear(16, 5),
    ),
    "concatenated, one twice": Net(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x), m.a(x).sigmoid()], 1)), a=conv(3, 4), b=conv(3, 6), c=conv(14, 5)
    ),
    "split where it was concatenated": Net(
        lambda m, x: m.c(add_both(torch.cat([m.a(x), m.b(x)], 1).split([4, 4], 1))),
        a=conv(3, 4),
        b=conv(3, 4),
        c=conv(4, 5),
    ),
    "depthwise, two for one": Net(
        lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 8, groups=4), c=nn.ConvTranspose2d(8, 5, 2)
    ),
    "one space on both axes": Net(lambda m, x: m.c(m.b(m.a(x)) + m.a(x)), a=conv(3, 4), b=conv(4, 4), c=conv(4, 5)),
    "instance-like group norm": Net(
        lambda m, x: m.c(m.n(m.a(x)) * m.a(x).mean((2, 3), keepdim=True)),
        a=conv(3, 4),
        n=nn.GroupNorm(4, 4),
        c=conv(4, 5),
    ),
    "functional": Net(lambda m, x: m.c(F.conv2d(x, m.a.weight, m.a.bias)), a=conv(3, 4), c=conv(4, 5)),
    "frozen statistics": Net(
        lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 4), n=torchvision.ops.FrozenBatchNorm2d(4), c=conv(4, 5)
    ),
    "scale": Net(
        lambda m, x: m.c(m.a(x) * m.s[:, None, None]), a=conv(3, 4), s=nn.Parameter(torch.rand(4)), c=conv(4, 5)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_permuting_every_space_of_a_users_network_changes_nothing(name):
    torch.manual_seed(0)
    assert change(NETS[name].eval(), torch.randn(2, 3, 16, 16)) < TOLERANCE


REFUSED = {
    "group normalisation": Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 4), n=nn.GroupNorm(2, 4), c=conv(4, 5)),
    "pixel_shuffle": Net(lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 4), c=conv(1, 5)),
    "takes some of the channels": Net(lambda m, x: m.c(m.a(x)[:, :2]), a=conv(3, 4), c=conv(2, 5)),
    "different layouts": Net(
        lambda m, x: m.c(m.a(x) + torch.cat([m.b(x), m.b(x)], 1)), a=conv(3, 4), b=conv(3, 2), c=conv(4, 5)
    ),
    "splits the axis": Net(lambda m, x: m.c(m.a(x).view(2, 2, 2, 256).mean(2)), a=conv(3, 4), c=nn.Linear(256, 5)),
    "hooks": Net(lambda m, x: m.c(m.a(x)), a=nn.utils.parametrizations.weight_norm(conv(3, 4)), c=conv(4, 5)),
    "cumsum": Net(lambda m, x: m.c(m.a(x).cumsum(1)), a=conv(3, 4), c=conv(4, 5)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_rule_is_fixed_with_a_reason(reason):
    found = find_channel_spaces(REFUSED[reason], torch.empty(2, 3, 16, 16))
    assert not found.spaces
    assert any(reason in why for _, why in found.unaligned), found


def test_a_parameter_used_twice_stays_consistent():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.c(m.b(F.relu(m.b(F.relu(m.a(x)))))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 5)).eval()
    assert change(net, torch.randn(2, 3, 16, 16)) < TOLERANCE
    for share in (lambda one, other: one, lambda one, other: nn.Parameter(one.detach())):  # one object; one storage
        tied = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 4)).eval()
        tied.c.weight = share(tied.b.weight, tied.c.weight)
        before = tied(images := torch.randn(2, 3, 16, 16))
        shuffle(tied, find_channel_spaces(tied))
        assert torch.allclose(tied(images), before, atol=1e-5)


def test_what_only_runs_in_train_mode_is_analysed_too():
    def body(m, x):
        x = m.a(x)
        return (m.c(x), m.aux(x)) if m.training else m.c(x)

    torch.manual_seed(0)
    net = Net(body, a=conv(3, 4), c=conv(4, 5), aux=conv(4, 2))
    images = torch.randn(2, 3, 16, 16)
    before = net.train()(images)
    (space,) = find_channel_spaces(net).spaces
    assert net.training and {m.key for m in space.members} == {"a.weight", "a.bias", "c.weight", "aux.weight"}
    shuffle(net, find_channel_spaces(net))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, net(images), strict=True))


def test_a_detector_is_analysed_part_by_part():
    torch.manual_seed(0)
    detector = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    images = torch.randn(1, 3, 96, 96)
    unlike_new(detector.backbone, images.expand(2, -1, -1, -1))
    detector.double().eval()
    images = images.double()

    @torch.no_grad()
    def outputs():
        features = list(detector.backbone(images).values())
        return [*features, *detector.head(features).values()]

    before, found = outputs(), find_channel_spaces(detector)
    shuffle(detector, found)
    assert len(found.spaces) > 30
    for one, other in zip(before, outputs(), strict=True):
        assert (one - other).abs().max() < TOLERANCE * one.abs().max()


def test_code_that_cannot_be_traced_is_fixed():
    found = find_channel_spaces(PicoDetector())
    assert not found.spaces and {name for name, _ in found.unaligned} >= {"conv1", "conv2", "scores"}
    wrapped = Net(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x), a=nn.Sequential(conv(3, 4), conv(4, 5)), b=conv(3, 5))
    wrapped.b.weight = wrapped.a[0].weight  # also used by code that cannot be traced
    wrapped.b.out_channels = 4
    assert not find_channel_spaces(wrapped).spaces


def test_permuting_is_exact_and_keeps_objects():
    model = PicoNet().eval()
    before = {key: (p, p.detach().clone()) for key, p in model.named_parameters()}
    space = find_channel_spaces(model).spaces[0]
    order = torch.randperm(space.size, generator=torch.Generator().manual_seed(0)).tolist()
    permute(model, space, order)
    assert torch.equal(model.conv1.weight, before["conv1.weight"][1][order])
    permute(model, space, inverse(order))
    for key, parameter in model.named_parameters():
        assert parameter is before[key][0] and torch.equal(parameter, before[key][1])
    with pytest.raises(ValueError, match="permutation"):
        permute(model, space, [0] * space.size)


class CountingNorm(nn.BatchNorm2d):
    """A normalisation that is traced, as it is not torch's own, and counts the passes in train mode."""

    def forward(self, images):
        if self.training:
            self.num_batches_tracked.add_(1)
            self.passes = self.passes + 1
        return F.batch_norm(images, self.running_mean, self.running_var, self.weight, self.bias, self.training)


def test_looking_for_channels_changes_no_buffer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CountingNorm(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[1].register_buffer("passes", torch.tensor(7))
    before = copy.deepcopy(model.state_dict())
    assert find_channel_spaces(model, torch.zeros(2, 3, 8, 8)).spaces
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), MemoryError()], ids=["torch", "python"])
@pytest.mark.parametrize("place", ["torch.Tensor.clone", "torch.nn.functional.relu"], ids=["traced", "interpreted"])
def test_memory_that_runs_out_is_not_taken_for_code_that_cannot_be_traced(error, place, monkeypatch):
    def exhausted(*args, **kwargs):
        raise error

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    monkeypatch.setattr(place, exhausted)
    with pytest.raises(type(error)):
        find_channel_spaces(model)
