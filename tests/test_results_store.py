import copy
import json
import os
import stat

import pytest
import torch
from pico import PicoDetector, PicoNet
from safetensors import safe_open
from torch import nn

import results_store
from model_architectures import architecture_of, build
from results_store import ResultsError, load_merged, name_by_content, read_manifest, update_run, write_results
from sharing.groups import find_groups
from sharing.memory import distinct_bytes
from sharing.tying import is_tied, tie

STATISTICS = {"total_bytes": 1, "optimal_saved_bytes": 1, "history": []}


def manifest_of(models: nn.ModuleDict) -> dict:
    return {
        "tasks": {name: {"architecture": architecture_of(model)} for name, model in models.items()},
        "shared_layers": [],
        "memory": {},
        "run": {},
    }


def write(path, models) -> dict:
    return write_results(path, models, manifest_of(models), STATISTICS)


@pytest.fixture
def models():
    torch.manual_seed(0)
    models = nn.ModuleDict({"a_x": PicoNet(3, extra=1), "b_x": PicoNet(4), "c_x": PicoDetector()}).eval()
    tie(models, find_groups(models))
    return models


@pytest.fixture
def fresh():
    return {"a_x": PicoNet(3, extra=1), "b_x": PicoNet(4), "c_x": PicoDetector()}


def same_state(models, others) -> bool:
    return all(
        torch.equal(value, others[name].state_dict()[key])
        for name, model in models.items()
        for key, value in model.state_dict().items()
    )


def test_loaded_models_are_equal_and_shared_layers_are_one_parameter(models, fresh, tmp_path):
    write(tmp_path, models)
    loaded = load_merged(tmp_path, fresh)
    assert same_state(models, loaded) and loaded["a_x"] is fresh["a_x"]
    container = nn.ModuleDict(loaded)
    assert all(is_tied(container, group) for group in find_groups(models))
    assert distinct_bytes(container) == distinct_bytes(models)
    assert not any(module.training for model in loaded.values() for module in model.modules())
    container["a_x"].to(torch.float64)
    assert container["b_x"].conv1.weight is container["a_x"].conv1.weight
    assert container["b_x"].conv1.weight.dtype == torch.float64


def test_private_tensors_of_equal_content_stay_private(tmp_path):
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet()})
    for model in models.values():
        nn.init.zeros_(model.fc.bias)
    write(tmp_path, models)
    loaded = load_merged(tmp_path, {"a_x": PicoNet(), "b_x": PicoNet()})
    assert loaded["a_x"].fc.bias is not loaded["b_x"].fc.bias
    assert loaded["a_x"].bn1.num_batches_tracked is not loaded["b_x"].bn1.num_batches_tracked
    assert loaded["a_x"].bn1.num_batches_tracked.data_ptr() != loaded["b_x"].bn1.num_batches_tracked.data_ptr()


def test_models_are_rebuilt_from_the_architecture(tmp_path):
    models = nn.ModuleDict(
        {"a_slim": build("slim_resnet", 3, width=8), "b_slim": build("slim_resnet", 5, width=8, layers=[1, 1, 2, 1])}
    ).eval()
    tie(models, find_groups(models))
    write(tmp_path, models)
    loaded = load_merged(tmp_path)
    assert loaded["a_slim"].conv1.weight is loaded["b_slim"].conv1.weight
    images = torch.rand(2, 3, 48, 48)
    for name, model in models.items():
        assert torch.equal(model(images), loaded[name](images))


def test_the_store_holds_every_distinct_tensor_once(models, tmp_path):
    """Invariant 3: bytes of the store are those of the distinct tensors in memory, and a header."""
    manifest = write(tmp_path, models)
    (file,) = tmp_path.glob("merged-*.safetensors")
    with safe_open(file, framework="pt") as store:
        stored = sum(store.get_tensor(key).nbytes for key in store.keys())  # noqa: SIM118
        keys = set(store.keys())
    assert stored == distinct_bytes(models)
    assert stored < file.stat().st_size < stored + 20_000
    assert keys == {key for task in manifest["tensors"].values() for key in task.values()}
    shared = manifest["tensors"]["a_x"]["conv1.weight"]
    assert manifest["tensors"]["b_x"]["conv1.weight"] == shared != manifest["tensors"]["a_x"]["bn1.weight"]


