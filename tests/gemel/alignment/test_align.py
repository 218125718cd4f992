import copy

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn
from torch.nn import functional as F

from gemel.alignment import align as align_module
from gemel.alignment.activations import INPUT, OUTPUT, Moments, adapt_images, compare, record_activations
from gemel.alignment.align import METHODS, align, are_alike, best_order
from gemel.alignment.permutation import find_channel_spaces, permute
from gemel.sharing.groups import Group, Occurrence, find_groups
from gemel.sharing.tying import tie

SEED = 3
BATCH = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5


class Detector(nn.Module):
    """A traceable backbone with a space inside, in code that cannot be traced."""

    def __init__(self, width: int = 8, reads_its_child: bool = False):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.reads_its_child = reads_its_child

    def forward(self, images, targets=None):
        features = self.backbone(torch.stack(list(images)))
        if self.reads_its_child:
            features = features + self.backbone[0].bias[:, None, None]
        return [{"boxes": f[:4, 0].T, "scores": f.mean((1, 2)), "labels": f[0, 0]} for f in features]


def net(seed: int, **more) -> nn.Module:
    torch.manual_seed(seed)
    return PicoNet(**more).eval()


def shuffled(model: nn.Module, seed: int = 1) -> nn.Module:
    """The same function with its channels in another order."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for space in find_channel_spaces(other).spaces:
        permute(other, space, torch.randperm(space.size, generator=generator).tolist())
    return other


def images_of(models) -> dict:
    return {task: [BATCH] for task in models}


def unlike(one: nn.Module, other: nn.Module) -> float:
    return max(
        float((a - b).abs().max()) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_shuffled_channels_is_found(method):
    first = net(0)
    second = shuffled(first)
    assert unlike(first, second) > 0.1
    models = {"a_x": first, "b_x": second}
    done = align(models, find_groups(models), images_of(models), method=method, seed=SEED)
    assert unlike(first, second) < 1e-6
    assert done.order == ("a_x", "b_x") and done.unaligned == (("b_x", "fc", "output"),)
    assert {space.space for space in done.spaces} == {"conv1", "conv2"}
    assert all(space.after > 0.99 > space.before and space.num_moved > 1 for space in done.spaces)


@pytest.mark.parametrize("like", [0.5, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_models_of_one_ancestor_stay_as_they_are(method, like, monkeypatch):
    """As their weights show at once; and an order that is looked for nevertheless is the one that they have."""
    monkeypatch.setattr(align_module, "LIKE", like)
    first, second = net(0), net(0)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    before = copy.deepcopy(second)
    models = {"a_x": first, "b_x": second}
    done = align(models, find_groups(models), images_of(models), method=method, seed=SEED)
    assert are_alike(models, find_groups(models)) == (not done.spaces) == (like < 1)
    assert unlike(before, second) == 0 and all(space.num_moved == 0 for space in done.spaces)
    assert all(space.before == pytest.approx(space.after) for space in done.spaces)


def test_models_of_one_ancestor_need_no_images_to_be_compared(monkeypatch):
    """Measured: by correlation alone, fine-tuned models of one ancestor are reordered, and are worse when tied."""
    models = {"a_x": net(0), "b_x": net(0)}
    monkeypatch.setattr(align_module, "compare", None)
    monkeypatch.setattr(align_module, "LIKE", 2.0)
    spaces = align(models, find_groups(models), images_of(models), seed=SEED).spaces
    assert spaces and not any(space.num_moved for space in spaces)


@pytest.mark.parametrize("method", METHODS)
def test_models_trained_apart_compute_the_same_and_become_more_similar(method):
    models = {"a_x": net(1), "b_x": net(2, num_classes=4), "c_x": net(3, extra=2)}
    originals = {task: copy.deepcopy(model) for task, model in models.items()}
    parameters = {task: list(map(id, model.parameters())) for task, model in models.items()}
    done = align(models, find_groups(models), images_of(models), method=method, seed=SEED)
    assert done.order == ("c_x", "b_x", "a_x")  # the largest is first
    assert unlike(models["c_x"], originals["c_x"]) == 0
    for task, model in models.items():
        assert torch.allclose(model(BATCH), originals[task](BATCH), atol=1e-5)
        assert parameters[task] == list(map(id, model.parameters()))
    assert {space.task for space in done.spaces} == {"a_x", "b_x"}
    assert all(space.after >= space.before for space in done.spaces) and any(s.num_moved for s in done.spaces)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_order_of_channels(method):
    results = []
    for _ in range(2):
        models = {"a_x": net(1, width=12), "b_x": net(2, width=12)}
        results.append(align(models, find_groups(models), images_of(models), method=method, seed=SEED))
    assert results[0] == results[1]


def test_only_spaces_of_layers_to_be_tied_move():
    models = {"a_x": net(0, extra=1), "b_x": shuffled(net(0, extra=1))}
    groups = [g for g in find_groups(models) if g.occurrences[0].layer == "conv1"]
    before = copy.deepcopy(models["b_x"])
    done = align(models, groups, images_of(models), seed=SEED)
    assert [space.space for space in done.spaces] == ["conv1"]
    assert torch.equal(before.fc.weight, models["b_x"].fc.weight)
    assert torch.allclose(models["a_x"].conv1.weight, models["b_x"].conv1.weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_detector_is_aligned_to_a_classifier_on_the_images_of_both(method):
    detector, classifier = Detector(), net(0, extra=4)
    with torch.no_grad():
        detector.backbone[0].weight.copy_(classifier.conv1.weight.flip(0))
        detector.backbone[0].bias.copy_(classifier.conv1.bias.flip(0))
    group = Group("conv", 4, (Occurrence("a_x", "conv1"), Occurrence("b_x", "backbone.0")))
    images = {"a_x": [BATCH[:, :, :12]], "b_x": [[*BATCH[:9]], [*BATCH[9:18]]]}
    before = detector.eval()(images["b_x"][0])
    done = align({"a_x": classifier, "b_x": detector}, (group,), images, method=method, seed=SEED)
    assert [space.permutation for space in done.spaces] == [tuple(reversed(range(8)))]
    for one, other in zip(before, detector(images["b_x"][0]), strict=True):
        assert torch.allclose(one["scores"], other["scores"], atol=1e-5)


def test_permutations_that_change_a_models_output_are_undone(caplog):
    models = {"a_x": net(0, extra=4), "b_x": Detector(reads_its_child=True).eval()}
    group = Group("conv", 4, (Occurrence("a_x", "conv1"), Occurrence("b_x", "backbone.0")))
    before = copy.deepcopy(models["b_x"])
    done = align(models, (group,), {"a_x": [BATCH], "b_x": [[*BATCH]]}, method="weights", seed=SEED)
    assert unlike(before, models["b_x"]) == 0 and not done.spaces
    assert "undone" in caplog.text and "output changed" in done.unaligned[-1][-1]


def test_a_layer_that_cannot_be_aligned_is_listed():
    models = {"a_x": PicoDetector(), "b_x": PicoDetector()}
    images = {task: [[*BATCH]] for task in models}
    done = align(models, find_groups(models), images, seed=SEED)
    assert not done.spaces and {layer for _, layer, _ in done.unaligned} >= {"conv1", "conv2"}


def test_wrong_input_is_named_all_at_once():
    models = {"a_x": net(0), "b_x": net(1)}
    groups = find_groups(models)
    with pytest.raises(ValueError, match="method: got 'magic'"):
        align(models, groups, method="magic")
    with pytest.raises(ValueError, match="a_x: images.*\n.*b_x: images"):
        align(models, groups)
    with pytest.raises(ValueError, match="b_x: in a group, but no model"):
        align({"a_x": models["a_x"]}, groups, method="weights")
    tie(nn.ModuleDict(models), groups)
    with pytest.raises(ValueError, match="b_x: holds parameters of a_x"):
        align(models, groups, method="weights")


def test_the_best_order_needs_to_gain_enough():
    scores = torch.tensor([[0.90, 0.92], [0.92, 0.90]])
    assert best_order(scores) == [0, 1]
    assert best_order(torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.1, 0.9], [0.9, 0.0, 0.1]])) == [1, 2, 0]


# ---- activations -------------------------------------------------------------------------------------------


def test_correlation_is_that_of_torch():
    x, y = torch.randn(3, 40), torch.randn(4, 40)
    y[0] = 2.0  # a constant channel
    moments = Moments()
    moments.add(x[:, :15], y[:, :15])
    moments.add(x[:, 15:], y[:, 15:])
    expected = torch.corrcoef(torch.cat([x, y[1:]]))[:3, 3:]
    assert torch.allclose(moments.correlation()[:, 1:], expected, atol=1e-5)
    assert torch.equal(moments.correlation()[:, 0], torch.zeros(3))


def test_images_are_adapted_to_those_of_the_task():
    plain = [torch.rand(3, 1, 1).expand(3, 10, 8) for _ in range(20)]  # of one colour each, which resizing keeps
    normalised = torch.randn(5, 3, 16, 16) * 2 + 1
    adapted = adapt_images(plain, normalised)
    assert adapted.shape == (20, 3, 16, 16)
    for found, wanted in zip(adapted.movedim(1, 0), normalised.movedim(1, 0), strict=True):
        assert float(found.mean()) == pytest.approx(float(wanted.mean()), abs=1e-3)
        assert float(found.std()) == pytest.approx(float(wanted.std()), rel=1e-2)
    back = adapt_images(normalised, plain)
    assert isinstance(back, list) and back[0].shape == (3, 16, 16)
    same = adapt_images(normalised, torch.randn(2, 3, 16, 16))
    assert torch.equal(same, normalised)


def test_activations_are_recorded_in_eval_mode_and_modes_and_hooks_restored():
    model = net(0).train()
    before = copy.deepcopy(model.state_dict())
    found = record_activations(model, ["conv2", "fc"], BATCH)
    assert model.training and not model.conv2._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert found["conv2", INPUT][0].shape == (8, 24, 16, 16) and found["fc", OUTPUT][0].shape == (3, 24, 1, 1)
    expected = F.relu(model.eval().bn1(model.conv1(BATCH))).movedim(1, 0)
    assert torch.allclose(found["conv2", INPUT][0], expected)


def test_maps_of_different_size_are_compared_at_the_same_positions():
    models = (net(0), net(0))
    large = F.interpolate(BATCH, size=32, mode="bilinear")
    moments = compare(models, [("conv2", "conv2")], ([BATCH], [large]), [OUTPUT])
    (correlation,) = (m.correlation() for m in moments.values())
    assert correlation.diagonal().mean() > 0.7 and correlation.argmax(1).tolist() == list(range(8))
