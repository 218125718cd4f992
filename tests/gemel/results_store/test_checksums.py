"""Checksums of a store: what they find, and those of earlier versions, whose blocks were smaller."""

import json
from pathlib import Path

import pytest
import torch
from pico import PicoNet
from results_samples import same_state, write
from torch import nn

from gemel.results_store.files import ResultsError
from gemel.results_store.load import load_merged
from gemel.results_store.manifest import read_manifest, read_result, seal
from gemel.results_store.tensors import checksum
from gemel.results_store.verify import FAIL, verify
from gemel.results_store.write import repair, update_run

PAGE = 4096
LARGE = "conv2.weight"  # the one tensor with blocks: 9 of 16 KiB


def large_models() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a_x": PicoNet(3, width=64)}).eval()


def load(path: Path, **options) -> dict[str, nn.Module]:
    return load_merged(path, {"a_x": PicoNet(3, width=64)}, **options)


def rewritten(path: Path, **record) -> None:
    """Changes the entry `store` of the manifest; ... removes a key."""
    manifest = json.loads((path / "merged.json").read_text())
    manifest["store"].update(record)
    manifest["store"] = {part: value for part, value in manifest["store"].items() if value is not ...}
    (path / "merged.json").write_text(json.dumps(seal(manifest)))


def content_of(path: Path) -> tuple[Path, bytearray, slice]:
    """(the store, its bytes, where in them the large tensor is)."""
    manifest, store = read_result(path)
    entry = store.entries[manifest["tensors"]["a_x"][LARGE]]
    return store.file, bytearray(store.file.read_bytes()), slice(entry.begin, entry.end)


def as_before(path: Path) -> None:
    """Makes a result one of the versions whose manifest did not name the size of the blocks."""
    _, store = read_result(path)
    content = memoryview(bytearray(store.file.read_bytes()))
    sums = {key: checksum(content[entry.begin : entry.end], 4096) for key, entry in store.entries.items()}
    rewritten(path, checksum_block=..., checksums=sums)


def swap_pages(path: Path, a: int, b: int) -> None:
    """Two pages of the large tensor change places."""
    file, content, where = content_of(path)
    values = content[where]
    pages = [values[begin : begin + PAGE] for begin in range(0, len(values), PAGE)]
    assert pages[a] != pages[b]
    pages[a], pages[b] = pages[b], pages[a]
    content[where] = b"".join(pages)
    file.write_bytes(content)


def flip(path: Path, position: int) -> None:
    file, content, where = content_of(path)
    content[range(len(content))[where][position]] ^= 16
    file.write_bytes(content)


# The first column: blocks of 4 KiB, as earlier versions computed it.
@pytest.mark.parametrize(
    "size, earlier, new",
    [
        (0, "e4a6a0577479b2b4", "e4a6a0577479b2b4"),
        (65536, "495908c9824b8e1e", "495908c9824b8e1e"),
        (65537, "eb8c8e6785439083", "7d241a73fb801a3b"),
        (100_003, "087bb92dac6d4480", "a41cdf00cd8b363e"),
        (131072, "705b2911ae7d3941", "b28234b3abaa45c6"),
    ],
)
def test_checksums_stay_what_they_are(size, earlier, new):
    data = memoryview(bytearray(i * 167 // 256 % 251 for i in range(size)))
    assert (checksum(data, 4096), checksum(data)) == (earlier, new)


@pytest.mark.parametrize("before", [False, True])
def test_damage_in_a_large_tensor_is_found(tmp_path, before):
    models = large_models()
    write(tmp_path, models)
    if before:
        as_before(tmp_path)
    assert read_manifest(tmp_path)["store"].get("checksum_block") == (None if before else 16384)
    assert same_state(models, load(tmp_path, verify=True))
    file, intact, _ = content_of(tmp_path)
    for position in (0, PAGE, 70_001, -1):
        flip(tmp_path, position)
        with pytest.raises(ResultsError, match=f"{file.name}: the checksum of tensor .* is not"):
            load(tmp_path)
        file.write_bytes(intact)
    for a, b in ((0, 4), (3, 4), (2, 35), (7, 8)):
        swap_pages(tmp_path, a, b)
        with pytest.raises(ResultsError, match=f"{file.name}: the checksum of tensor .* is not"):
            load(tmp_path)
        file.write_bytes(intact)
    assert same_state(models, load(tmp_path))


def test_pages_within_one_block_are_found_by_sha256_alone(tmp_path):
    """In a result of an earlier version, whose blocks are pages, the checksum finds them as well."""
    models = large_models()
    write(tmp_path / "new", models)
    write(tmp_path / "before", models)
    as_before(tmp_path / "before")
    for path in (tmp_path / "new", tmp_path / "before"):
        swap_pages(path, 4, 7)
    assert not same_state(models, load(tmp_path / "new"))
    with pytest.raises(ResultsError, match="its sha256 is not the one in the manifest"):
        load(tmp_path / "new", verify=True)
    assert any(check.status == FAIL for check in verify(tmp_path / "new"))
    with pytest.raises(ResultsError, match="the checksum of tensor .* is not"):
        load(tmp_path / "before")


def test_a_result_of_an_earlier_version_can_be_updated(tmp_path):
    """A store that does not change keeps its checksums; a new store has new ones."""
    models = large_models()
    write(tmp_path, models)
    as_before(tmp_path)
    (tmp_path / "weights" / "a_x.pt").unlink()
    assert len(repair(tmp_path)) == 1
    update_run(tmp_path, {"history": []})
    assert "checksum_block" not in write(tmp_path, models)["store"]
    assert [check for check in verify(tmp_path) if check.status == FAIL] == []
    with torch.no_grad():
        models["a_x"].conv2.weight += 1
    assert write(tmp_path, models)["store"]["checksum_block"] == 16384
    assert same_state(models, load(tmp_path))


@pytest.mark.parametrize("block", [0, 8, 8192, 32768, -4096, 10**30, 4096.0, "4096", None, True, [4096], {}])
def test_a_block_of_another_size_is_refused(tmp_path, block):
    write(tmp_path, large_models())
    rewritten(tmp_path, checksum_block=block)
    with pytest.raises(ResultsError, match="store: checksum_block: got .*; allowed: 4096, 16384$") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_block_that_is_not_that_of_the_checksums_is_damage(tmp_path):
    models = large_models()
    write(tmp_path, models)
    for block in (4096, ...):
        rewritten(tmp_path, checksum_block=block)
        with pytest.raises(ResultsError, match="the checksum of tensor .* is not"):
            load(tmp_path)
    as_before(tmp_path)
    rewritten(tmp_path, checksum_block=4096)  # what it means without
    assert same_state(models, load(tmp_path))
