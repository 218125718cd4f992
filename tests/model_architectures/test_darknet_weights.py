"""YOLOv3 against an independent reading of its cfg files: parameters layer by layer, outputs, and weights from files.

The tables below are the published yolov3.cfg and yolov3-tiny.cfg; `run_cfg` interprets them with plain functions.
"""

import random
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model_architectures import build, load_weights
from model_architectures.darknet_weights import from_port, layers_of, load_darknet

# (filters, size, stride): a normalised convolution; ("output", anchors): one without, before a yolo layer; "yolo";
# ("shortcut", from); ("route", *layers); "upsample"; ("maxpool", stride).
RESIDUAL = {n: [(n // 2, 1, 1), (n, 3, 1), ("shortcut", -3)] for n in (64, 128, 256, 512, 1024)}


def necks(n):
    return [(n, 1, 1), (2 * n, 3, 1)] * 3 + [("output", 3), "yolo"]


FULL = [
    (32, 3, 1),
    *[(64, 3, 2), *RESIDUAL[64], (128, 3, 2), *RESIDUAL[128] * 2, (256, 3, 2), *RESIDUAL[256] * 8],
    *[(512, 3, 2), *RESIDUAL[512] * 8, (1024, 3, 2), *RESIDUAL[1024] * 4],
    *[*necks(512), ("route", -4), (256, 1, 1), "upsample", ("route", -1, 61)],
    *[*necks(256), ("route", -4), (128, 1, 1), "upsample", ("route", -1, 36)],
    *necks(128),
]
TINY = [
    *[layer for n in (16, 32, 64, 128, 256) for layer in [(n, 3, 1), ("maxpool", 2)]],
    *[(512, 3, 1), ("maxpool", 1), (1024, 3, 1), (256, 1, 1), (512, 3, 1), ("output", 3), "yolo"],
    *[("route", -4), (128, 1, 1), "upsample", ("route", -1, 8), (256, 3, 1), ("output", 3), "yolo"],
]
TABLES = {"yolov3": FULL, "yolov3_tiny": TINY}
SIXTEENTH = {"width": 1 / 16, "size": 64}


def is_conv(layer):
    return isinstance(layer, tuple) and (layer[0] == "output" or isinstance(layer[0], int))


def shapes_of(table, num_classes, width=1.0):
    """(index in the cfg, weight shape, stride, normalised) of every convolution."""
    channels, found = [], []
    for index, layer in enumerate(table):
        before = channels[-1] if channels else 3
        if is_conv(layer):
            output = layer[0] == "output"
            filters, size, stride = (layer[1] * (5 + num_classes), 1, 1) if output else layer
            filters = filters if output else int(filters * width)
            found.append((index, (filters, before, size, size), stride, not output))
            channels.append(filters)
        elif layer[0] == "route":
            channels.append(sum(channels[i] for i in layer[1:]))
        else:
            channels.append(before)
    return found


def weights_for(table, num_classes, width, seed=0):
    """[(cfg index, {"bias", "weight", "mean", "var", "conv"})] of random values that keep activations in range."""
    generator = np.random.default_rng(seed)
    found = []
    for index, shape, _, normalised in shapes_of(table, num_classes, width):
        own = {"conv": generator.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)}
        own["bias"] = generator.normal(0, 0.3, shape[0])
        if normalised:
            own |= {"weight": generator.uniform(0.5, 1.5, shape[0]), "mean": generator.normal(0, 0.1, shape[0])}
            own["var"] = generator.uniform(0.5, 1.5, shape[0])
        found.append((index, {key: value.astype(np.float32) for key, value in own.items()}))
    return found


def run_cfg(table, weights, images):
    """The outputs before each yolo layer, in the order of the cfg."""
    convolutions, strides = dict(weights), {index: stride for index, _, stride, _ in shapes_of(table, 1)}
    outputs, found = [], []
    for index, layer in enumerate(table):
        x = outputs[-1] if outputs else images
        if index in convolutions:
            own = {key: torch.from_numpy(value) for key, value in convolutions[index].items()}
            bias = None if "var" in own else own["bias"]
            x = F.conv2d(x, own["conv"], bias, strides[index], own["conv"].shape[-1] // 2)
            if bias is None:
                x = F.batch_norm(x, own["mean"], own["var"], own["weight"], own["bias"], eps=1e-5)
                x = torch.where(x > 0, x, 0.1 * x)
        elif layer == "yolo":
            found.append(x)
        elif layer == "upsample":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif layer[0] == "shortcut":
            x = x + outputs[layer[1]]
        elif layer[0] == "route":
            x = torch.cat([outputs[i] for i in layer[1:]], 1)
        elif layer[1] == 2:
            x = F.max_pool2d(x, 2)
        else:  # of size 2 and stride 1: each place with those to its right and below, where there are any
            right = torch.cat([x[..., 1:], x[..., -1:]], 3)
            x = torch.maximum(x, right)
            x = torch.maximum(x, torch.cat([x[:, :, 1:], x[:, :, -1:]], 2))
        outputs.append(x)
    return found


def darknet_bytes(weights, version=(0, 2, 5), seen="<q"):
    parts = [struct.pack("<3i", *version), struct.pack(seen, 32013312)]
    for _, own in weights:
        order = ("bias", "weight", "mean", "var", "conv") if "var" in own else ("bias", "conv")
        parts += [own[key].astype("<f4").tobytes() for key in order]
    return b"".join(parts)


def erik_state(table, weights):
    state = {}
    for index, own in weights:
        state[f"module_list.{index}.conv_{index}.weight"] = own["conv"]
        norm = f"module_list.{index}.batch_norm_{index}"
        if "var" in own:
            state |= {f"{norm}.weight": own["weight"], f"{norm}.bias": own["bias"]}
            state |= {f"{norm}.running_mean": own["mean"], f"{norm}.running_var": own["var"]}
            state[f"{norm}.num_batches_tracked"] = np.array(7)
        else:
            state[f"module_list.{index}.conv_{index}.bias"] = own["bias"]
            state[f"module_list.{index + 1}.yolo_{index + 1}.anchors"] = np.zeros((3, 2), np.float32)
    return tensors(state)


def old_ultralytics_state(table, weights):
    renamed = {}
    for key, value in erik_state(table, weights).items():
        module, number, layer, *rest = key.split(".")
        if not layer.startswith("yolo"):
            kind = "Conv2d" if layer.startswith("conv") else "BatchNorm2d"
            renamed[".".join([module, number, kind, *rest])] = value
    return renamed


# The layers of ultralytics/yolov3's models/yolov3.yaml and yolov3-tiny.yaml that have weights, in their order.
ULTRALYTICS = {
    "yolov3": [
        *["0", "1", "2.cv1", "2.cv2", "3", *[f"4.{i}.cv{j}" for i in range(2) for j in (1, 2)]],
        *["5", *[f"6.{i}.cv{j}" for i in range(8) for j in (1, 2)]],
        *["7", *[f"8.{i}.cv{j}" for i in range(8) for j in (1, 2)]],
        *["9", *[f"10.{i}.cv{j}" for i in range(4) for j in (1, 2)]],
        *["11.cv1", "11.cv2", "12", "13", "14", "15", "16", "19.cv1", "19.cv2", "20.cv1", "20.cv2", "21", "22", "23"],
        *["26.cv1", "26.cv2", "27.0.cv1", "27.0.cv2", "27.1.cv1", "27.1.cv2"],
    ],
    "yolov3_tiny": ["0", "2", "4", "6", "8", "10", "13", "14", "15", "16", "19"],
}


def ultralytics_state(name, weights):
    state = {}
    detect = f"model.{28 if name == 'yolov3' else 20}"
    inner = [own for _, own in weights if "var" in own]
    for layer, own in zip(ULTRALYTICS[name], inner, strict=True):
        state[f"model.{layer}.conv.weight"] = own["conv"]
        norm = f"model.{layer}.bn"
        state |= {f"{norm}.weight": own["weight"], f"{norm}.bias": own["bias"]}
        state |= {f"{norm}.running_mean": own["mean"], f"{norm}.running_var": own["var"]}
    state[f"{detect}.anchors"] = np.zeros((3, 3, 2), np.float32)
    outputs = [own for _, own in weights if "var" not in own]
    for i, own in enumerate(reversed(outputs)):  # the finest first
        state |= {f"{detect}.m.{i}.weight": own["conv"], f"{detect}.m.{i}.bias": own["bias"]}
    return tensors(state)


def tensors(state):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}


def small(name="yolov3_tiny", num_classes=3, **kwargs):
    return build(name, num_classes, **SIXTEENTH, **kwargs)


def small_weights(name="yolov3_tiny", num_classes=2):
    return weights_for(TABLES[name], num_classes, 1 / 16)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model, before):
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- the networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "in_file"), [("yolov3", 61_949_149, 62_001_757), ("yolov3_tiny", 8_852_366, 8_858_734)]
)
def test_every_layer_has_the_parameters_of_the_cfg(name, parameters, in_file):
    """in_file: with the running statistics; yolov3.weights has 248007048 = 20 + 4 x 62001757 bytes."""
    with torch.device("meta"):
        model = build(name, 81)
    layers, table = layers_of(model), shapes_of(TABLES[name], 80)
    assert len(layers) == len(table) == {"yolov3": 75, "yolov3_tiny": 13}[name]
    for layer, (_, shape, stride, normalised) in zip(layers, table, strict=True):
        assert tuple(layer.conv.weight.shape) == shape and layer.conv.stride == (stride, stride), layer.name
        assert (layer.norm is not None) == normalised == (layer.conv.bias is None), layer.name
        count = np.prod(shape) + (4 if normalised else 1) * shape[0]
        assert sum(tensor.numel() for _, tensor in layer.tensors()) == count, layer.name
    assert sum(p.numel() for p in model.parameters()) == parameters
    saved = sum(t.numel() for key, t in model.state_dict().items() if not key.endswith("num_batches_tracked"))
    assert saved == in_file


