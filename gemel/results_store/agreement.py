"""Whether the parts of a manifest agree with each other, and with the store: tensors, bytes, sharing, adapters.

Asked of a manifest whose parts were each found valid (schema.py); of the store, its header alone is used. Each function
yields one line per problem.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from gemel.results_store.precision import precision_of
from gemel.results_store.schema import adapter_bytes_of, private_bytes_of
from gemel.results_store.tensors import SCALES, Entry, Store, entries_as_loaded, sizes_with_scales
from gemel.sharing import affine
from gemel.sharing.adapters import adapter_part, affine_part, is_sound, own_part


def agreement_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """In what the parts of a manifest contradict each other."""
    for name, task in manifest["tasks"].items():
        if task["met"] != (task["merged_acc"] >= task["target_acc"]):
            yield f"{name}: met: got {task['met']}, but merged_acc {task['merged_acc']}, target {task['target_acc']}"
        if not 0 < task["target_acc"] <= task["unmerged_acc"]:
            yield f"{name}: target_acc: got {task['target_acc']}; allowed: up to unmerged_acc {task['unmerged_acc']}"
    used = {key for keys in manifest["tensors"].values() for key in keys.values()}
    known = set(manifest["store"]["checksums"])
    if used | {key for key in known if key.removesuffix(SCALES) in used} != known or any(map(_is_scales, used)):
        yield "store: checksums: are not of the tensors that the tasks use"
    if manifest["file_bytes"][manifest["store"]["file"]] != manifest["store"]["bytes"]:
        yield "store: bytes: differ from those in file_bytes"
    memory = manifest["memory"]
    saved = sum(g["bytes"] * (len(g["occurrences"]) - 1) for g in manifest["shared_layers"]) - _all_private(manifest)
    if not memory["saved_bytes"] == memory["unmerged_bytes"] - memory["merged_bytes"] == saved:
        yield f"memory: saved_bytes: got {memory['saved_bytes']}, but the shared layers save {saved}"
    if memory["saved_bytes"] > memory["optimal_saved_bytes"]:
        yield f"memory: saved_bytes: got {memory['saved_bytes']}, more than optimal_saved_bytes"


def store_problems(manifest: Mapping[str, Any], store: Store) -> Iterator[str]:
    """In what a manifest contradicts the store."""
    if store.entries.keys() != manifest["store"]["checksums"].keys():
        yield f"store: its tensors are not those of {store.file.name}"
        return
    if problems := list(_scale_problems(manifest, store.entries)):
        yield from problems
        return
    sizes, entries = sizes_with_scales(store.entries), entries_as_loaded(store.entries)
    merged = sum(sizes.values())
    unmerged = sum(sum(map(sizes.__getitem__, set(keys.values()))) for keys in manifest["tensors"].values())
    unmerged -= _all_private(manifest)
    for key, found in (("merged_bytes", merged), ("unmerged_bytes", unmerged)):
        if manifest["memory"][key] != found:
            yield f"memory: {key}: got {manifest['memory'][key]}, but the store's tensors make {found}"
    yield from _sharing_problems(manifest, sizes)
    yield from _adapter_problems(manifest, entries)
    yield from _affine_problems(manifest, entries)


def _is_scales(key: str) -> bool:
    return key.endswith(SCALES)


def _scale_problems(manifest: Mapping[str, Any], entries: Mapping[str, Entry]) -> Iterator[str]:
    """Scales are one float32 number for each row of an int8 tensor, and are there in a store of int8 alone."""
    for key in filter(_is_scales, entries):
        scale, weight = entries[key], entries.get(key.removesuffix(SCALES))
        if weight is None or weight.dtype != torch.int8 or not weight.shape:
            yield f"store: {key} are scales of no tensor in int8"
        elif (scale.dtype, scale.shape) != (torch.float32, weight.shape[:1]):
            yield f"store: {key}: got {scale.dtype} {list(scale.shape)}; allowed: float32 {list(weight.shape[:1])}"
        elif precision_of(manifest)["weights"] != "int8":
            yield f"store: {key}: got scales in a store of {precision_of(manifest)['weights']}; allowed: of int8 alone"


def _all_private(manifest: Mapping[str, Any]) -> int:
    """Bytes of the adapters, scales and biases of all occurrences."""
    return sum(private_bytes_of(group) * len(group["occurrences"]) for group in manifest["shared_layers"])


def _sharing_problems(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[str]:
    """Every shared layer shares tensors of its bytes, and every tensor that tasks share is in one shared layer."""
    common = _in_several(set(keys.values()) for keys in manifest["tensors"].values())
    users: dict[str, set[str]] = defaultdict(set)
    owned: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)  # (task, layer) -> {name within it: store key}
    for task, keys in manifest["tensors"].items():
        for name, key in keys.items():
            if key in common:
                users[key].add(task)
                layer, _, within = name.rpartition(".")
                owned[task, layer][within] = key
    explained: set[str] = set()
    for index, group in enumerate(manifest["shared_layers"]):
        layers = [owned.get((o["task"], o["layer"]), {}) for o in group["occurrences"]]
        shared = {key for _, key in set.intersection(*(set(layer.items()) for layer in layers))}
        tasks = {o["task"] for o in group["occurrences"]}
        if not shared or sum(map(sizes.__getitem__, shared)) != group["bytes"]:
            yield f"shared_layers[{index}]: its occurrences do not share {group['bytes']} bytes of tensors"
        if any(users[key] != tasks for key in shared) or shared & explained:
            yield f"shared_layers[{index}]: its tensors are also used elsewhere"
        explained |= shared
    for key, tasks in users.items():
        if key not in explained:
            yield f"tensors: {', '.join(sorted(tasks))} share {key}, which is in no shared layer"


def _adapter_problems(manifest: Mapping[str, Any], entries: Mapping[str, Entry]) -> Iterator[str]:
    """Every occurrence of a shared layer with adapters has one of that rank, in tensors of so many bytes."""
    for index, group in enumerate(manifest["shared_layers"]):
        rank, size = group.get("rank", 0), adapter_bytes_of(group)
        for occurrence in group["occurrences"] if rank or size else ():
            task, layer = occurrence["task"], occurrence["layer"]
            keys = manifest["tensors"][task]
            adapter = {part: entries[key] for part, key in adapter_part(keys, layer).items()}
            own = {part: entries[key] for part, key in own_part(keys, layer).items()}
            sound = is_sound(_shapes(own), _shapes(adapter), rank)
            same_dtype = len({entry.dtype for entry in (*own.values(), *adapter.values())}) == 1
            found = sum(entry.bytes for entry in adapter.values())
            if not sound or not same_dtype or found != size:
                yield f"shared_layers[{index}]: {task}: {layer} has no adapter of rank {rank} in {size} bytes"


def _affine_problems(manifest: Mapping[str, Any], entries: Mapping[str, Entry]) -> Iterator[str]:
    """Every occurrence of a shared layer with private scales and biases has them, in tensors of so many bytes."""
    for index, group in enumerate(manifest["shared_layers"]):
        size = group.get("affine_bytes", 0)
        for occurrence in group["occurrences"] if size else ():
            task, layer = occurrence["task"], occurrence["layer"]
            keys = manifest["tensors"][task]
            found = {part: entries[key] for part, key in affine_part(keys, layer).items()}
            own = {part: entries[key] for part, key in own_part(keys, layer).items()}
            same_dtype = len({entry.dtype for entry in (*own.values(), *found.values())}) == 1
            is_as_said = same_dtype and sum(entry.bytes for entry in found.values()) == size
            if not is_as_said or not affine.is_sound(_shapes(own), _shapes(found)):
                yield f"shared_layers[{index}]: {task}: {layer} has no private scale and bias in {size} bytes"


def _shapes(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    return {part: entry.shape for part, entry in entries.items()}


def _in_several(sets: Iterable[set]) -> set:
    """What is in more than one of the sets."""
    seen: set = set()
    several: set = set()
    for members in sets:
        several |= seen & members
        seen |= members
    return several
