"""Whether manifest and store agree: tensors, bytes, what is shared, and the residuals of what is shared at a price.

Decided on the store's header alone, of a manifest that was found right in itself (`results_manifest.py`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from gemel.results_store.tensors import Entry, Store
from gemel.sharing.adapters import adapter_part, is_sound, own_part


def store_problems(manifest: dict, store: Store) -> Iterator[str]:
    """Yields a line for everything in which a manifest that is right in itself is not that of the store."""
    sizes = {key: entry.bytes for key, entry in store.entries.items()}
    if sizes.keys() != manifest["store"]["checksums"].keys():
        yield f"store: its tensors are not those of {store.file.name}"
        return
    merged = sum(sizes.values())
    unmerged = sum(sum(map(sizes.__getitem__, set(keys.values()))) for keys in manifest["tensors"].values())
    unmerged -= sum(g.get("adapter_bytes", 0) * len(g["occurrences"]) for g in manifest["shared_layers"])
    for key, found in (("merged_bytes", merged), ("unmerged_bytes", unmerged)):
        if manifest["memory"][key] != found:
            yield f"memory: {key}: got {manifest['memory'][key]}, but the store's tensors make {found}"
    yield from _sharing_problems(manifest, sizes)
    yield from _adapter_problems(manifest, store.entries)


def _sharing_problems(manifest: dict, sizes: Mapping[str, int]) -> Iterator[str]:
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
    explained = set()
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


def _adapter_problems(manifest: dict, entries: Mapping[str, Entry]) -> Iterator[str]:
    """Every occurrence of a layer that is shared at a price has its residual, in tensors of so many bytes."""
    for index, group in enumerate(manifest["shared_layers"]):
        rank, size = group.get("rank", 0), group.get("adapter_bytes", 0)
        for occurrence in group["occurrences"] if rank or size else ():
            task, layer = occurrence["task"], occurrence["layer"]
            keys = manifest["tensors"][task]
            residual = {part: entries[key] for part, key in adapter_part(keys, layer).items()}
            own = {part: entries[key] for part, key in own_part(keys, layer).items()}
            shapes = ({part: entry.shape for part, entry in found.items()} for found in (own, residual))
            alike = len({entry.dtype for entry in (*own.values(), *residual.values())}) == 1
            found = sum(entry.bytes for entry in residual.values())
            if not alike or not is_sound(*shapes, rank) or found != size:
                yield f"shared_layers[{index}]: {task}: {layer} has no residual of rank {rank} in {size} bytes"


def _in_several(sets: Iterable[set]) -> set:
    """What is in more than one of the sets."""
    seen, several = set(), set()
    for members in sets:
        several |= seen & members
        seen |= members
    return several
