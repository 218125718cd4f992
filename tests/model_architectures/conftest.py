"""Pretrained weights without downloads."""

import pytest
import torchvision
from architecture_samples import small_vgg_init
from torchvision.models import WeightsEnum

DETECTORS = torchvision.models.list_models(module=torchvision.models.detection)


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    """Fails a test in which pretrained weights are asked for that it did not provide."""
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda weights, *_, **__: pytest.fail(f"downloads {weights}"))


@pytest.fixture
def pretend(monkeypatch):
    """Replaces downloads: provide(function) returns the state dict of a random model, which torchvision then loads."""
    monkeypatch.setattr(torchvision.models.VGG, "__init__", small_vgg_init)

    def provide(function, weights="DEFAULT", **kwargs):
        member = torchvision.models.get_model_weights(function)[weights]
        kwargs |= {"weights_backbone": None} if function in DETECTORS else {}
        kwargs["num_classes"] = len(member.meta["categories"] or range(1000))
        state = torchvision.models.get_model(function, weights=None, **kwargs).state_dict()
        monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda weights, *args, **kwargs: state)
        return state

    return provide
