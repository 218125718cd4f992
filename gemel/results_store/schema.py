"""Types, ranges and patterns of a manifest: what each part must be by itself.

A results folder may come from anywhere, so nothing in its manifest is used before it has passed these checks. Every
name of a file must be one that `write_results` gives, so that no path from outside is ever opened. Whether the parts
agree with each other and with the store is checked in agreement.py. Written by hand, as a machine that only loads
results has no schema library, and a validator in Python takes many times as long (docs/architecture.md, "Libraries").
Each function yields one line per problem.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gemel.forward import STORE_TYPES, WEIGHT_TYPES
from gemel.results_store.files import STATISTICS, STORE_PATTERN, WEIGHTS_PATTERN
from gemel.results_store.tensors import KNOWN_BLOCK_BYTES
from gemel.workload import CLASSIFICATION, DETECTION, NAME_PATTERN

NORMALISATION = "private"  # normalisation layers are never shared
SHA256 = re.compile(r"[0-9a-f]{64}")
CHECKSUM = re.compile(r"[0-9a-f]{16}")
STORE_KEY = re.compile(r"[0-9a-f]{32}(\.[0-9]{1,9})?(\.scale)?")
CLASS_ID = re.compile(r"-?[0-9]{1,9}")
ADAPTER_KEYS = ("adapter_bytes", "residual_bytes")  # the second one in results of earlier versions


class Rule(NamedTuple):
    """What the value of a key must be."""

    fits: Callable[[Any], bool]
    allowed: str  # in words, for the message
    required: bool = True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300  # not NaN


def _is_accuracy(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_occurrences(value: object) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(map(_is_occurrence, value))


def _is_occurrence(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("task"), str) and isinstance(value.get("layer"), str)


def _matches(pattern: re.Pattern, value: object) -> bool:
    return isinstance(value, str) and bool(pattern.fullmatch(value))


def _or_null(fits: Callable[[Any], bool], allowed: str) -> Rule:
    """For a key that may also be null or missing."""
    return Rule(lambda value: value is None or fits(value), f"{allowed}, or null", required=False)


_ACCURACY = Rule(_is_accuracy, "a number in [0, 1]")
_MAYBE_ACCURACY = _or_null(_is_accuracy, "a number in [0, 1]")
_BYTES = Rule(_is_count, "a number of bytes")
_DICTIONARY = Rule(lambda value: isinstance(value, dict), "a dictionary")
_SHA256 = Rule(lambda value: _matches(SHA256, value), "64 hex digits")
_TRUE_OR_FALSE = Rule(lambda value: isinstance(value, bool), "true or false")

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
TASK = {
    "task": Rule(lambda value: value in (CLASSIFICATION, DETECTION), f"{CLASSIFICATION}, {DETECTION}"),
    "architecture": Rule(lambda value: value is None or isinstance(value, dict), "a dictionary or null"),
    "unmerged_acc": _ACCURACY,
    "measured_unmerged_acc": _ACCURACY,
    "target_acc": _ACCURACY,
    "merged_acc": _ACCURACY,
    "met": _TRUE_OR_FALSE,
    "test_acc": _MAYBE_ACCURACY,
    "unmerged_test_acc": _MAYBE_ACCURACY,
    "class_names": _or_null(_are_names, "a list of texts"),
    "frozen_normalisation": _or_null(lambda value: value in ("kept", "refitted"), "'kept', 'refitted'"),
    "architecture_note": _or_null(lambda value: isinstance(value, str), "a text"),
    "permuted": _TRUE_OR_FALSE._replace(required=False),  # whether its tensors are in the order of run.permutations
}
STORE = {
    "file": Rule(lambda value: _matches(STORE_PATTERN, value), "merged-<16 hex digits>.safetensors"),
    "bytes": _BYTES,
    "header_sha256": _SHA256,
    "checksum_block": Rule(
        lambda value: type(value) is int and value in KNOWN_BLOCK_BYTES,
        ", ".join(map(str, KNOWN_BLOCK_BYTES)),
        required=False,
    ),
    "checksums": _DICTIONARY,
}
GROUP = {
    "signature": Rule(lambda value: isinstance(value, str) and value != "", "a text"),
    "bytes": _BYTES,
    "occurrences": Rule(_are_occurrences, "two or more of {task, layer}"),
    "affine_bytes": Rule(lambda value: _is_count(value) and value > 0, "a number of bytes above 0", required=False),
}
MEMORY = dict.fromkeys(("unmerged_bytes", "merged_bytes", "saved_bytes", "optimal_saved_bytes"), _BYTES)
PRECISION = {
    "weights": Rule(lambda value: value in STORE_TYPES, ", ".join(STORE_TYPES)),
    "arithmetic": Rule(lambda value: value in WEIGHT_TYPES, ", ".join(WEIGHT_TYPES)),
    "device": Rule(lambda value: isinstance(value, str), "a kind of device"),
}
HISTORY = ("seconds", "round", "saved_bytes", "tasks_met")  # of an entry of run.history


def part_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Parts that are missing, or of another type than they must be."""
    for part, kind in PARTS.items():
        if part not in manifest:
            yield f"{part} is missing"
        elif type(manifest[part]) is not kind:
            yield f"{part}: got {short(manifest[part])}; allowed: a {kind.__name__}"


