"""Classifiers: structures that pretrained weights change, and slim_resnet."""

import pytest
import torch
from architecture_samples import assert_same_outputs, fresh_layers, through_json

from model_architectures import build, rebuild


@pytest.mark.parametrize(
    ("name", "function", "arguments", "head"),
    [
        ("googlenet", "googlenet", {}, {"fc"}),
        ("googlenet", "googlenet", {"aux_logits": True}, {"fc", "aux1.fc2", "aux2.fc2"}),
        ("inception_v3", "inception_v3", {}, {"fc", "AuxLogits.fc"}),
        ("inceptionv3", "inception_v3", {}, {"fc"}),
    ],
)
@pytest.mark.filterwarnings("ignore:auxiliary heads")
def test_inception_heads_and_input_are_rebuilt_as_the_weights_set_them(pretend, name, function, arguments, head):
    pretrained = pretend(function, init_weights=False)
    model = build(name, 5, weights="DEFAULT", **arguments)
    assert fresh_layers(model, pretrained) == head
    quick = {**model.architecture["kwargs"], "init_weights": False}
    again = rebuild(through_json({**model.architecture, "kwargs": quick}))
    again.load_state_dict(model.state_dict())
    assert again.aux_logits is model.aux_logits is (len(head) > 1)
    assert_same_outputs(model, again)
    again.transform_input = False  # what the weights had turned on, and what the line above sees
    with pytest.raises(AssertionError):
        assert_same_outputs(model, again)


def test_vgg_features_only_weights_leave_the_whole_classifier_fresh(pretend):
    pretrained = pretend("vgg16", "IMAGENET1K_FEATURES")
    for key, tensor in pretrained.items():
        if key.startswith("classifier."):
            tensor.fill_(float("nan"))  # as in the published file
    model = build("vgg16", 1000, weights="IMAGENET1K_FEATURES")
    assert all(tensor.isfinite().all() for tensor in model.parameters())
    assert torch.equal(model.features[0].weight, pretrained["features.0.weight"])


def test_weights_that_set_the_image_size_are_rebuilt_with_it(pretend):
    pretend("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", image_size=384)
    with torch.device("meta"), pytest.warns(UserWarning, match="non-meta"):
        model = build("vit_b_16", 5, weights="IMAGENET1K_SWAG_E2E_V1")
        again = rebuild(through_json(model.architecture))
    assert again.encoder.pos_embedding.shape == model.encoder.pos_embedding.shape == (1, 577, 768)


def test_slim_resnet_at_48_px():
    model = build("slim_resnet", 4)
    assert model(torch.rand(2, 3, 48, 48)).shape == (2, 4)
    assert [getattr(model, f"layer{i}")[1].conv2.out_channels for i in range(1, 5)] == [32, 64, 128, 256]
