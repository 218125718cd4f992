"""Loading a result: ties and what they survive, damage, models built without initialisation."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico import PicoNet
from results_samples import fresh_models, pico_models, same_state, slim_models, write
from torch import nn

from gemel.results_store import load as results_load
from gemel.results_store.files import ResultsError
from gemel.results_store.load import build_empty, load_merged
from gemel.results_store.tensors import open_store
from gemel.sharing.groups import find_groups
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import is_tied, tie
from model_architectures import build, names, rebuild, register

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def models():
    return pico_models()


def store_of(path: Path) -> Path:
    (file,) = path.glob("merged-*.safetensors")
    return file


# ---- ties -----------------------------------------------------------------------------------------------


def test_loaded_models_are_equal_and_shared_layers_are_one_parameter(models, tmp_path):
    write(tmp_path, models)
    fresh = fresh_models()
    loaded = load_merged(tmp_path, fresh, verify=True)
    assert same_state(models, loaded) and loaded["a_x"] is fresh["a_x"]
    container = nn.ModuleDict(loaded)
    assert all(is_tied(container, group) for group in find_groups(models))
    assert distinct_bytes(container) == distinct_bytes(models)
    assert not any(module.training for model in loaded.values() for module in model.modules())


def test_models_are_rebuilt_from_the_architecture(tmp_path):
    models = slim_models()
    write(tmp_path, models)
    loaded = load_merged(tmp_path)
    assert loaded["a_slim"].conv1.weight is loaded["b_slim"].conv1.weight
    images = torch.rand(2, 3, 48, 48)
    for name, model in models.items():
        assert torch.equal(model(images), loaded[name](images))
        assert loaded[name].architecture == model.architecture
    handed_in = rebuild(models["a_slim"].architecture)
    mixed = load_merged(tmp_path, {"a_slim": handed_in})
    assert mixed["a_slim"] is handed_in and mixed["b_slim"].conv1.weight is handed_in.conv1.weight


MOVES = {
    "to": lambda module: module.to(torch.float64),
    "half": lambda module: module.half(),
    "channels_last": lambda module: module.to(memory_format=torch.channels_last),
    "requires_grad_": lambda module: module.requires_grad_(False),
}


@pytest.mark.parametrize("whole", [True, False], ids=["container", "one by one"])
@pytest.mark.parametrize("move", MOVES)
def test_ties_survive_moves(models, tmp_path, move, whole):
    write(tmp_path, models)
    loaded = nn.ModuleDict(load_merged(tmp_path, fresh_models()))
    for module in [loaded] if whole else loaded.values():
        MOVES[move](module)
    assert all(is_tied(loaded, group) for group in find_groups(models))
    weight = loaded["a_x"].conv2.weight
    assert weight is loaded["b_x"].conv2.weight is loaded["c_x"].conv2.weight
    if move == "channels_last":
        assert weight.is_contiguous(memory_format=torch.channels_last)
    buffers = [id(buffer) for model in loaded.values() for buffer in model.buffers()]
    assert len(buffers) == len(set(buffers)) == 9  # buffers are never shared: a move would part them


@pytest.mark.parametrize("whole", [True, False], ids=["container", "one by one"])
def test_ties_survive_saving_and_loading(models, tmp_path, whole):
    write(tmp_path, models)
    loaded = nn.ModuleDict(load_merged(tmp_path, fresh_models()))
    other = nn.ModuleDict(load_merged(tmp_path, fresh_models()))
    with torch.no_grad():
        loaded["a_x"].conv1.weight += 1
    for source, target in [(loaded, other)] if whole else [(loaded[name], other[name]) for name in loaded]:
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
    assert all(is_tied(other, group) for group in find_groups(models)) and same_state(loaded, other)
    assert distinct_bytes(other) == distinct_bytes(models)


def test_a_saved_model_is_as_large_as_the_model(models, tmp_path):
    """Its tensors lie on one memory map, of which torch.save must not write the whole."""
    write(tmp_path, models)
    file = io.BytesIO()
    torch.save(load_merged(tmp_path, fresh_models())["b_x"].state_dict(), file)
    expected = io.BytesIO()
    torch.save(fresh_models()["b_x"].state_dict(), expected)
    assert len(file.getvalue()) == len(expected.getvalue())


def test_training_in_place_leaves_the_file_as_it_is(models, tmp_path):
    write(tmp_path, models)
    before = store_of(tmp_path).read_bytes()
    loaded = load_merged(tmp_path, fresh_models())
    optimizer = torch.optim.SGD(nn.ModuleDict(loaded).parameters(), lr=0.1)
    loaded["a_x"].train()(torch.rand(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert not same_state(models, loaded)
    assert store_of(tmp_path).read_bytes() == before
    assert same_state(models, load_merged(tmp_path, fresh_models()))
    store_of(tmp_path).unlink()  # as the next commit does
    assert torch.isfinite(loaded["a_x"].conv1.weight).all()


def test_what_is_frozen_stays_frozen(models, tmp_path):
    write(tmp_path, models)
    fresh = {name: model.requires_grad_(False) for name, model in fresh_models().items()}
    assert not any(p.requires_grad for model in load_merged(tmp_path, fresh).values() for p in model.parameters())


def test_every_module_is_in_eval_mode(models, tmp_path):
    write(tmp_path, models)
    loaded = load_merged(tmp_path, {name: model.train() for name, model in fresh_models().items()})
    assert not any(module.training for model in loaded.values() for module in model.modules())


class AlwaysTraining(PicoNet):
    """Overrides train(), so that its norm stays in training mode."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.bn1.train()
        return self