def entry_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong within each part; `part_problems` must have found nothing."""
    if manifest["normalisation"] != NORMALISATION:
        yield f"normalisation: got {short(manifest['normalisation'])}; allowed: {NORMALISATION!r}"
    if not manifest["tasks"]:
        yield "tasks: there is none"
    for name, task in manifest["tasks"].items():
        yield from _task_problems(name, task)
    yield from _tensor_problems(manifest)
    yield from _rule_problems("store", manifest["store"], STORE)
    yield from _checksum_problems(manifest["store"].get("checksums"))
    yield from _file_problems(manifest)
    for index, group in enumerate(manifest["shared_layers"]):
        yield from _group_problems(f"shared_layers[{index}]", group, manifest["tasks"])
    yield from _rule_problems("memory", manifest["memory"], MEMORY)
    if "precision" in manifest:
        yield from _rule_problems("precision", manifest["precision"], PRECISION)
    yield from _history_problems(manifest["run"].get("history", []))


def adapter_bytes_of(group: Mapping[str, Any]) -> int:
    """Bytes of the adapter that each occurrence of a shared layer has; 0 if it has none."""
    return next((group[key] for key in ADAPTER_KEYS if key in group), 0)


def private_bytes_of(group: Mapping[str, Any]) -> int:
    """Bytes that each occurrence of a shared layer has beside the shared ones: its adapter, scale and bias."""
    return adapter_bytes_of(group) + group.get("affine_bytes", 0)


def short(value: object) -> str:
    """A value for a message: its repr, cut after 80 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _rule_problems(where: str, record: object, rules: Mapping[str, Rule]) -> Iterator[str]:
    if not isinstance(record, dict):
        yield f"{where}: got {short(record)}; allowed: a dictionary"
        return
    for key, rule in rules.items():
        if key not in record:
            if rule.required:
                yield f"{where}: {key} is missing; allowed: {rule.allowed}"
        elif not rule.fits(record[key]):
            yield f"{where}: {key}: got {short(record[key])}; allowed: {rule.allowed}"


def _task_problems(name: str, task: object) -> Iterator[str]:
    if not NAME_PATTERN.fullmatch(name):
        yield f"tasks: got the name {short(name)}; allowed: letters, digits, '_' and '-'"
        return
    yield from _rule_problems(name, task, TASK)
    if isinstance(task, dict):
        yield from _per_class_problems(name, task.get("per_class"))


def _per_class_problems(name: str, classes: object) -> Iterator[str]:
    if classes is None:
        return
    found: Iterable[tuple[str, Any]] = classes.items() if isinstance(classes, dict) else [("", classes)]
    for class_id, measured in found:
        fits = CLASS_ID.fullmatch(class_id) and isinstance(measured, dict) and set(measured) == {"unmerged", "merged"}
        fits = fits and all(isinstance(part, dict) and _are_finite(part.values()) for part in measured.values())
        if not fits or set(measured["unmerged"]) != set(measured["merged"]):
            allowed = 'class id -> {"unmerged": numbers by name, "merged": the same}, or null'
            yield f"{name}: per_class: {short(class_id)}: got {short(measured)}; allowed: {allowed}"