@pytest.mark.parametrize("name", TABLES)
def test_darknet_weights_compute_what_the_cfg_says(tmp_path, name):
    weights, images = small_weights(name), torch.rand(2, 3, 64, 96)
    (tmp_path / "own.weights").write_bytes(darknet_bytes(weights))
    model = load_weights(small(name), tmp_path / "own.weights").eval()
    expected = run_cfg(TABLES[name], weights, images)
    assert all(output.std() > 0.01 for output in expected)
    with torch.no_grad():
        for got, output in zip(reversed(model.network(images)), expected, strict=True):
            torch.testing.assert_close(got, output, atol=2e-4, rtol=1e-4)


# ---- Darknet's files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "seen"), [((0, 1, 0), "<i"), ((0, 2, 0), "<q"), ((1, 0, 0), "<q"), ((0, 1, 0), "<q")]
)
def test_both_headers(tmp_path, version, seen):
    (tmp_path / "w").write_bytes(darknet_bytes(small_weights(), version, seen))
    first, *_, last = layers_of(load_darknet(small(), tmp_path / "w"))
    assert np.array_equal(first.norm.bias.detach(), small_weights()[0][1]["bias"])
    assert np.array_equal(last.conv.weight.detach(), small_weights()[-1][1]["conv"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-4], r"ends within network.heads.1.output.1: got 356 of its 357 values"),
        (lambda data: data[:-3], "ends within network.heads.1.output.1"),
        (
            lambda data: data[: 20 + 4 * 32],
            r"ends within network.backbone.fine.2: got 1 of its 26 values; allowed: \d+ val",
        ),
        (lambda data: data[:20], "ends within network.backbone.fine.0: got 0 of its 31 values"),
        (lambda data: data[:12], "ends within network.backbone.fine.0"),
        (lambda data: data[:5], "got no Darknet header"),
        (lambda data: b"", "got no Darknet header"),
        (lambda data: b"PK\3\4" + data, "got no Darknet header; allowed: a Darknet weights file"),
        (
            lambda data: data + b"\0" * 8,
            r"got 2 values after the last layer; allowed: \d+ values for the 13 convolutions",
        ),
        (
            lambda data: data[:-4] + struct.pack("<f", np.nan),
            "network.heads.1.output.1.weight: got values that are not fin",
        ),
        (
            lambda data: data[:24] + struct.pack("<f", np.inf) + data[28:],
            "network.backbone.fine.0.norm.weight: got values",
        ),
        (
            lambda data: data[:32] + struct.pack("<f", -1) + data[36:],
            "fine.0.norm.running_var: got -1; allowed: variances",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_layer(tmp_path, change, message):
    path = tmp_path / "own.weights"
    path.write_bytes(change(darknet_bytes(small_weights())))
    model = small()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert_untouched(model, before)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "none.weights"):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read"):
            load_darknet(small(), path)


