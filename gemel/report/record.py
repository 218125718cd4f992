"""What the report shows, read from a results folder: the manifest, the header of the store, and the examples.

Every number is one of the manifest's, or a sum over tensors of the store, whose sizes its header gives.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemel.results_store.files import EXAMPLES
from gemel.results_store.manifest import read_result
from gemel.results_store.tensors import sizes_with_scales

ADAPTED = (".low_rank.", ".affine.")  # within the names of tensors that a task has beside a shared layer
MAX_EXAMPLES_BYTES = 1 << 20


@dataclass(frozen=True)
class Layer:
    """One module of a task that owns tensors."""

    name: str
    bytes: int  # without what lies beside it
    adapter_bytes: int  # of its adapter, scale and bias
    group: int | None  # index in `shared_layers`; None: private


@dataclass(frozen=True)
class TaskMemory:
    """Bytes of one task. A shared tensor counts for each of its n tasks with 1/n, so that tasks sum up to all."""

    before: int
    private: int
    shared: float
    adapters: int

    @property
    def after(self) -> float:
        return self.private + self.shared + self.adapters


@dataclass(frozen=True)
class Record:
    """A results folder as the report shows it."""

    path: Path
    manifest: dict[str, Any]
    layers: dict[str, list[Layer]]  # by task, in the order of its state dict
    memory: dict[str, TaskMemory]
    examples: dict[str, Any]  # by task; {}: the folder has none

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The rounds of this workload; results of earlier versions have none."""
        return [row for row in self.manifest["run"].get("rounds", []) if "trial_saved_bytes" in row]


def read_record(path: str | Path) -> Record:
    """Reads a results folder. Raises ResultsError if it holds no valid result."""
    path = Path(path)
    manifest, store = read_result(path)
    size_of = sizes_with_scales(store.entries)
    users = Counter(key for keys in manifest["tensors"].values() for key in set(keys.values()))
    group_of = {
        (o["task"], o["layer"]): i for i, group in enumerate(manifest["shared_layers"]) for o in group["occurrences"]
    }
    layers = {task: _layers(task, keys, size_of, group_of) for task, keys in manifest["tensors"].items()}
    memory = {task: _memory(keys, size_of, users) for task, keys in manifest["tensors"].items()}
    return Record(path, manifest, layers, memory, _examples(path, manifest))


def _layers(
    task: str, keys: Mapping[str, str], size_of: Mapping[str, int], group_of: Mapping[tuple[str, str], int]
) -> list[Layer]:
    sizes: dict[str, list[int]] = {}
    seen = set()
    for name, key in keys.items():
        if key in seen:
            continue
        seen.add(key)
        base = next((name.split(part)[0] for part in ADAPTED if part in name), None)
        owner = base if base is not None else name.rpartition(".")[0]
        sizes.setdefault(owner, [0, 0])[base is not None] += size_of[key]
    return [Layer(name, own, beside, group_of.get((task, name))) for name, (own, beside) in sizes.items()]


def _memory(keys: Mapping[str, str], size_of: Mapping[str, int], users: Mapping[str, int]) -> TaskMemory:
    before, private, shared, adapters = 0, 0, 0.0, 0
    for key, name in {key: name for name, key in keys.items()}.items():
        size = size_of[key]
        if any(part in name for part in ADAPTED):
            adapters += size
            continue
        before += size
        if users[key] > 1:
            shared += size / users[key]
        else:
            private += size
    return TaskMemory(before, private, shared, adapters)


def _examples(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The examples of the tasks of the manifest; {} where the file is missing or not what a merge writes."""
    file = path / EXAMPLES
    try:
        if file.is_symlink() or file.stat().st_size > MAX_EXAMPLES_BYTES:
            return {}
        found = json.loads(file.read_bytes())
        return {task: found[task] for task in manifest["tasks"] if found[task]["shown"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