def test_a_model_that_overrides_train_keeps_its_way(models, tmp_path):
    """Overridden in its class, or by an attribute of one of its modules."""
    write(tmp_path, models)
    fresh = {**fresh_models(), "b_x": AlwaysTraining(4)}
    held = fresh["c_x"].bn1
    held.train = lambda mode=True: held
    for name, model in load_merged(tmp_path, fresh).items():
        in_training = [path for path, module in model.named_modules() if module.training]
        assert in_training == ([] if name == "a_x" else ["bn1"])


# ---- only some tasks ------------------------------------------------------------------------------------


def test_only_the_tensors_of_the_tasks_asked_for_are_read(models, tmp_path):
    manifest = write(tmp_path, models)
    private = manifest["tensors"]["b_x"]["bn1.weight"]
    entry = results_load.read_result(tmp_path)[1].entries[private]
    content = bytearray(store_of(tmp_path).read_bytes())
    content[entry.begin] ^= 1
    store_of(tmp_path).write_bytes(content)
    loaded = load_merged(tmp_path, fresh_models(), tasks=["c_x", "a_x"])
    assert list(loaded) == ["a_x", "c_x"] and loaded["a_x"].conv1.weight is loaded["c_x"].conv1.weight
    with pytest.raises(ResultsError, match=f"{store_of(tmp_path).name}: the checksum of tensor {private} is not"):
        load_merged(tmp_path, fresh_models(), tasks=["b_x"])
    with pytest.raises(ResultsError, match="tasks: got d_x; allowed: a_x, b_x, c_x"):
        load_merged(tmp_path, fresh_models(), tasks=["d_x"])


def test_a_task_that_is_not_asked_for_needs_no_model(models, tmp_path):
    write(tmp_path, models)
    assert list(load_merged(tmp_path, {"b_x": PicoNet(4)}, tasks=["b_x"])) == ["b_x"]


# ---- refused --------------------------------------------------------------------------------------------


