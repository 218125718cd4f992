"""Files as training scripts write them: wrappers, prefixes, other content, and what cannot be read safely."""

import argparse
import builtins
import logging
import os
from collections import OrderedDict

import numpy as np
import pytest
import torch
from architecture_samples import tensors_equal
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from model_architectures import build, load_weights


def slim(num_classes=3):
    return build("slim_resnet", num_classes, layers=[1, 1], width=8)


def prefixed(prefix, state):
    return OrderedDict((prefix + key, value) for key, value in state.items())


def lightning(state, prefix="model."):
    return {"state_dict": prefixed(prefix, state), "epoch": 3, "hyper_parameters": {"lr": 0.1}, "callbacks": {}}


def trained():
    torch.manual_seed(5)
    return slim()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}, "loss": 0.1},
        lambda state: {"model": state, "optimizer": {}, "epoch": 3, "args": argparse.Namespace(lr=0.1, device="cuda")},
        lambda state: {"state_dict": state, "best_acc": np.float64(93.1), "hist": np.arange(3)},
        lambda state: {"net": state, "acc": 93.1},
        lambda state: {"ema": state, "epoch": 3},
        lambda state: {"weights_of_the_day": state},
        lightning,
        lambda state: lightning(state, "net."),
        lambda state: prefixed("_orig_mod.", state),
        lambda state: prefixed("module._orig_mod.", state),
        lambda state: prefixed("_orig_mod.module.", state),
    ],
)
def test_wrappers_and_prefixes_are_taken_off(tmp_path, wrap, caplog):
    source, model = trained(), slim()
    torch.save(wrap(source.state_dict()), tmp_path / "weights.ckpt")
    with caplog.at_level(logging.WARNING):
        load_weights(model, tmp_path / "weights.ckpt")
    assert tensors_equal(model.state_dict(), source.state_dict()) and caplog.text == ""


def test_safetensors_with_a_prefix(tmp_path, monkeypatch):
    source, model = trained(), slim()
    save_file(dict(prefixed("backbone.", source.state_dict())), tmp_path / "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_weights(model, "~/model.safetensors") is model
    assert tensors_equal(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "wrap, said",
    [
        (
            lambda model: {"state_dict": {**prefixed("model.", model.state_dict()), "criterion.weight": torch.ones(3)}},
            "the weights are those of 'state_dict' without 'model.'; 1 other tensors were left out: criterion.weight",
        ),
        (
            lambda model: AveragedModel(model).state_dict(),
            "the weights are those of the file without 'module.'; 1 other tensors were left out: n_averaged",
        ),
        (
            lambda model: {"0.mean": torch.zeros(3), "0.std": torch.ones(3), **prefixed("1.", model.state_dict())},
            "the weights are those of the file without '1.'; 2 other tensors were left out: 0.mean, 0.std",
        ),
    ],
)
def test_what_is_left_out_is_said(tmp_path, wrap, said, caplog):
    source, model = trained(), slim()
    torch.save(wrap(source), tmp_path / "weights.pt")
    with caplog.at_level(logging.WARNING):
        load_weights(model, tmp_path / "weights.pt")
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'weights.pt'}: {said}"]
    assert tensors_equal(model.state_dict(), source.state_dict())


def test_which_of_two_was_taken_is_said_and_can_be_chosen(tmp_path, caplog):
    source, average, model = trained(), slim(), slim()
    torch.save(
        {"model": source.state_dict(), "model_ema": prefixed("module.", average.state_dict())}, tmp_path / "w.pt"
    )
    with caplog.at_level(logging.WARNING):
        load_weights(model, tmp_path / "w.pt")
    assert tensors_equal(model.state_dict(), source.state_dict())
    said = "the weights are those of 'model'; 'model_ema' without 'module.' would fit as well (entry)"
    assert caplog.records[0].getMessage().endswith(said)
    load_weights(model, tmp_path / "w.pt", entry="model_ema")
    assert tensors_equal(model.state_dict(), average.state_dict())
    with pytest.raises(
        ValueError, match="entry: got 'best'; allowed: the key of a state dict in a dictionary of model:"
    ):
        load_weights(model, tmp_path / "w.pt", entry="best")


def test_a_part_of_a_larger_model_is_not_taken(tmp_path):
    torch.save(
        {**prefixed("a.", nn.Linear(2, 2).state_dict()), **prefixed("b.", trained().state_dict())}, tmp_path / "w"
    )
    with pytest.raises(ValueError, match="got a dictionary of a.weight: Tensor"):
        load_weights(nn.Linear(2, 2), tmp_path / "w")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "save, message",
    [
        (
            lambda model, path: torch.save(model, path),
            r"it holds a whole module \(save model.state_dict\(\)\); allowed",
        ),
        (lambda model, path: torch.save({"model": model}, path), "it holds a whole module as 'model' .save its state"),
        (lambda model, path: torch.jit.save(torch.jit.script(nn.ReLU()), path), "it is a TorchScript archive .save"),
    ],
)
def test_modules_say_how_to_save_what_is_needed(tmp_path, save, message):
    save(trained(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"w.pt: cannot be read as weights: {message}"):
        load_weights(slim(), tmp_path / "w.pt")


class Harmful:
    def __init__(self, function, argument):
        self.parts = function, (argument,)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("function", [os.system, builtins.eval, os.mkdir])
def test_nothing_in_a_file_is_run(tmp_path, function):
    """What else is pickled is read as a stand-in, or refused where torch refuses it."""
    there = tmp_path / "there"
    argument = {os.system: f"touch {there}", builtins.eval: f"open({str(there)!r}, 'w')", os.mkdir: str(there)}[
        function
    ]
    source, model = trained(), slim()
    torch.save({"model": source.state_dict(), "args": Harmful(function, argument)}, tmp_path / "w.pt")
    try:
        load_weights(model, tmp_path / "w.pt")
    except ValueError as error:
        assert "cannot be read as weights: it holds more than tensors" in str(error)
    else:
        assert tensors_equal(model.state_dict(), source.state_dict())
    assert not there.exists()


class Config:
    """A class of the training script's own."""


def test_objects_of_unknown_classes_beside_the_weights(tmp_path):
    source, model = trained(), slim()
    extra = Config()
    extra.parts = [Config(), Config]
    torch.save({"model": source.state_dict(), "args": [extra, np.ones(3), np.dtype("float32")]}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert tensors_equal(model.state_dict(), source.state_dict())
