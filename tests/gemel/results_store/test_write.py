"""Writing and repairing a result, and writes that are interrupted."""

import copy
import json
import os
import stat

import pytest
import torch
from pico import PicoNet
from results_samples import HISTORY, fresh_models, manifest_of, pico_models, same_state, slim_models, tree, write
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from gemel.__main__ import main
from gemel.results_store import files as results_files
from gemel.results_store import write as write_module
from gemel.results_store.checkpoint import write_checkpoint
from gemel.results_store.files import ResultsError
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest
from gemel.results_store.tensors import name_by_content
from gemel.results_store.verify import verify
from gemel.results_store.write import foreign_files, repair, update_run, write_results
from gemel.sharing.memory import distinct_bytes


@pytest.fixture
def models():
    return pico_models()


def statuses(path) -> dict[str, str]:
    return {check.what: check.status for check in verify(path)}


def fails(path) -> list[str]:
    return [what for what, status in statuses(path).items() if status == "FAIL"]


# ---- what is written ------------------------------------------------------------------------------------


def test_private_tensors_of_equal_content_stay_private(tmp_path):
    models = nn.ModuleDict({"a_x": PicoNet(), "b_x": PicoNet()})
    for model in models.values():
        nn.init.zeros_(model.fc.bias)
    write(tmp_path, models)
    loaded = load_merged(tmp_path, {"a_x": PicoNet(), "b_x": PicoNet()})
    assert loaded["a_x"].fc.bias is not loaded["b_x"].fc.bias
    assert loaded["a_x"].bn1.num_batches_tracked is not loaded["b_x"].bn1.num_batches_tracked
    assert loaded["a_x"].bn1.num_batches_tracked.data_ptr() != loaded["b_x"].bn1.num_batches_tracked.data_ptr()


def test_the_store_holds_every_distinct_tensor_once(models, tmp_path):
    """Invariant 3: bytes of the store are those of the distinct tensors in memory, and a header."""
    manifest = write(tmp_path, models)
    (file,) = tmp_path.glob("merged-*.safetensors")
    with safe_open(file, framework="pt") as store:
        stored = sum(store.get_tensor(key).nbytes for key in store.keys())  # noqa: SIM118
        keys = set(store.keys())
    assert stored == distinct_bytes(models) == manifest["memory"]["merged_bytes"]
    assert stored < file.stat().st_size == manifest["store"]["bytes"] < stored + 20_000
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


def test_task_files_load_with_plain_pytorch(models, tmp_path):
    write(tmp_path, models)
    fresh = fresh_models()
    for name, model in fresh.items():
        model.load_state_dict(torch.load(tmp_path / "weights" / f"{name}.pt", weights_only=True))
    assert same_state(models, fresh)


def test_a_tensor_that_is_part_of_a_larger_one_is_stored_alone(tmp_path):
    models = nn.ModuleDict({"a_x": PicoNet()})
    models["a_x"].fc.bias.data = torch.arange(100_000.0)[:3]
    write(tmp_path, models)
    assert (tmp_path / "weights" / "a_x.pt").stat().st_size < 50_000
    assert same_state(models, load_merged(tmp_path, {"a_x": PicoNet()}))


def test_the_manifest_names_every_file_with_its_sha256(models, tmp_path):
    manifest = write(tmp_path, models)
    on_disk = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()} - {"merged.json"}
    assert set(manifest["files"]) == set(manifest["file_bytes"]) == on_disk
    assert all(results_files.sha256_of(tmp_path / name) == digest for name, digest in manifest["files"].items())
    assert all((tmp_path / name).stat().st_size == size for name, size in manifest["file_bytes"].items())
    assert read_manifest(tmp_path) == manifest == json.loads((tmp_path / "merged.json").read_text())
    assert manifest["normalisation"] == "private" and manifest["format"] == 1


def test_files_are_readable_as_the_umask_says(models, tmp_path):
    before = os.umask(0o022)
    try:
        write(tmp_path, models)
        write_checkpoint(tmp_path, {})
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.rglob("*") if f.is_file()}
    assert modes == {0o644}