def test_a_file_for_other_classes_says_so_and_loads_without_outputs(tmp_path):
    path, weights = tmp_path / "own.weights", small_weights(num_classes=80)
    path.write_bytes(darknet_bytes(weights))
    model = small()
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"it is for 80 classes \(num_classes=81\), the model for 2; .* or partial=True"
    ):
        load_weights(model, path)
    assert_untouched(model, before)
    load_darknet(model, path, partial=True)
    for layer, (_, own) in zip(layers_of(model), weights, strict=True):
        if layer.norm is None:
            assert torch.equal(layer.conv.weight, before[f"{layer.name}.weight"])
        else:
            assert np.array_equal(layer.conv.weight.detach(), own["conv"]), layer.name


@pytest.mark.parametrize(("name", "length"), [("yolov3", 52), ("yolov3_tiny", 9)])
def test_the_file_of_a_backbone(tmp_path, name, length):
    """darknet53.conv.74 holds the convolutions among layers 0 to 73 of the cfg, yolov3-tiny.conv.15 those to 14."""
    weights = small_weights(name)
    assert weights[length - 1][0] == {52: 73, 9: 14}[length]
    path = tmp_path / "darknet53.conv.74"
    path.write_bytes(darknet_bytes(weights[:length]))
    with pytest.raises(ValueError, match="ends within network.heads.0"):
        load_darknet(small(name), path)
    model = small(name)
    before = state_of(model)
    layers = layers_of(load_darknet(model, path, partial=True))
    for i, (layer, (_, own)) in enumerate(zip(layers, weights, strict=True)):
        assert np.array_equal(layer.conv.weight.detach(), own["conv"]) == (i < length), layer.name
    assert torch.equal(layers[-1].conv.weight, before[f"{layers[-1].name}.weight"])