def test_a_damaged_store_is_refused_by_name(models, tmp_path):
    write(tmp_path, models)
    file, content = store_of(tmp_path), store_of(tmp_path).read_bytes()
    for position in (5, 40, -1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(ResultsError, match=file.name):
            load_merged(tmp_path, fresh_models())
    file.write_bytes(content[:-1])
    with pytest.raises(ResultsError, match=f"{file.name}: .*truncated|{file.name}: its header is damaged"):
        load_merged(tmp_path, fresh_models())
    file.unlink()
    with pytest.raises(ResultsError, match="it is missing"):
        load_merged(tmp_path, fresh_models())


def test_a_store_whose_header_was_changed_is_refused(models, tmp_path):
    """Two tensors of one shape change their names: all sizes still agree."""
    write(tmp_path, models)
    file = store_of(tmp_path)
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    one, other = (key for key in list(header) if header[key].get("shape") == [8, 8, 3, 3])
    header[one], header[other] = header[other], header[one]
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(length - 8)
    assert len(changed) == length - 8
    file.write_bytes(content[:8] + changed + content[length:])
    with pytest.raises(ResultsError, match=f"{file.name}: the sha256 of its header is not the one in the manifest"):
        load_merged(tmp_path, fresh_models())


@pytest.mark.parametrize("first, message", [(4, None), (1, "b: a tensor is not aligned")])
def test_a_store_of_another_program_is_refused_where_a_tensor_is_not_aligned(first, message, tmp_path):
    entries = {"a": ("U8", first, 0), "b": ("F32", 1, first)}
    header = {
        key: {"dtype": dtype, "shape": [length], "data_offsets": [begin, begin + length * (4 if dtype == "F32" else 1)]}
        for key, (dtype, length, begin) in entries.items()
    }
    text = json.dumps(header).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    file = tmp_path / "merged.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(first + 4))
    if message is None:
        assert list(open_store(file).entries) == ["a", "b"]
    else:
        with pytest.raises(ResultsError, match=message):
            open_store(file)


def test_what_is_in_no_state_dict_moves_to_the_device_as_well(models, tmp_path):
    write(tmp_path, models)
    handed_in = fresh_models()
    handed_in["a_x"].register_buffer("grid", torch.arange(3), persistent=False)
    loaded = load_merged(tmp_path, handed_in, device="meta")
    assert all(tensor.is_meta for model in loaded.values() for tensor in [*model.parameters(), *model.buffers()])


def test_models_that_do_not_fit_are_refused_and_left_as_they_are(models, tmp_path):
    write(tmp_path, models)
    fresh = fresh_models()
    with pytest.raises(ResultsError, match="no model was handed in for a_x, b_x, c_x.*no architecture"):
        load_merged(tmp_path)
    with pytest.raises(ResultsError, match="no model was handed in for c_x"):
        load_merged(tmp_path, {name: fresh[name] for name in ("a_x", "b_x")})
    wrong = {**fresh, "b_x": PicoNet(5)}
    before = {key: value.clone() for key, value in wrong["a_x"].state_dict().items()}
    with pytest.raises(ResultsError, match=r"b_x: .*fc.weight: got \[4, 8\], the model has \[5, 8\]"):
        load_merged(tmp_path, wrong)
    assert all(torch.equal(value, before[key]) for key, value in wrong["a_x"].state_dict().items())
    with pytest.raises(ResultsError, match="more.0.weight is unknown to the model"):
        load_merged(tmp_path, {**fresh, "a_x": PicoNet(3)})
    whole = copy.deepcopy(fresh["b_x"])
    whole.bn1.num_batches_tracked = torch.tensor(0.5)
    with pytest.raises(ResultsError, match="num_batches_tracked: got torch.int64, the model has torch.float32"):
        load_merged(tmp_path, {**fresh, "b_x": whole})


def test_five_of_many_problems_are_listed(tmp_path):
    write(tmp_path, pico_models())
    for extra, more in (
        (3, ""),
        (4, "; and 1 more"),
        (6, "; and 5 more"),
    ):  # two tensors a layer, of which one is there
        with pytest.raises(ResultsError) as raised:
            load_merged(tmp_path, {**fresh_models(), "a_x": PicoNet(3, extra=extra)}, tasks="a_x")
        listed = str(raised.value).partition("fit the model: ")[2]
        missing = [f"more.{i}.{part} is missing in the results" for i in range(1, extra) for part in ("weight", "bias")]
        assert listed == "; ".join(missing[:5]) + more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_loaded_in_another_type_and_normalisation_is_not(dtype, tmp_path):
    models = pico_models()
    write(tmp_path, models)
    with pytest.warns(UserWarning, match="were judged in float32"):
        loaded = load_merged(tmp_path, fresh_models(), dtype=dtype)
    assert loaded["a_x"].conv1.weight is loaded["b_x"].conv1.weight is loaded["c_x"].conv1.weight
    for name, model in loaded.items():
        for key, value in model.state_dict().items():
            own = models[name].state_dict()[key]
            assert torch.equal(value, own if "bn1" in key else own.to(dtype)), (name, key)


# ---- built without initialisation -----------------------------------------------------------------------


def attributes(model: nn.Module) -> dict:
    """Everything of a model except parameters: buffers and plain attributes."""
    own = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules")
    }
    return {**own, **{("buffer", name): buffer for name, buffer in model.named_buffers()}}