def test_update_run_changes_nothing_else(models, tmp_path):
    manifest = write(tmp_path, models)
    updated = update_run(tmp_path, {"seconds": 3})
    assert {**updated, "sha256": 0} == {**manifest, "run": {"seconds": 3}, "sha256": 0}
    assert updated == read_manifest(tmp_path) and same_state(models, load_merged(tmp_path, fresh_models()))


def test_what_is_not_a_result_is_not_written(models, tmp_path):
    """A manifest that readers would refuse never replaces one that they accept."""
    write(tmp_path, models)
    before = tree(tmp_path)
    for change in ({"shared_layers": []}, {"tasks": {}}, {"memory": {}}):
        with pytest.raises(AssertionError, match="merged.json would be invalid"):
            write_results(tmp_path, models, {**manifest_of(models), **change}, {})
        assert tree(tmp_path) == before
    with pytest.raises(ResultsError, match="merged.json: cannot be written"):
        update_run(tmp_path, {"seconds": float("nan")})
    assert tree(tmp_path) == before


# ---- a second result ------------------------------------------------------------------------------------


def test_a_second_result_replaces_the_first_and_leaves_nothing_behind(models, tmp_path):
    write(tmp_path, models)
    (old,) = tmp_path.glob("merged-*.safetensors")
    with torch.no_grad():
        models["a_x"].conv1.weight += 1
    (tmp_path / "weights" / "theirs_x.pt").write_bytes(b"the user's")
    (tmp_path / "merged.json.run.tmp").write_text("left by a killed run")
    (tmp_path / "notes.txt").write_text("the user's")
    write_checkpoint(tmp_path, {"step": 3})
    fresh = fresh_models()
    del models["c_x"], fresh["c_x"]
    write(tmp_path, models)
    (new,) = tmp_path.glob("merged-*.safetensors")
    assert new.name != old.name and same_state(models, load_merged(tmp_path, fresh))
    files = {f.name for f in tmp_path.rglob("*") if f.is_file()}
    assert files == {new.name, "merged.json", "workload_stats.json", "a_x.pt", "b_x.pt", "theirs_x.pt", "notes.txt"}
    (tmp_path / "weights" / "c_x.pt").write_bytes(b"the user's, under a name that once was ours")
    write(tmp_path, models)
    assert (tmp_path / "weights" / "c_x.pt").exists()


def test_what_is_the_same_is_not_written_again(models, tmp_path):
    write(tmp_path, models)
    inodes = {f.name: f.stat().st_ino for f in tmp_path.rglob("*") if f.is_file()}
    with torch.no_grad():
        models["c_x"].offsets.bias += 1
    (tmp_path / "weights" / "b_x.pt").write_bytes(b"short")
    second = write(tmp_path, models)
    kept = {f.name for f in tmp_path.rglob("*") if f.is_file() and inodes.get(f.name) == f.stat().st_ino}
    assert kept == {"a_x.pt"} and fails(tmp_path) == []
    inode = (tmp_path / second["store"]["file"]).stat().st_ino
    assert write(tmp_path, models) == second and (tmp_path / second["store"]["file"]).stat().st_ino == inode


def test_files_of_a_task_that_was_removed_are_collected_even_after_a_kill(models, tmp_path, monkeypatch):
    write(tmp_path, models)
    del models["c_x"]
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "_collect", lambda *_: None)  # killed before
        write(tmp_path, models)
    assert (tmp_path / "weights" / "c_x.pt").exists() and fails(tmp_path) == []
    write(tmp_path, models)
    assert not (tmp_path / "weights" / "c_x.pt").exists()


def test_only_files_that_a_run_wrote_are_overwritten(models, tmp_path):
    (tmp_path / "in_flight.pt").write_bytes(b"the user's")
    assert foreign_files(tmp_path, models) == ["in_flight.pt"]
    (tmp_path / "in_flight.pt").unlink()
    write(tmp_path, models)
    write_checkpoint(tmp_path, {})
    assert foreign_files(tmp_path, models) == []


