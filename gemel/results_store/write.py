"""Writing a results folder: every distinct tensor once, and a manifest that says which model uses which.

    merged-<sha>.safetensors   the store; keys are named by content, one key per tensor object
    weights/<task>.pt          full state dict of every task, plain PyTorch, adapters, scales and biases folded in
    workload_stats.json        memory saved over time
    in_flight.pt               the round that is not decided yet, while a run lasts
    merged.json                the manifest, replaced last: a folder without it is not a result

Two state-dict entries with the same store key are one tensor in memory: this is the only record of what is shared.
A commit writes the store under its new name; then temporaries of all other files, the new manifest last; then renames
them, the manifest last; then removes the files of the old result. If the process is killed before the last rename, the
folder holds the old result, though some .pt files may already be those of the new one: `repair` rebuilds them from the
store.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gemel.forward.modes import Models
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
    adapted_layers,
    assert_valid,
    has_results,
    json_bytes,
    read_manifest,
    read_result,
    seal,
)
from gemel.results_store.points import points_of
from gemel.results_store.precision import plain_tensors, weights_dtype
from gemel.results_store.schema import NORMALISATION
from gemel.results_store.tensors import (
    BLOCK_BYTES,
    Store,
    as_loaded,
    checksum,
    name_by_content,
    open_store,
    raw_bytes,
    read_tensors,
    store_chunks,
)

# ---- writing a result -----------------------------------------------------------------------------------


def write_results(
    path: str | Path, models: Models, manifest: dict[str, Any], statistics: dict[str, Any]
) -> dict[str, Any]:
    """Writes a complete result and returns the manifest as written.

    manifest: tasks, shared_layers, memory, run, and precision where weights are not float32; the other parts are filled
    in. statistics: workload_stats.json.
    Until the last step, the replacement of merged.json, a reader of the folder sees the previous result. Files that
    would not change are not written again. Raises ResultsError, naming the file, if the operating system refuses a
    write: the folder then holds the previous result, or the new one if only the removal of old files failed.
    """
    path = Path(path)
    files.make_folder(path)
    files.make_folder(path / files.WEIGHTS)
    before = read_manifest(path) if has_results(path) else None
    if before is not None and (path / PENDING).exists():  # a commit was interrupted: some .pt files are not `before`'s
        repair(path)
        before = read_manifest(path)
    keys, tensors = name_by_content(models, weights_dtype(manifest))
    new = {"format": FORMAT, "normalisation": NORMALISATION, **manifest, "tensors": keys}
    new["store"], store_written = _put_store(path, keys, tensors, before)
    written = {new["store"]["file"]: store_written}
    staged: dict[Path, Path] = {}  # temporary -> the file that it becomes
    try:
        for task in keys:
            name = f"{files.WEIGHTS}/{task}.pt"
            carried = None
            if before is not None and before["tensors"].get(task) == keys[task]:
                carried = _carried(path, name, before)
            written[name] = carried or _stage(path, name, _pt_bytes(keys[task], tensors, task, manifest), staged)
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


def update_run(path: str | Path, run: dict[str, Any]) -> dict[str, Any]:
    """Replaces the `run` part of the manifest, atomically, and returns the manifest."""
    path = Path(path)
    manifest = seal({**read_manifest(path), "run": run})
    files.write(path / MANIFEST, [json_bytes(manifest)], path / "merged.json.run.tmp")  # not PENDING: no commit
    return manifest


def _put_store(path: Path, keys: dict, tensors: dict, before: dict | None) -> tuple[dict, Written]:
    """Writes the store, unless the folder holds it already; (its entry in the manifest, what was written)."""
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
    """The manifest's record of a file that need not be written again; None if it is missing or of another size."""
    size = before["file_bytes"][name]
    return Written(before["files"][name], size) if size_of(path / name) == size else None


def _is(file: Path, digest: str) -> bool:
    return size_of(file) is not None and sha256_of(file) == digest


def _pt_bytes(keys: Mapping[str, str], tensors: Mapping, task: str, manifest: Mapping) -> memoryview:
    """The task's state dict as torch.save writes it, with adapters, scales and biases folded in."""
    layers = adapted_layers(manifest["shared_layers"], task)
    buffer = io.BytesIO()
    torch.save(plain_tensors({name: as_loaded(key, tensors) for name, key in keys.items()}, layers, manifest), buffer)
    return buffer.getbuffer()


def _stage(path: Path, name: str, content: bytes | memoryview, staged: dict[Path, Path]) -> Written:
    temporary = path / (name + TEMPORARY)
    written = files.stage(temporary, [content])
    staged[temporary] = path / name
    return written


def _completed(manifest: dict, written: Mapping[str, Written], before: dict | None) -> dict:
    """The manifest with the parts that are known once all other files are staged, sealed."""
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
    """Renames all staged files, the manifest last.

    If a rename fails after others succeeded, the new manifest stays beside the old one under its temporary name, as the
    record of the files that were already renamed.
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
    """Removes files of the previous result that are not in this one, other stores, and temporaries of a killed run.

    Only under names that this package gives: other files that a user keeps in the folder stay.
    """
    old = set(stores(path)) - {manifest["store"]["file"]}
    if before is None or before["store"]["file"] != manifest["store"]["file"]:
        old.add(IN_FLIGHT)  # of a round that began from another store
    old |= {name for name, digest in manifest["stale"].items() if _is(path / name, digest)}
    for name in sorted({*old, *files.leftovers(path)}):
        files.remove(path / name)


def foreign_files(path: str | Path, tasks: Iterable[str]) -> list[str]:
    """Files that a result would overwrite although no run wrote them (a run writes the store first)."""
    path = Path(path)
    if has_results(path) or stores(path):
        return []
    names = [STATISTICS, IN_FLIGHT, *(f"{files.WEIGHTS}/{task}.pt" for task in tasks)]
    return [name for name in names if (path / name).exists()]


# ---- repair ---------------------------------------------------------------------------------------------


def repair(path: str | Path) -> list[str]:
    """Repairs an existing result at the start of a run; returns one line per file that was rebuilt or removed.

    Compares the sha256 of the store (the one file that cannot be rebuilt from others), rebuilds from it every .pt and
    statistics file whose sha256 is not the one in the manifest, and removes temporaries. Raises ResultsError naming the
    file if the manifest or the store is damaged, or if a file cannot be written.
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


def _rebuilt(manifest: dict, store: Store, name: str) -> bytes | memoryview:
    if name == STATISTICS:
        return json_bytes(statistics_of(manifest))
    task = name.removeprefix(f"{files.WEIGHTS}/").removesuffix(".pt")
    keys = manifest["tensors"][task]
    tensors = read_tensors(store, keys.values(), manifest["store"])
    return _pt_bytes(keys, tensors, task, manifest)


def statistics_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The content of workload_stats.json."""
    memory = manifest["memory"]
    return {
        "total_bytes": memory["unmerged_bytes"],
        "optimal_saved_bytes": memory["optimal_saved_bytes"],
        "history": manifest["run"].get("history", []),
        "points": points_of(manifest),
    }


def _replace_files(path: Path, manifest: dict, contents: Mapping[str, bytes | memoryview]) -> None:
    """Replaces files and, last, their digests and sizes in the manifest."""
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