def alike(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and not b.is_meta and type(a) is type(b) and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return a == b if isinstance(a, int | float | str | bool | None) else type(a) is type(b)


SOME = [
    "slim_resnet",
    "yolov3_tiny",
    "swin_v2_t",
    "mobilenet_v3_small",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_model",
    "ssdlite320_mobilenet_v3_large",
]


def check_empty(name: str) -> None:
    architecture = {"name": name, "num_classes": 7, "kwargs": {}}
    empty, whole = build_empty(architecture, 1000), rebuild(architecture)
    assert all(p.is_meta for p in empty.parameters())
    wanted, found = attributes(whole), attributes(empty)
    assert wanted.keys() == found.keys()
    assert [key for key in wanted if not alike(wanted[key], found[key])] == []
    frozen = [[n for n, p in model.named_parameters() if not p.requires_grad] for model in (empty, whole)]
    assert frozen[0] == frozen[1]


@pytest.mark.parametrize("name", SOME)
def test_a_model_built_empty_is_the_model_without_values(name):
    """Among them: position indices as buffers, anchors as attributes, a builder that runs the model it makes."""
    check_empty(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", names())
def test_every_model_built_empty_is_the_model_without_values(name):
    check_empty(name)


def test_a_detector_is_complete_after_loading(tmp_path):
    torch.manual_seed(0)
    kwargs = {"layers": [1, 1], "width": 4, "out_channels": 32, "head_convs": 1, "min_size": 48, "max_size": 64}
    models = nn.ModuleDict({"a_fcos": build("fcos_model", 3, **kwargs)}).eval()
    write(tmp_path, models)
    images = [torch.rand(3, 48, 60)]
    found, wanted = load_merged(tmp_path)["a_fcos"](images)[0], models["a_fcos"](images)[0]
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_building_empty_leaves_torch_as_it_was():
    state = torch.get_rng_state()
    build_empty({"name": "slim_resnet", "num_classes": 3, "kwargs": {}}, 50)
    assert torch.equal(state, torch.get_rng_state())
    assert not PicoNet().conv1.weight.is_meta


def test_a_builder_that_needs_values_is_run_as_it_is(monkeypatch):
    monkeypatch.setattr("model_architectures.registry._BUILDERS", {})

    @register("odd")
    def odd(num_classes: int) -> nn.Module:
        model = PicoNet(num_classes)
        model.register_buffer("norm", model.fc.weight.detach().norm(), persistent=False)
        return model

    model = build_empty({"name": "odd", "num_classes": 3, "kwargs": {}}, 10)
    assert not model.norm.is_meta and not model.fc.weight.is_meta


def test_an_architecture_with_far_too_many_parameters_is_refused():
    endless = {"name": "slim_resnet", "num_classes": 3, "kwargs": {"layers": [1, 10**8], "width": 1}}
    with pytest.raises(ValueError, match="more than 1200 parameters, where 50 tensors are stored"):
        build_empty(endless, 50)


MEMORY = """
import re, sys
sys.path[:0] = {path!r}
import torch
from gemel import load_merged
torch.set_num_threads(1)
def pss():
    return 1024 * int(re.search(r"^Pss:\\s+(\\d+)", open("/proc/self/smaps_rollup").read(), re.M)[1])
load_merged({small!r})  # what the libraries need for the first time
before = pss()
models = load_merged({large!r})
print(pss() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_memory_grows_by_the_distinct_bytes(tmp_path):
    """Measured as proportional set size in a process of its own; the sum of the models would be four times as much."""
    write(tmp_path / "small", slim_models())
    torch.manual_seed(0)
    models = nn.ModuleDict({f"{n}_slim": build("slim_resnet", 3, width=64, layers=[1, 1, 1]) for n in "abcd"}).eval()
    tie(models, find_groups(models))
    manifest = write(tmp_path / "large", models)
    code = MEMORY.format(path=[str(ROOT)], small=str(tmp_path / "small"), large=str(tmp_path / "large"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, distinct = int(done.stdout), manifest["memory"]["merged_bytes"]
    assert distinct > 4e6 and 0.9 * distinct < grown < 1.1 * distinct + 2e6