def fuzz(tmp_path, count):
    """Any change of a file is loaded, or refused with a ValueError that leaves the model alone."""
    draw, data = random.Random(0), darknet_bytes(small_weights())
    model, path = small(), tmp_path / "own.weights"
    refused = 0
    for _ in range(count):
        changed = bytearray(data[: draw.choice([len(data), draw.randrange(len(data))])])
        for _ in range(draw.randrange(4)):
            start = draw.randrange(len(changed) + 1)
            changed[start : start + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        path.write_bytes(changed)
        before = state_of(model)
        try:
            load_darknet(model, path, partial=draw.random() < 0.5)
        except ValueError:
            refused += 1
            assert_untouched(model, before)
        assert all(value.isfinite().all() for value in model.state_dict().values())
    assert refused > 0


def test_changed_files(tmp_path):
    fuzz(tmp_path, 60)


@pytest.mark.exhaustive
def test_many_changed_files(tmp_path):
    fuzz(tmp_path, 5000)


# ---- state dicts of other implementations ------------------------------------------------------------------


def port_states(name):
    table, weights = TABLES[name], small_weights(name)
    return [erik_state(table, weights), old_ultralytics_state(table, weights), ultralytics_state(name, weights)]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("port", range(3), ids=["erik", "old ultralytics", "ultralytics"])
def test_state_dicts_of_ports(tmp_path, name, port):
    state = port_states(name)[port]
    (tmp_path / "own.weights").write_bytes(darknet_bytes(small_weights(name)))
    expected = state_of(load_weights(small(name), tmp_path / "own.weights"))
    for content in (dict(sorted(state.items())), {"model": {f"module.{k}": v for k, v in state.items()}}):
        torch.save(content, tmp_path / "port.pt")
        got = load_weights(small(name), tmp_path / "port.pt").state_dict()
        tracked = "num_batches_tracked"
        assert all(torch.equal(got[key], value) for key, value in expected.items() if not key.endswith(tracked))


def test_its_own_state_dict_still_loads(tmp_path):
    model = small()
    torch.save(model.state_dict(), tmp_path / "own.pt")
    assert_untouched(load_weights(small(), tmp_path / "own.pt"), state_of(model))
    assert from_port(model, model.state_dict()).keys() == model.state_dict().keys()


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "model.14.bn.running_var"),
            "model.14: got no norm.running_var for network.heads.0.neck.norm",
        ),
        (
            lambda s: without(s, "model.20.m.1.bias", "model.20.m.1.weight"),
            "network.heads.1.output.1: got nothing for it",
        ),
        (lambda s: {**s, "model.21.conv.weight": torch.zeros(1)}, "model.21: the model has no such layer"),
        (lambda s: {**s, "model.0.bn.scale": torch.zeros(1)}, "model.0.bn.scale: unknown"),
        (lambda s: {**s, "ema.decay": torch.zeros(1)}, "ema.decay: unknown"),
        (
            lambda s: {**s, "model.2.conv.weight": torch.zeros(2, 1, 1, 1)},
            r"model.2.conv.weight for network.backbone.fine.2.conv.weight: got \[2, 1, 1, 1\], expected \[2, 1, 3, 3\]",
        ),
        (
            lambda s: ultralytics_state("yolov3_tiny", small_weights(num_classes=80)),
            r"model.20.m.1.weight for network.heads.0.output.1.weight: got \[255, 32, 1, 1\], expected \[21, 32",
        ),
        (lambda s: port_states("yolov3")[2], "and [0-9]+ more"),
    ],
)
def test_a_port_that_does_not_fit_is_explained_by_layer(tmp_path, change, message):
    torch.save(change(port_states("yolov3_tiny")[2]), tmp_path / "port.pt")
    model = small()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, tmp_path / "port.pt")
    assert f"{tmp_path / 'port.pt'}: the weights of ultralytics/yolov3 do not fit the model" in str(caught.value)
    assert_untouched(model, before)


def test_cfg_tables_are_whole():
    """The cfg files have 107 and 24 layers; every yolo layer follows an output."""
    assert (len(FULL), len(TINY)) == (107, 24)
    assert all(
        before[0] == "output" for table in TABLES.values() for before, layer in pairwise(table) if layer == "yolo"
    )
