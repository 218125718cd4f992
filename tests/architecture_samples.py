"""Checks and replacements that the tests of builders share."""

import json

import torch
from torch import nn


def small_vgg_init(self, features, num_classes=1000, init_weights=True, dropout=0.5):
    """A VGG with the same layer names, without the 120 million weights of its classifier, which take seconds."""
    nn.Module.__init__(self)
    self.features = features
    self.classifier = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4, num_classes))


def fresh_layers(model, pretrained):
    """The layers without pretrained weights, because their shape differs; "changed: key" for any other difference."""
    fresh = set()
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in pretrained or tensor.shape != pretrained[key].shape:
            fresh.add(key.rpartition(".")[0])
        elif not torch.equal(tensor, pretrained[key]):
            fresh.add(f"changed: {key}")
    return fresh


def through_json(architecture):
    return json.loads(json.dumps(architecture))


def tensors_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_outputs(model, again):
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        expected, got = model.eval()(images), again.eval()(images)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert isinstance(expected, torch.Tensor) or all(len(found["boxes"]) > 0 for found in expected)
