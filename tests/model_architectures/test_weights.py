"""State dicts from files."""

import pytest
import torch
from architecture_samples import tensors_equal
from torch import nn

from model_architectures import build, load_weights


def slim(num_classes=3, **kwargs):
    return build("slim_resnet", num_classes, layers=[1, 1], width=8, **kwargs)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("slim_resnet", lambda state: state),
        ("slim_resnet", lambda state: {"state_dict": state, "epoch": 7}),
        ("slim_resnet", lambda state: {"model": {f"module.{key}": value for key, value in state.items()}}),
        ("slim_resnet", lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}),
        ("mnasnet0_5", dict),  # without the version that its load_state_dict asks for
        # the feature pyramid of older versions of torchvision
        ("fcos_model", lambda state: {k.replace("blocks.0.0.", "blocks.0."): state[k] for k in state}),
    ],
)
def test_load_weights_reads_the_usual_layouts(tmp_path, name, wrap):
    trained, model = build(name, 3), build(name, 3)
    torch.save(wrap(trained.state_dict()), tmp_path / "weights.pth")
    assert load_weights(model, tmp_path / "weights.pth") is model
    assert tensors_equal(model.state_dict(), trained.state_dict())


def test_load_weights_lists_what_does_not_fit_and_leaves_the_model_alone(tmp_path):
    state = slim(num_classes=5).state_dict()
    del state["bn1.weight"], state["bn1.bias"]
    state["head.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pt")
    model = slim()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(model, tmp_path / "other.pt")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'other.pt'}: the weights do not fit the model",
        "  missing: bn1: weight, bias",
        "  unexpected: head: weight",
        "  different shape: fc.weight: got (5, 16), expected (3, 16)",
        "  different shape: fc.bias: got (5,), expected (3,)",
    ]
    assert tensors_equal(model.state_dict(), before)


def test_load_weights_caps_a_long_list(tmp_path):
    torch.save({"fc.weight": torch.zeros(3, 16), "fc.bias": torch.zeros(3)}, tmp_path / "head.pt")
    with pytest.raises(ValueError, match=r"  missing: and \d+ more") as caught:
        load_weights(slim(), tmp_path / "head.pt")
    assert len(str(caught.value).splitlines()) == 1 + 8 + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as weights"),
        (b"not a checkpoint", "cannot be read as weights"),
        (b"", "cannot be read as weights"),
        (nn.Linear(2, 2), "cannot be read as weights: .*model.state_dict"),
        ([torch.zeros(2)], "got a list; allowed: a state dict"),
        ({}, "got an empty dictionary"),
        ({"epoch": 3, "loss": 0.5}, "got a dictionary of epoch: int, loss: float"),
    ],
)
def test_load_weights_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(slim(), path)
    assert str(caught.value).startswith(str(path))


def test_load_weights_skips_auxiliary_classifiers_that_are_off(tmp_path):
    full = build("googlenet", 3, aux_logits=True, init_weights=False)
    torch.save(full.state_dict(), tmp_path / "full.pt")
    model = load_weights(build("googlenet", 3, aux_logits=False, init_weights=False), tmp_path / "full.pt")
    assert torch.equal(model.fc.weight, full.fc.weight)
    with pytest.raises(ValueError, match="unexpected: aux1"):  # only if the model says that they are off
        model.aux_logits = None
        load_weights(model, tmp_path / "full.pt")
