"""Numbers of tensors follow from how they are computed; points are where the rest needs few outputs alone."""

import copy

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn
from torch.nn import functional as F

from gemel.forward.trace import trace
from model_architectures import build

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def by_content(name: str, tensor: torch.Tensor) -> object:
    return tuple(tensor.shape), tensor.detach().double().sum().item()


def traced(model: nn.Module, images=IMAGES):
    return trace(model, images, by_content)


def numbers(model: nn.Module, images=IMAGES) -> set[str]:
    return set(traced(model, images).outputs)


@pytest.fixture
def net() -> PicoNet:
    torch.manual_seed(0)
    return PicoNet(3, extra=1).eval()


def test_copies_have_equal_numbers_and_a_changed_value_changes_all_behind_it(net):
    other = copy.deepcopy(net)
    assert numbers(net) == numbers(other)
    other.bn1.running_var[0] += 0.5
    before, after = traced(net).outputs, traced(other).outputs
    assert [names for number, names in before.items() if number in after] == [("conv1",)]


@pytest.mark.parametrize("change", ["eps", "stride", "function"])
def test_settings_and_functions_between_modules_count(net, change):
    other = copy.deepcopy(net)
    if change == "eps":
        other.bn1.eps = 1e-3
    elif change == "stride":
        other.conv2.stride = (2, 2)
    else:
        other.forward = lambda images: other.fc(other.conv2(torch.tanh(other.bn1(other.conv1(images)))).mean((2, 3)))
    common = numbers(net) & numbers(other)
    assert len(common) == {"eps": 1, "stride": 2, "function": 2}[change]


def test_layers_of_a_detector_are_those_of_a_classifier_under_other_names():
    classifier = build("slim_resnet", 3, layers=(1, 1), width=8).eval()
    detector = build("fcos_model", 4, layers=(1, 1), width=8, min_size=32, head_convs=1).eval()
    detector.backbone.body.load_state_dict(classifier.state_dict(), strict=False)
    of_detector, of_classifier = traced(detector, list(IMAGES)), traced(classifier)
    assert of_detector.entry.shape == (2, 3, 32, 32)
    deepest = [p for p in of_detector.points if set(p.needed.values()) <= set(of_classifier.outputs)][-1]
    assert deepest.last == "backbone.body.layer2" and deepest.flops > 0


def test_points_name_all_that_is_read_later():
    """The residual of a block, and the levels that a pyramid reads."""
    model = build("slim_resnet", 3, layers=(1, 1), width=8).eval()
    points = {point.last: set(point.needed) for point in traced(model).points}
    assert points["layer2.0.bn1"] == {"layer1", "layer2.0.bn1"} and points["layer2"] == {"layer2"}
    assert points["fc"] == {"fc"}


class Tricky(nn.Module):
    """conv1, and then something that makes what comes before it needed in another way."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.conv1, self.conv2 = kind, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, images):
        x = self.conv1(images)
        if self.kind == "leak":  # Python decides by values
            x = x * (1.0 if float(x.mean()) > 100 else 0.5)
        view = x[:, :4]
        if self.kind == "random":
            x = F.dropout(x, 0.5, training=True)
        y = self.conv2(x)
        if self.kind == "view":  # reads what conv1 put out, through another tensor
            return y.mean() + view.sum()
        if self.kind == "written":
            y[:, :4] += 1
            return y.mean((2, 3))
        return y.mean((2, 3))


@pytest.mark.parametrize(
    "kind, last", [("plain", "conv2"), ("leak", None), ("random", "conv2"), ("view", "conv1"), ("written", "conv1")]
)
def test_what_cannot_be_skipped_is_no_point(kind, last):
    torch.manual_seed(0)
    points = [point.last for point in traced(Tricky(kind).eval()).points]
    assert points[-1] == last if last else "conv2" not in points


def test_random_numbers_are_like_no_other():
    """Nor like those of a pass that is long gone."""
    model = Tricky("random").eval()
    passes = [numbers(model) for _ in range(20)]
    assert len(set.intersection(*passes)) == 1  # conv1
    assert len(set.union(*passes)) == 1 + len(passes)


def test_a_model_of_pico_size_is_traced_as_a_detector(net):
    assert [point.last for point in traced(PicoDetector().eval(), list(IMAGES)).points][:3] == ["conv1", "bn1", "conv2"]
