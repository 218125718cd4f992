"""The merged weights of a workload beside the unmerged ones of its tasks, moved under one budget.

The unmerged models lie in a results folder of their own. Its blocks are numbered behind those of the merged store; a
model has the task's name there, with UNMERGED behind it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from gemel.edge.blocks import Blocks
from gemel.edge.weights import Weights
from gemel.forward.modes import deep_copy
from gemel.results_store.files import UNMERGED as FOLDER
from gemel.results_store.files import ResultsError
from gemel.results_store.manifest import has_results, read_manifest

UNMERGED = " (unmerged)"  # no task's name has a space


def unmerged_name(task: str) -> str:
    """The name of a task's unmerged model among the blocks."""
    return task + UNMERGED


def task_of(model: str) -> str:
    """The task of a model that is named by it, or by `unmerged_name`."""
    return model.removesuffix(UNMERGED)


class TwoStores:
    """As `Weights`, over two of them: the merged ones, and the unmerged ones of the same tasks."""

    def __init__(self, merged: Weights, unmerged: Weights):
        self.merged, self.unmerged = merged, unmerged
        self.manifest, self.device = merged.manifest, merged.device
        self.stop = unmerged.stop = merged.stop
        self.models = merged.models | {unmerged_name(task): model for task, model in unmerged.models.items()}
        self.blocks = _joined(merged.blocks, unmerged.blocks)
        self.peak_bytes = 0

    @property
    def workload_bytes(self) -> int:
        """Bytes of the merged workload."""
        return self.merged.workload_bytes

    @property
    def default_budget(self) -> int:
        """Bytes of the merged workload and of the largest unmerged model, which is in memory while it is compared."""
        return self.workload_bytes + self.unmerged.blocks.bytes_of(self.unmerged.blocks.largest)

    @property
    def resident_bytes(self) -> int:
        """Bytes of both that are in memory."""
        return self.merged.resident_bytes + self.unmerged.resident_bytes

    @property
    def moved_bytes(self) -> int:
        """Bytes of both that were read."""
        return self.merged.moved_bytes + self.unmerged.moved_bytes

    def close(self) -> None:
        """Closes both files."""
        self.merged.close()
        self.unmerged.close()

    def start_counting(self) -> None:
        """Evicts everything, and counts from zero."""
        self.merged.start_counting()
        self.unmerged.start_counting()
        self.peak_bytes = 0

    def resident(self) -> list[int]:
        """The blocks of both that are in memory."""
        first = len(self.merged.blocks.all)
        return [*self.merged.resident(), *(first + i for i in self.unmerged.resident())]

    def evict(self, blocks: Iterable[int]) -> None:
        """Gives the memory of these blocks back."""
        for store, i in self._where(blocks):
            store.evict([i])

    def load(self, blocks: Iterable[int]) -> None:
        """Reads these blocks into memory."""
        for store, i in self._where(blocks):
            store.load([i])
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def _where(self, blocks: Iterable[int]) -> Iterable[tuple[Weights, int]]:
        first = len(self.merged.blocks.all)
        return ((self.merged, i) if i < first else (self.unmerged, i - first) for i in blocks)


def with_unmerged(merged: Weights, folder: str | Path, models: Mapping[str, nn.Module] | None = None) -> TwoStores:
    """The weights of a workload with those of its unmerged models. models: modules to load into, which are copied.

    Raises ResultsError if the folder holds no unmerged models of all tasks; closes the merged weights then.
    """
    try:
        tasks = list(merged.models)
        _check(Path(folder), merged.manifest, tasks)
        copies = {task: deep_copy(model) for task, model in (models or {}).items() if task in tasks}
        unmerged = Weights(folder, merged.device, tasks, copies, False, merged.through_cache)
    except BaseException:
        merged.close()
        raise
    return TwoStores(merged, unmerged)


def _check(folder: Path, manifest: Mapping, tasks: Sequence[str]) -> None:
    """Raises ResultsError with all that is wrong with a folder of unmerged models for these results."""
    if not has_results(folder):
        default = f"{FOLDER} in the results" if folder.name == FOLDER else "the folder"
        raise ResultsError(
            f"{folder}: holds no unmerged models, which --watch compares with: `merge_workloads.py --keep-unmerged` "
            f"writes them into {default}; --unmerged-store names another folder"
        )
    stored = read_manifest(folder)
    sharing = {o["task"] for group in stored["shared_layers"] for o in group["occurrences"]}
    problems = [f"{task} is not in it" for task in tasks if task not in stored["tasks"]]
    problems += [f"{task} shares layers with other tasks there" for task in tasks if task in sharing]
    own, other = (_model_digests(each) for each in (manifest, stored))
    problems += [f"{t} is another model than was merged" for t in tasks if own.get(t) != other.get(t, own.get(t))]
    if problems:
        raise ResultsError(f"{folder}: got {'; '.join(problems)}; allowed: the unmerged models of these results")


def _model_digests(manifest: Mapping) -> dict[str, str]:
    """Task -> digest of the model that was merged, where a manifest says so."""
    tasks = manifest["run"].get("fingerprint", {}).get("tasks", {})
    return {name: mark["model"] for name, mark in tasks.items() if "model" in mark}


def _joined(merged: Blocks, unmerged: Blocks) -> Blocks:
    """The blocks of both, those of the unmerged models behind the others."""
    first = len(merged.all)
    behind = {unmerged_name(task): tuple(first + i for i in own) for task, own in unmerged.needs.items()}
    return Blocks((*merged.all, *unmerged.all), merged.needs | behind)