def _are_finite(values: Iterable) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _tensor_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    if set(manifest["tensors"]) != set(manifest["tasks"]):
        got, tasks = short(sorted(manifest["tensors"])), short(sorted(manifest["tasks"]))
        yield f"tensors: got those of {got}; allowed: those of {tasks}"
    known = manifest["store"].get("checksums")
    known = known if isinstance(known, dict) else {}
    for task, keys in manifest["tensors"].items():
        if not isinstance(keys, dict) or not keys:
            yield f"tensors: {short(task)}: got {short(keys)}; allowed: a dictionary of keys of the store"
            continue
        for name, key in keys.items():
            if not isinstance(key, str) or key not in known:
                yield f"tensors: {short(task)}: {short(name)}: got {short(key)}; allowed: a key of the store"


def _checksum_problems(checksums: object) -> Iterator[str]:
    """Of a dictionary; anything else is reported by the rules of the store."""
    if not isinstance(checksums, dict):
        return
    if _all_match(STORE_KEY, checksums) and _all_match(CHECKSUM, checksums.values()):
        return
    for key, checksum in checksums.items():
        if not STORE_KEY.fullmatch(key) or not _matches(CHECKSUM, checksum):
            yield f"store: checksums: got {short(key)}: {short(checksum)}; allowed: a key of the store: 16 hex digits"


def _all_match(pattern: re.Pattern, values: Collection) -> bool:
    """`_matches` for each, several times as fast."""
    return set(map(type, values)) <= {str} and all(map(pattern.fullmatch, values))


def _file_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """`files` and `file_bytes` name exactly the store, the statistics and one file per task."""
    expected = {STATISTICS, *(f"weights/{name}.pt" for name in manifest["tasks"])}
    if isinstance(manifest["store"].get("file"), str):
        expected.add(manifest["store"]["file"])
    for part, rule in (("files", _SHA256), ("file_bytes", _BYTES)):
        for name in sorted(expected ^ set(manifest[part])):
            yield f"{part}: {short(name)} {'is missing' if name in expected else 'is not a file of a result'}"
        for name, value in manifest[part].items():
            if not rule.fits(value):
                yield f"{part}: {short(name)}: got {short(value)}; allowed: {rule.allowed}"
    for name, digest in manifest["stale"].items():
        if not WEIGHTS_PATTERN.fullmatch(name) or not _matches(SHA256, digest):
            yield f"stale: got {short(name)}: {short(digest)}; allowed: weights/<task>.pt: 64 hex digits"


def _group_problems(where: str, group: object, tasks: Mapping[str, Any]) -> Iterator[str]:
    problems = list(_rule_problems(where, group, GROUP))
    yield from problems
    if problems or not isinstance(group, dict):
        return
    found = {key: group[key] for key in ("rank", *ADAPTER_KEYS) if key in group}
    if found and ("rank" not in found or len(found) != 2 or not all(map(_is_count, found.values()))):
        yield f"{where}: got {short(found)}; allowed: rank and adapter_bytes as whole numbers, or neither of them"
    names = [occurrence["task"] for occurrence in group["occurrences"]]
    if unknown := sorted(set(names) - set(tasks)):
        yield f"{where}: there is no task {short(unknown[0])}"
    if len(set(names)) != len(names):
        yield f"{where}: a task occurs twice"


def _history_problems(history: object) -> Iterator[str]:
    if not isinstance(history, list):
        yield f"run: history: got {short(history)}; allowed: a list"
        return
    for entry in history:
        if not isinstance(entry, dict) or not all(_is_number(entry.get(key)) and entry[key] >= 0 for key in HISTORY):
            yield f"run: history: got {short(entry)}; allowed: {{{', '.join(HISTORY)}}}, all numbers from 0 on"