def test_nothing_is_written_through_a_link(models, tmp_path):
    results, outside = tmp_path / "results", tmp_path / "outside"
    write(results, models)
    outside.mkdir()
    (outside / "precious").write_text("theirs")
    (results / "merged.json.run.tmp").symlink_to(outside / "precious")
    (results / "in_flight.pt").symlink_to(outside / "precious")
    update_run(results, {})
    write_checkpoint(results, {})
    (results / "weights").rename(results / "w")
    (results / "weights").symlink_to(outside)
    with pytest.raises(ResultsError, match="weights: is a link"):
        write(results, pico_models(seed=1))
    with pytest.raises(ResultsError, match="weights: is a link"):
        repair(results)
    assert tree(outside) == {"precious": b"theirs"}


# ---- interrupted, repaired ------------------------------------------------------------------------------


def test_files_are_renamed_for_good_before_the_manifest_names_them(models, tmp_path, monkeypatch):
    """A rename that is not synced may be lost with the power, and the manifest's may not."""
    done, commit, sync = [], results_files.commit, results_files.sync_folder

    def recorded_commit(temporary, target):
        done.append((target.parent, target.name))
        commit(temporary, target)

    def recorded_sync(folder):
        done.append((folder, "synced"))
        sync(folder)

    monkeypatch.setattr(results_files, "commit", recorded_commit)
    monkeypatch.setattr(results_files, "sync_folder", recorded_sync)
    write(tmp_path, models)
    last = done.index((tmp_path, "merged.json"))
    assert done[last + 1 :] == [(tmp_path, "synced")]
    renamed = [(i, folder) for i, (folder, name) in enumerate(done[:last]) if name.endswith((".pt", ".safetensors"))]
    assert len(renamed) == 1 + len(models)
    assert all((folder, "synced") in done[i:last] for i, folder in renamed)


@pytest.mark.parametrize("refused, left", [("merged-", []), ("a_x.pt", []), ("merged.json", ["merged.json.tmp"])])
def test_a_refused_rename_leaves_no_temporary_but_what_a_repair_needs(models, tmp_path, monkeypatch, refused, left):
    honest = os.replace

    def replace(temporary, target):
        if target.name.startswith(refused):
            raise OSError(28, "No space left on device")
        honest(temporary, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ResultsError, match=rf"{refused}.*: cannot be replaced: No space left on device"):
        write(tmp_path, models)
    assert results_files.leftovers(tmp_path) == left


