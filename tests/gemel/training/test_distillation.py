"""The losses against the unmerged model: what is compared, and that hooks leave no trace."""

import copy

import pytest
import torch
from pico import PicoDetector, PicoNet
from torch import nn

from gemel.sharing.groups import compared_layers, find_groups
from gemel.training.distillation import Teacher, feature_loss


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def losses_of(model: nn.Module, teacher: nn.Module, images, layers=("conv1", "conv2", "fc")) -> dict:
    with_hooks = Teacher(model, teacher.eval(), layers)
    losses = with_hooks.losses(images, model(images))
    with_hooks.close()
    return losses


def test_a_model_equal_to_its_teacher_has_no_loss(images):
    model = PicoNet().eval()
    losses = losses_of(model, copy.deepcopy(model), images)
    assert set(losses) == {"features", "probabilities"}
    assert all(loss.item() == pytest.approx(0.0, abs=1e-6) for loss in losses.values())


def test_losses_are_what_they_say(images):
    torch.manual_seed(0)
    model, teacher = PicoNet().eval(), PicoNet().eval()
    losses = losses_of(model, teacher, images, layers=("conv1",))
    ours, theirs = model.conv1(images), teacher.conv1(images)
    assert losses["features"].item() == pytest.approx(((ours - theirs).square().mean() / theirs.var()).item(), rel=1e-3)
    divergence = (teacher(images).softmax(1) * (teacher(images).log_softmax(1) - model(images).log_softmax(1))).sum(1)
    assert losses["probabilities"].item() == pytest.approx(divergence.mean().item(), rel=1e-4)
    losses["features"].backward()
    assert model.conv1.weight.grad.abs().sum() > 0 and teacher.conv1.weight.grad is None


def test_a_detector_is_taught_by_features_alone_and_its_pass_ends_early(images):
    torch.manual_seed(0)
    model, teacher = PicoDetector().train(), PicoDetector().eval()
    both = Teacher(model, teacher, ("conv1", "conv2"))
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]
    called = []
    teacher.scores.register_forward_hook(lambda *a: called.append(1))
    for _ in range(3):
        losses = both.losses(list(images), model(list(images), targets))
    assert set(losses) == {"features"} and losses["features"] > 0
    assert len(called) == 1, "after the first pass it is known that nothing behind conv2 is needed"


def test_the_end_of_a_pass_is_no_error_that_a_model_can_catch(images):
    caught = []

    class Catching(PicoDetector):
        def forward(self, images, targets=None):
            try:
                return super().forward(images, targets)
            except Exception as error:
                caught.append(error)
                return []

    model, teacher = PicoDetector().train(), Catching().eval()
    both = Teacher(model, teacher, ("conv1", "conv2"))
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]
    for _ in range(3):
        both.losses(list(images), model(list(images), targets))
    assert both.taught.max_calls == 2 and not caught


def test_other_passes_leave_no_trace(images):
    """Passes that re-estimate statistics or evaluate, of the model or of a copy of it, are not compared."""
    model, teacher = PicoNet().eval(), PicoNet().eval()
    expected = losses_of(model, teacher, images)
    both = Teacher(model, teacher, ("conv1", "conv2", "fc"))
    model(images[:2])
    output = model(images)
    copy.deepcopy(model)(images[:1])
    losses = both.losses(images, output)
    both.close()
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    assert not model.conv1._forward_hooks and not model._forward_pre_hooks and not both.own.outputs


def test_outputs_of_other_shape_are_left_out():
    same, other = torch.rand(2, 3), torch.rand(4, 3)
    assert feature_loss({"a": [same], "b": [same]}, {"a": [same], "b": [other]}).item() == 0.0
    assert feature_loss({"b": [same]}, {"b": [other]}).item() == 0.0


def test_compared_are_tied_layers_over_the_depth_and_the_last():
    models = {"a_x": PicoNet(3, extra=20), "b_x": PicoNet(4, extra=20)}
    layers = compared_layers(models["a_x"], "a_x", find_groups(models))
    assert len(layers) == 9 and layers[0] == "conv1" and layers[-2:] == ["more.19", "fc"]
    assert compared_layers(models["a_x"], "a_x", ()) == ["fc"]


def test_the_teacher_of_a_detector_without_labels_runs_once_a_batch(images):
    """Its detections are the targets, and what it computed for them is what features are compared with."""
    torch.manual_seed(3)
    model, unmerged, passes = PicoDetector(), PicoDetector().eval(), []
    unmerged.register_forward_pre_hook(lambda *_: passes.append(1))
    targets = [{"boxes": torch.tensor([[0.0, 0.0, 8.0, 16.0]]), "labels": torch.tensor([1])}] * len(images)
    teacher = Teacher(model, unmerged, ["conv1", "conv2"])
    expected = teacher.losses(list(images), model(list(images), targets))
    assert len(passes) == 1
    for _ in range(2):
        passes.clear()
        teacher.detections(list(images))
        found = teacher.losses(list(images), model(list(images), targets))
        assert len(passes) == 1 and found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    teacher.close()
