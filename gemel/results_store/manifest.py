"""The manifest, merged.json: sealed when it is written, and believed only after everything in it was checked.

A results folder may come from anywhere. So no name in it is used as a path unless it is one that we give, every number
is checked for type and range, and the parts must agree with each other: what is shared with which tensors are shared,
the bytes with the store's header, `met` with the accuracies.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from gemel.results_store.agreement import store_problems
from gemel.results_store.files import MANIFEST, STATISTICS, STORE_PATTERN, WEIGHTS_PATTERN, ResultsError, naming
from gemel.results_store.tensors import KNOWN_BLOCK_BYTES, Store, checksum_block, open_store
from gemel.workload import CLASSIFICATION, DETECTION, NAME_PATTERN

FORMAT = 1
NORMALISATION = "private"  # normalisation layers are never shared
SHA256 = re.compile(r"[0-9a-f]{64}")
CHECKSUM = re.compile(r"[0-9a-f]{16}")
STORE_KEY = re.compile(r"[0-9a-f]{32}(\.[0-9]{1,9})?")
CLASS_ID = re.compile(r"-?[0-9]{1,9}")
SHOWN = 3  # problems in one message
PARTS = {
    "format": int,
    "normalisation": str,
    "tasks": dict,
    "shared_layers": list,
    "tensors": dict,
    "store": dict,
    "files": dict,
    "file_bytes": dict,
    "memory": dict,
    "run": dict,
    "stale": dict,
    "sha256": str,
}
MEMORY = ("unmerged_bytes", "merged_bytes", "saved_bytes", "optimal_saved_bytes")


# ---- writing --------------------------------------------------------------------------------------------


def seal(manifest: Mapping) -> dict:
    """The manifest as it comes back from JSON, with the sha256 of all its other parts.

    Raises ResultsError if a value cannot be written (no JSON type, or NaN and infinity, which JSON has not).
    """
    try:
        plain = json.loads(
            json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, allow_nan=False)
        )
    except (TypeError, ValueError) as error:
        raise ResultsError(f"{MANIFEST}: cannot be written: {error}") from error
    return {**plain, "sha256": digest_of(plain)}


def digest_of(manifest: Mapping) -> str:
    """sha256 over the content: how the file is laid out, or the order of keys, does not matter."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def json_bytes(value: object) -> bytes:
    """A JSON file as people can read it."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def assert_valid(manifest: dict, store: Store) -> None:
    """What we are about to write would be accepted by whoever reads it."""
    problems = [*_problems(manifest)] or [*store_problems(manifest, store)]
    assert not problems, f"{MANIFEST} would be invalid: {'; '.join(problems[:SHOWN])}"


# ---- reading --------------------------------------------------------------------------------------------


def has_results(path: str | Path) -> bool:
    """Whether the folder holds a result, that is, a manifest."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path, name: str = MANIFEST) -> dict:
    """The manifest of a results folder, checked in itself (`read_result` also checks it against the store).

    Raises ResultsError, one line that names the file, if there is none or anything in it is wrong.
    """
    file = Path(path) / name
    if not file.exists():
        raise ResultsError(f"{file}: not found, so this folder holds no result")
    with naming(file, "read"):
        content = file.read_bytes()
    try:
        manifest = json.loads(content, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{file}: cannot be read: {str(error)[:200]}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ResultsError(f"{file}: format: got {_short(got)}; allowed: {FORMAT}")
    _refuse(file, _problems(manifest))
    return manifest


def read_result(path: str | Path) -> tuple[dict, Store]:
    """The manifest and the opened store, which agree; the store's tensors have not been touched yet.

    Raises ResultsError, one line that names the file, if the folder holds no valid result.
    """
    manifest = read_manifest(path)
    store = open_store(Path(path) / manifest["store"]["file"])
    if store.bytes != manifest["store"]["bytes"]:
        got = f"{store.bytes} bytes, the manifest says {manifest['store']['bytes']}"
        raise ResultsError(f"{store.file}: got {got}: the file is damaged or truncated")
    if store.header_sha256 != manifest["store"]["header_sha256"]:
        raise ResultsError(f"{store.file}: its header has not the sha256 in the manifest: the file is damaged")
    _refuse(Path(path) / MANIFEST, store_problems(manifest, store))
    return manifest, store


def adapted_layers(shared_layers: Iterable[Mapping], task: str) -> dict[str, int]:
    """The task's layers that are shared at a price -> the rank of their residuals."""
    groups = (group for group in shared_layers if group.get("rank"))
    return {o["layer"]: group["rank"] for group in groups for o in group["occurrences"] if o["task"] == task}


def _without_repeats(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key is repeated among {_short(list(found))}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _refuse(file: Path, problems: Iterator[str]) -> None:
    found = list(problems)
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ResultsError(f"{file}: {'; '.join(found[:SHOWN])}{more}")


# ---- what can be wrong ----------------------------------------------------------------------------------
# Each yields lines; a later one is asked only if the earlier ones found nothing, and may rely on what they checked.


def _problems(manifest: dict) -> Iterator[str]:
    for stage in (_part_problems, _seal_problems, _entry_problems, _agreement_problems):
        found = list(stage(manifest))
        if found:
            yield from found
            return


def _part_problems(manifest: dict) -> Iterator[str]:
    for part, kind in PARTS.items():
        if part not in manifest:
            yield f"{part} is missing"
        elif type(manifest[part]) is not kind:
            yield f"{part}: got {_short(manifest[part])}; allowed: a {kind.__name__}"


def _seal_problems(manifest: dict) -> Iterator[str]:
    try:
        digest = digest_of(manifest)
    except (ValueError, RecursionError) as error:
        yield f"cannot be used: {str(error)[:200]}"
    else:
        if manifest["sha256"] != digest:
            yield "sha256: is not that of the content: the file was changed by hand or is damaged"


def _entry_problems(manifest: dict) -> Iterator[str]:
    if manifest["normalisation"] != NORMALISATION:
        yield f"normalisation: got {_short(manifest['normalisation'])}; allowed: {NORMALISATION!r}"
    if not manifest["tasks"]:
        yield "tasks: there is none"
    for name, task in manifest["tasks"].items():
        yield from _task_problems(name, task)
    yield from _tensor_problems(manifest)
    yield from _store_entry_problems(manifest["store"])
    yield from _file_problems(manifest)
    for index, group in enumerate(manifest["shared_layers"]):
        yield from _group_problems(f"shared_layers[{index}]", group, manifest["tasks"])
    for key in MEMORY:
        if not _is_count(manifest["memory"].get(key)):
            yield f"memory: {key}: got {_short(manifest['memory'].get(key))}; allowed: a number of bytes"
    yield from _history_problems(manifest["run"].get("history", []))


def _task_problems(name: str, task: object) -> Iterator[str]:
    if not NAME_PATTERN.fullmatch(name):
        yield f"tasks: got the name {_short(name)}; allowed: letters, digits, '_' and '-'"
        return
    if not isinstance(task, dict):
        yield f"{name}: got {_short(task)}; allowed: a dictionary"
        return
    if task.get("task") not in (CLASSIFICATION, DETECTION):
        yield f"{name}: task: got {_short(task.get('task'))}; allowed: {CLASSIFICATION}, {DETECTION}"
    if "architecture" not in task or not isinstance(task["architecture"], dict | None):
        yield f"{name}: architecture: got {_short(task.get('architecture'))}; allowed: a dictionary or null"
    for key in ("unmerged_acc", "measured_unmerged_acc", "target_acc", "merged_acc"):
        if not _is_accuracy(task.get(key)):
            yield f"{name}: {key}: got {_short(task.get(key))}; allowed: a number in [0, 1]"
    for key in ("test_acc", "unmerged_test_acc"):
        if task.get(key) is not None and not _is_accuracy(task[key]):
            yield f"{name}: {key}: got {_short(task[key])}; allowed: a number in [0, 1], or null"
    if not _are_names(task.get("class_names")):  # results of before have none
        yield f"{name}: class_names: got {_short(task['class_names'])}; allowed: a list of texts, or null"
    if task.get("frozen_normalisation") not in (None, "kept", "refitted"):
        got = _short(task["frozen_normalisation"])
        yield f"{name}: frozen_normalisation: got {got}; allowed: 'kept', 'refitted' or null"
    yield from _per_class_problems(name, task.get("per_class"))
    if not isinstance(task.get("met"), bool):
        yield f"{name}: met: got {_short(task.get('met'))}; allowed: true or false"


def _per_class_problems(name: str, classes: object) -> Iterator[str]:
    if classes is None:
        return
    for class_id, measured in classes.items() if isinstance(classes, dict) else [("", classes)]:
        fits = CLASS_ID.fullmatch(class_id) and isinstance(measured, dict) and set(measured) == {"unmerged", "merged"}
        fits = fits and all(isinstance(part, dict) and _are_numbers(part.values()) for part in measured.values())
        if not fits or set(measured["unmerged"]) != set(measured["merged"]):
            allowed = 'class id -> {"unmerged": numbers by name, "merged": the same}, or null'
            yield f"{name}: per_class: {_short(class_id)}: got {_short(measured)}; allowed: {allowed}"


def _are_numbers(values: Iterable) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _tensor_problems(manifest: dict) -> Iterator[str]:
    if set(manifest["tensors"]) != set(manifest["tasks"]):
        got, tasks = _short(sorted(manifest["tensors"])), _short(sorted(manifest["tasks"]))
        yield f"tensors: got those of {got}; allowed: those of {tasks}"
    known = manifest["store"].get("checksums")
    known = known if isinstance(known, dict) else {}
    for task, keys in manifest["tensors"].items():
        if not isinstance(keys, dict) or not keys:
            yield f"tensors: {_short(task)}: got {_short(keys)}; allowed: a dictionary of keys of the store"
            continue
        for name, key in keys.items():
            if not isinstance(key, str) or key not in known:
                yield f"tensors: {_short(task)}: {_short(name)}: got {_short(key)}; allowed: a key of the store"


def _store_entry_problems(store: dict) -> Iterator[str]:
    if not isinstance(store.get("file"), str) or not STORE_PATTERN.fullmatch(store["file"]):
        yield f"store: file: got {_short(store.get('file'))}; allowed: merged-<16 hex digits>.safetensors"
    if not _is_count(store.get("bytes")):
        yield f"store: bytes: got {_short(store.get('bytes'))}; allowed: a number of bytes"
    if not _matches(SHA256, store.get("header_sha256")):
        yield f"store: header_sha256: got {_short(store.get('header_sha256'))}; allowed: 64 hex digits"
    block = checksum_block(store)
    if type(block) is not int or block not in KNOWN_BLOCK_BYTES:
        yield f"store: checksum_block: got {_short(block)}; allowed: {', '.join(map(str, KNOWN_BLOCK_BYTES))}"
    checksums = store.get("checksums")
    if not isinstance(checksums, dict):
        yield f"store: checksums: got {_short(checksums)}; allowed: a dictionary"
        return
    if _all_match(STORE_KEY, checksums) and _all_match(CHECKSUM, checksums.values()):
        return
    for key, checksum in checksums.items():
        if not STORE_KEY.fullmatch(key) or not _matches(CHECKSUM, checksum):
            yield f"store: checksums: got {_short(key)}: {_short(checksum)}; allowed: a key of the store: 16 hex digits"


def _file_problems(manifest: dict) -> Iterator[str]:
    """`files` names exactly the store, the statistics and one file per task: no path from outside ever gets in."""
    expected = {STATISTICS, *(f"weights/{name}.pt" for name in manifest["tasks"])}
    if isinstance(manifest["store"].get("file"), str):
        expected.add(manifest["store"]["file"])
    for part in ("files", "file_bytes"):
        for name in sorted(expected ^ set(manifest[part])):
            yield f"{part}: {_short(name)} {'is missing' if name in expected else 'is none of ours'}"
    for name, digest in manifest["files"].items():
        if not _matches(SHA256, digest):
            yield f"files: {_short(name)}: got {_short(digest)}; allowed: 64 hex digits"
    for name, size in manifest["file_bytes"].items():
        if not _is_count(size):
            yield f"file_bytes: {_short(name)}: got {_short(size)}; allowed: a number of bytes"
    for name, digest in manifest["stale"].items():
        if not WEIGHTS_PATTERN.fullmatch(name) or not _matches(SHA256, digest):
            yield f"stale: got {_short(name)}: {_short(digest)}; allowed: weights/<task>.pt: 64 hex digits"


def _group_problems(where: str, group: object, tasks: Mapping) -> Iterator[str]:
    if not isinstance(group, dict):
        yield f"{where}: got {_short(group)}; allowed: a dictionary"
        return
    if not isinstance(group.get("signature"), str) or not group["signature"]:
        yield f"{where}: signature: got {_short(group.get('signature'))}; allowed: a text"
    if not _is_count(group.get("bytes")):
        yield f"{where}: bytes: got {_short(group.get('bytes'))}; allowed: a number of bytes"
    if {"rank", "adapter_bytes"} & set(group) and not all(_is_count(group.get(k)) for k in ("rank", "adapter_bytes")):
        got = _short({key: group.get(key) for key in ("rank", "adapter_bytes")})
        yield f"{where}: got {got}; allowed: whole numbers, or neither of them"
    occurrences = group.get("occurrences")
    if not isinstance(occurrences, list) or len(occurrences) < 2 or not all(map(_is_occurrence, occurrences)):
        yield f"{where}: occurrences: got {_short(occurrences)}; allowed: two or more of {{task, layer}}"
        return
    names = [occurrence["task"] for occurrence in occurrences]
    if unknown := sorted(set(names) - set(tasks)):
        yield f"{where}: there is no task {_short(unknown[0])}"
    if len(set(names)) != len(names):
        yield f"{where}: a task occurs twice"


def _history_problems(history: object) -> Iterator[str]:
    numbers = ("seconds", "round", "saved_bytes", "tasks_met")
    if not isinstance(history, list):
        yield f"run: history: got {_short(history)}; allowed: a list"
        return
    for entry in history:
        if not isinstance(entry, dict) or not all(_is_number(entry.get(key)) and entry[key] >= 0 for key in numbers):
            yield f"run: history: got {_short(entry)}; allowed: {{{', '.join(numbers)}}}, all numbers from 0 on"


def _agreement_problems(manifest: dict) -> Iterator[str]:
    for name, task in manifest["tasks"].items():
        if task["met"] != (task["merged_acc"] >= task["target_acc"]):
            yield f"{name}: met: got {task['met']}, but merged_acc {task['merged_acc']}, target {task['target_acc']}"
        if not 0 < task["target_acc"] <= task["unmerged_acc"]:
            yield f"{name}: target_acc: got {task['target_acc']}; allowed: up to unmerged_acc {task['unmerged_acc']}"
    used = {key for keys in manifest["tensors"].values() for key in keys.values()}
    if used != set(manifest["store"]["checksums"]):
        yield "store: checksums: are not of the tensors that the tasks use"
    if manifest["file_bytes"][manifest["store"]["file"]] != manifest["store"]["bytes"]:
        yield "store: bytes: differ from those in file_bytes"
    memory = manifest["memory"]
    saved = sum(g["bytes"] * (len(g["occurrences"]) - 1) for g in manifest["shared_layers"])
    saved -= sum(g.get("adapter_bytes", 0) * len(g["occurrences"]) for g in manifest["shared_layers"])
    if not memory["saved_bytes"] == memory["unmerged_bytes"] - memory["merged_bytes"] == saved:
        yield f"memory: saved_bytes: got {memory['saved_bytes']}, but the shared layers save {saved}"
    if memory["saved_bytes"] > memory["optimal_saved_bytes"]:
        yield f"memory: saved_bytes: got {memory['saved_bytes']}, more than optimal_saved_bytes"


# ---- values ---------------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300  # not NaN


def _is_accuracy(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _are_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_occurrence(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("task"), str) and isinstance(value.get("layer"), str)


def _matches(pattern: re.Pattern, value: object) -> bool:
    return isinstance(value, str) and bool(pattern.fullmatch(value))


def _all_match(pattern: re.Pattern, values: Collection) -> bool:
    """Several times as fast as asking for each."""
    return set(map(type, values)) <= {str} and all(map(pattern.fullmatch, values))


def _short(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