@pytest.mark.parametrize("renames", range(6))
def test_an_interrupted_commit_is_recognised_and_repaired(models, tmp_path, monkeypatch, renames):
    """Killed after so many renames: the folder holds the old result or the new one, and .pt files of either."""
    first = write(tmp_path, models)
    before = copy.deepcopy(models)
    with torch.no_grad():
        models["a_x"].conv1.weight += 1
    calls, commit = iter(range(100)), results_files.commit

    class Killed(BaseException):
        pass

    def killed(temporary, target):
        if next(calls) > renames:  # the first one is the store's
            raise Killed
        commit(temporary, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(results_files, "commit", killed)
        patch.setattr(results_files, "discard", lambda *_: None)
        write(tmp_path, models)
        raise Killed  # after all five: three .pt files, the statistics, the manifest
    done = renames == 5
    assert same_state(models if done else before, load_merged(tmp_path, fresh_models(), verify=True))
    assert fails(tmp_path) == []
    lines = statuses(tmp_path)
    assert sum("of a commit that was interrupted" in line for line in lines) == (0 if done else min(renames, 3))
    done_lines = repair(tmp_path)
    assert sum("rebuilt from the store" in line for line in done_lines) == (0 if done else min(renames, 3))
    assert read_manifest(tmp_path)["tensors"] == (read_manifest(tmp_path) if done else first)["tensors"]
    assert fails(tmp_path) == [] and not list(tmp_path.rglob("*.tmp")) and repair(tmp_path) == []


def test_a_result_written_over_an_interrupted_commit(models, tmp_path, monkeypatch):
    """The .pt files then have the sizes in the manifest, but not the content: none of them counts as unchanged."""
    write(tmp_path, models)
    before = copy.deepcopy(models)
    with torch.no_grad():
        models["a_x"].conv1.weight += 1
    with monkeypatch.context() as patch, pytest.raises(ResultsError, match="merged.json: cannot be replaced"):
        commit = results_files.commit

        def full(temporary, target):
            with results_files.naming(target, "replaced"):
                if target.name == "merged.json":
                    raise OSError(28, "No space left on device")
                commit(temporary, target)

        patch.setattr(results_files, "commit", full)
        write(tmp_path, models)
    write(tmp_path, before)
    assert fails(tmp_path) == [] and not list(tmp_path.rglob("*.tmp"))


def test_repair_rebuilds_what_disagrees_with_the_manifest(models, tmp_path):
    manifest = write(tmp_path, models)
    (tmp_path / "weights" / "a_x.pt").write_bytes(b"damaged")
    (tmp_path / "weights" / "b_x.pt").unlink()
    (tmp_path / "workload_stats.json").write_text("{}")
    (tmp_path / "weights" / "c_x.pt.tmp").write_text("left")
    lines = repair(tmp_path)
    assert len(lines) == 4 and all(str(tmp_path) in line for line in lines)
    assert read_manifest(tmp_path) == manifest and fails(tmp_path) == []
    assert json.loads((tmp_path / "workload_stats.json").read_text())["history"] == HISTORY


def test_repair_with_another_version_of_torch(models, tmp_path, monkeypatch):
    manifest = write(tmp_path, models)
    (tmp_path / "weights" / "a_x.pt").unlink()
    save = torch.save
    monkeypatch.setattr(write_module.torch, "save", lambda o, f: save(o, f, _use_new_zipfile_serialization=False))
    repair(tmp_path)
    repaired = read_manifest(tmp_path)
    assert {n for n in manifest["files"] if manifest["files"][n] != repaired["files"][n]} == {"weights/a_x.pt"}
    assert fails(tmp_path) == []


def test_repair_refuses_a_damaged_store_by_name(models, tmp_path):
    manifest = write(tmp_path, models)
    file = tmp_path / manifest["store"]["file"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ResultsError, match=f"{file.name}: its sha256"):
        repair(tmp_path)


# ---- the store is plain safetensors ---------------------------------------------------------------------


def test_other_programs_can_read_the_store(tmp_path):
    torch.manual_seed(0)
    kinds = {
        "narrow": torch.rand(5).half(),
        "brain": torch.rand(3, 2).bfloat16(),
        "wide": torch.rand(3).double(),
        "flag": torch.tensor([True, False, True]),
        "bytes_": torch.arange(7, dtype=torch.uint8),
        "count": torch.tensor(3),
        "none": torch.empty(0, 4),
        "complex_": torch.rand(2, dtype=torch.complex64),
        "large": torch.rand(300, 101),
    }

    def model_of(values) -> nn.Module:
        model = PicoNet()
        for name, value in values.items():
            model.register_buffer(name, value.clone())
        return model

    models = nn.ModuleDict({"a_x": model_of(kinds)})
    manifest = write(tmp_path, models)
    theirs = load_file(tmp_path / manifest["store"]["file"])
    loaded = load_merged(tmp_path, {"a_x": model_of({k: torch.zeros_like(v) for k, v in kinds.items()})})["a_x"]
    for name, value in kinds.items():
        key = manifest["tensors"]["a_x"][name]
        assert torch.equal(theirs[key], value) and torch.equal(getattr(loaded, name), value)
        assert theirs[key].dtype == value.dtype == getattr(loaded, name).dtype
    assert manifest["memory"]["merged_bytes"] == sum(tensor.nbytes for tensor in theirs.values())


def test_a_dtype_that_cannot_be_stored_is_named(tmp_path):
    model = PicoNet()
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ResultsError, match="a_x: odd: got torch.complex128; allowed: torch.float64"):
        write(tmp_path, nn.ModuleDict({"a_x": model}))


def test_slim_models_verify_from_the_shell(tmp_path, capsys):
    write(tmp_path, slim_models())
    assert main(["verify", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "shared layers are one parameter each after loading, and only those" in printed and "FAIL" not in printed
    (tmp_path / "weights" / "a_slim.pt").write_bytes(b"")
    assert main(["verify", str(tmp_path)]) == 1