def test_store_keys_follow_content():
    torch.manual_seed(0)
    model = PicoNet()
    first, _ = name_by_content({"a_x": model})
    assert name_by_content({"a_x": copy.deepcopy(model)})[0] == first
    with torch.no_grad():
        model.fc.bias += 1
    second, _ = name_by_content({"a_x": model})
    assert {key for key in first["a_x"] if first["a_x"][key] != second["a_x"][key]} == {"fc.bias"}


def test_task_files_load_with_plain_pytorch(models, fresh, tmp_path):
    write(tmp_path, models)
    for name, model in fresh.items():
        model.load_state_dict(torch.load(tmp_path / "weights" / f"{name}.pt", weights_only=True))
    assert same_state(models, fresh)


def test_the_manifest_names_every_file_with_its_sha256(models, tmp_path):
    manifest = write(tmp_path, models)
    on_disk = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()} - {"merged.json"}
    assert set(manifest["files"]) == on_disk
    assert all(results_store.file_sha256(tmp_path / name) == digest for name, digest in manifest["files"].items())
    assert read_manifest(tmp_path) == json.loads(json.dumps(manifest))


def test_files_are_readable_as_the_umask_says(models, tmp_path):
    before = os.umask(0o022)
    try:
        write(tmp_path, models)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.rglob("*") if f.is_file()}
    assert modes == {0o644}


def test_a_second_result_replaces_the_first_and_leaves_nothing_behind(models, fresh, tmp_path):
    write(tmp_path, models)
    (old,) = tmp_path.glob("merged-*.safetensors")
    with torch.no_grad():
        models["a_x"].conv1.weight += 1
    (tmp_path / "weights" / "theirs_x.pt").write_bytes(b"the user's")
    (tmp_path / "merged.json.tmp").write_text("left by a killed run")
    (tmp_path / "notes.txt").write_text("the user's")
    del models["c_x"], fresh["c_x"]
    write(tmp_path, models)
    (new,) = tmp_path.glob("merged-*.safetensors")
    assert new.name != old.name and same_state(models, load_merged(tmp_path, fresh))
    files = {f.name for f in tmp_path.rglob("*") if f.is_file()}
    assert files == {new.name, "merged.json", "workload_stats.json", "a_x.pt", "b_x.pt", "theirs_x.pt", "notes.txt"}


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_write_that_fails_leaves_the_last_result(models, fresh, tmp_path, monkeypatch, failing):
    write(tmp_path, models)
    before = copy.deepcopy(models)
    with torch.no_grad():
        models["a_x"].conv1.weight += 1
    calls = iter(range(1, 100))
    commit = results_store._commit

    def full_disk(temporary, target):
        if next(calls) == failing:
            raise OSError(28, "No space left on device", str(temporary))
        commit(temporary, target)

    monkeypatch.setattr(results_store, "_commit", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, models)
    assert same_state(before, load_merged(tmp_path, fresh))
    assert not list(tmp_path.rglob("*.tmp"))


def test_update_run_changes_nothing_else(models, fresh, tmp_path):
    manifest = write(tmp_path, models)
    updated = update_run(tmp_path, {"seconds": 3})
    assert updated == {**json.loads(json.dumps(manifest)), "run": {"seconds": 3}} == read_manifest(tmp_path)
    assert same_state(models, load_merged(tmp_path, fresh))


def test_a_folder_without_manifest_is_no_result(tmp_path):
    assert not results_store.has_results(tmp_path)
    with pytest.raises(ResultsError, match="merged.json: not found"):
        load_merged(tmp_path)


@pytest.mark.parametrize(
    "text, message", [("{", "cannot be read"), ("[]", "format: got 'list'"), ('{"format": 9}', "got 9")]
)
def test_a_manifest_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "merged.json").write_text(text)
    with pytest.raises(ResultsError, match=message):
        read_manifest(tmp_path)


def test_a_damaged_store_is_refused_by_name(models, fresh, tmp_path):
    write(tmp_path, models)
    (file,) = tmp_path.glob("merged-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ResultsError, match=f"{file.name}: its sha256"):
        load_merged(tmp_path, fresh)
    file.unlink()
    with pytest.raises(ResultsError, match="it is missing"):
        load_merged(tmp_path, fresh)


def test_models_that_do_not_fit_are_refused(models, fresh, tmp_path):
    write(tmp_path, models)
    with pytest.raises(ResultsError, match="no architecture for a_x, b_x, c_x.*hand the models in"):
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
