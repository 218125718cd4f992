"""The results folder: every distinct tensor once, a manifest that says which model uses which, and loading it back.

    merged-<sha>.safetensors   the store; keys are named by content, one key per tensor object
    weights/<task>.pt          full state_dict of every task, plain PyTorch, residuals folded in
    workload_stats.json        memory saved over time
    in_flight.pt               a round that is not decided yet, while a run is going on
    merged.json                the manifest, replaced last: a folder without it is not a result

Two state-dict entries with the same store key are one tensor in memory: that alone is the record of what is shared.
The order of a commit: the store, under its new name; temporaries of everything else, the new manifest last; these are
renamed, the manifest last; what the old manifest named is collected. Killed before the last rename, the folder holds
the old result, though some .pt files may be the new one's already: `repair` rebuilds them from the store.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from gemel.results_store import files
from gemel.results_store.files import (
    IN_FLIGHT,
    MANIFEST,
    PENDING,
    STATISTICS,
    TEMPORARY,
    WEIGHTS_PATTERN,
    ResultsError,
    Written,
    sha256_of,
    size_of,
    stores,
)
from gemel.results_store.manifest import (
    FORMAT,
    NORMALISATION,
    adapted_layers,
    assert_valid,
    has_results,
    json_bytes,
    read_manifest,
    read_result,
    seal,
)
from gemel.results_store.tensors import (
    BLOCK_BYTES,
    checksum,
    name_by_content,
    open_store,
    raw_bytes,
    read_tensors,
    store_chunks,
)
from gemel.sharing.adapters import plain_state

# ---- writing a result -----------------------------------------------------------------------------------


def write_results(path: str | Path, models: Mapping[str, nn.Module], manifest: dict, statistics: dict) -> dict:
    """Writes a complete result and returns the manifest as written (README, "Results", says what is filled in).

    Until the last step, the replacement of merged.json, a reader of the folder sees the result that was there before.
    What is the same as there is not written again. Raises ResultsError, naming the file, when the system refuses a
    write: the folder then holds the result of before, or, if only removing old files failed, the new one.
    """
    path = Path(path)
    files.make_folder(path)
    files.make_folder(path / files.WEIGHTS)
    before = read_manifest(path) if has_results(path) else None
    if before is not None and (path / PENDING).exists():  # a commit was cut short: the .pt files are not what it says
        repair(path)
        before = read_manifest(path)
    keys, tensors = name_by_content(models)
    new = {"format": FORMAT, "normalisation": NORMALISATION, **manifest, "tensors": keys}
    new["store"], store_written = _put_store(path, keys, tensors, before)
    written = {new["store"]["file"]: store_written}
    staged: dict[Path, Path] = {}  # temporary -> the file that it becomes
    try:
        for task in keys:
            name = f"{files.WEIGHTS}/{task}.pt"
            unchanged = before is not None and before["tensors"].get(task) == keys[task]
            written[name] = _carried(path, name, before) if unchanged else None
            if written[name] is None:
                layers = adapted_layers(manifest["shared_layers"], task)
                written[name] = _stage(path, name, _pt_bytes(keys[task], tensors, layers), staged)
        written[STATISTICS] = _stage(path, STATISTICS, json_bytes(statistics), staged)
        new = _completed(new, written, before)
        assert_valid(new, open_store(path / new["store"]["file"]))
        files.stage(path / PENDING, [json_bytes(new)])
    except BaseException:
        files.discard(*staged)
        raise
    _switch(path, staged)
    _collect(path, before, new)
    return new


def update_run(path: str | Path, run: dict) -> dict:
    """Replaces the `run` part of the manifest, atomically, and returns the manifest."""
    path = Path(path)
    manifest = seal({**read_manifest(path), "run": run})
    files.write(path / MANIFEST, [json_bytes(manifest)], path / "merged.json.run.tmp")  # not PENDING: no commit
    return manifest


def _put_store(path: Path, keys: dict, tensors: dict, before: dict | None) -> tuple[dict, Written]:
    """Writes the store, unless it is the one that is there; (its entry in the manifest, what the file holds)."""
    if before is not None and before["tensors"] == keys:
        carried = _carried(path, before["store"]["file"], before)
        if carried is not None:
            return before["store"], carried
    temporary = path / "merged.safetensors.tmp"
    written = files.stage(temporary, store_chunks(tensors))
    file = path / f"merged-{written.sha256[:16]}.safetensors"
    try:
        files.commit(temporary, file)
    except BaseException:
        files.discard(temporary)
        raise
    files.sync_folder(path)
    checksums = {key: checksum(raw_bytes(tensor)) for key, tensor in tensors.items()}
    record = {"file": file.name, "bytes": written.bytes, "header_sha256": open_store(file).header_sha256}
    return {**record, "checksum_block": BLOCK_BYTES, "checksums": checksums}, written


def _carried(path: Path, name: str, before: dict) -> Written | None:
    """What the manifest says of a file that need not be written again; None if it is not there in its full size."""
    size = before["file_bytes"][name]
    return Written(before["files"][name], size) if size_of(path / name) == size else None


def _is(file: Path, digest: str) -> bool:
    return size_of(file) is not None and sha256_of(file) == digest


def _pt_bytes(keys: Mapping[str, str], tensors: Mapping, layers: Iterable[str]) -> memoryview:
    """The state dict of one task as torch.save writes it; the residuals of these layers are in their weights."""
    buffer = io.BytesIO()
    torch.save(plain_state({name: tensors[key] for name, key in keys.items()}, layers), buffer)
    return buffer.getbuffer()


def _stage(path: Path, name: str, content: bytes | memoryview, staged: dict[Path, Path]) -> Written:
    temporary = path / (name + TEMPORARY)
    written = files.stage(temporary, [content])
    staged[temporary] = path / name
    return written


def _completed(manifest: dict, written: Mapping[str, Written], before: dict | None) -> dict:
    """With the parts that this module fills in."""
    old = {} if before is None else {**before["stale"], **before["files"]}
    return seal(
        {
            **manifest,
            "files": {name: entry.sha256 for name, entry in written.items()},
            "file_bytes": {name: entry.bytes for name, entry in written.items()},
            "stale": {n: digest for n, digest in old.items() if n not in written and WEIGHTS_PATTERN.fullmatch(n)},
        }
    )


def _switch(path: Path, staged: Mapping[Path, Path]) -> None:
    """Renames everything, the manifest last.

    When that fails half way, the new manifest stays beside the old one, under its temporary name: it is the record of
    what the files that were renamed already are.
    """
    try:
        for temporary, target in staged.items():
            files.commit(temporary, target)
        files.sync_folder(path / files.WEIGHTS)
        files.commit(path / PENDING, path / MANIFEST)
        files.sync_folder(path)
    except BaseException:
        nothing_renamed = all(temporary.exists() for temporary in staged)
        files.discard(*staged, *([path / PENDING] if nothing_renamed else []))
        raise


def _collect(path: Path, before: dict | None, manifest: dict) -> None:
    """Removes what the result of before named and this one does not, other stores, and temporaries of a killed run.

    Only names that are ours: whatever else a user keeps in the folder stays.
    """
    old = set(stores(path)) - {manifest["store"]["file"]}
    if before is None or before["store"]["file"] != manifest["store"]["file"]:
        old.add(IN_FLIGHT)  # of a round that began from another store
    old |= {name for name, digest in manifest["stale"].items() if _is(path / name, digest)}
    for name in sorted({*old, *files.leftovers(path)}):
        files.remove(path / name)


def foreign_files(path: str | Path, tasks: Iterable[str]) -> list[str]:
    """Files that a result would overwrite although no run of ours wrote them; ours write the store first."""
    path = Path(path)
    if has_results(path) or stores(path):
        return []
    names = [STATISTICS, IN_FLIGHT, *(f"{files.WEIGHTS}/{task}.pt" for task in tasks)]
    return [name for name in names if (path / name).exists()]


# ---- mending --------------------------------------------------------------------------------------------


def repair(path: str | Path) -> list[str]:
    """Makes an existing result whole again at the start of a run; returns one line per thing that was done.

    Checks the sha256 of the store (the one file that nothing else could replace), rebuilds from it every .pt and
    statistics file that is not what the manifest says, and removes temporaries. Raises ResultsError naming the file if
    the manifest or the store is damaged, or if something cannot be written.
    """
    path = Path(path)
    manifest, store = read_result(path)
    if sha256_of(store.file) != manifest["files"][store.file.name]:
        raise ResultsError(f"{store.file}: its sha256 is not the one in the manifest: the file is damaged")
    files.make_folder(path / files.WEIGHTS)
    done, differing = [], {}
    for name, digest in manifest["files"].items():
        if name == store.file.name or _is(path / name, digest):
            continue
        content = _rebuilt(manifest, store, name)
        if files.sha256_of_bytes(content) == digest:
            files.write(path / name, [content])
        else:  # another version of torch writes other bytes
            differing[name] = content
        done.append(f"{path / name}: rebuilt from the store")
    if differing:
        _replace_files(path, manifest, differing)
    for name in files.leftovers(path):
        files.remove(path / name)
        done.append(f"{path / name}: left by an interrupted run, removed")
    return done


def _rebuilt(manifest: dict, store, name: str) -> bytes | memoryview:
    if name == STATISTICS:
        return json_bytes(statistics_of(manifest))
    task = name.removeprefix(f"{files.WEIGHTS}/").removesuffix(".pt")
    keys = manifest["tensors"][task]
    tensors = read_tensors(store, keys.values(), manifest["store"])
    return _pt_bytes(keys, tensors, adapted_layers(manifest["shared_layers"], task))


def statistics_of(manifest: Mapping) -> dict:
    """What workload_stats.json holds."""
    memory = manifest["memory"]
    return {
        "total_bytes": memory["unmerged_bytes"],
        "optimal_saved_bytes": memory["optimal_saved_bytes"],
        "history": manifest["run"].get("history", []),
    }


def _replace_files(path: Path, manifest: dict, contents: Mapping[str, bytes | memoryview]) -> None:
    """Replaces files and, last, what the manifest says of them."""
    staged: dict[Path, Path] = {}
    try:
        written = {name: _stage(path, name, content, staged) for name, content in contents.items()}
        digests = {**manifest["files"], **{name: entry.sha256 for name, entry in written.items()}}
        sizes = {**manifest["file_bytes"], **{name: entry.bytes for name, entry in written.items()}}
        files.stage(path / PENDING, [json_bytes(seal({**manifest, "files": digests, "file_bytes": sizes}))])
    except BaseException:
        files.discard(*staged)
        raise
    _switch(path, staged)
