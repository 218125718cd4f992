"""The unmerged models of a workload as a result of their own, for a task that has to go back to them.

results/unmerged/ has all parts of a results folder: `load_merged`, `verify` and `edge run` take it as one.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from gemel.alignment.align import apply_permutations
from gemel.alignment.permutation import inverse
from gemel.environment import ranks
from gemel.forward.modes import deep_copy
from gemel.merging.records import precision_part
from gemel.results_store.files import UNMERGED
from gemel.results_store.write import foreign_files, statistics_of, write_results
from gemel.trials.evaluator import Evaluator
from gemel.trials.state import MergeState
from gemel.workload import Problem, Task

KEPT = "the unmerged models that a merge kept"  # in the place of its options: no merge resumes from them


def write_unmerged(results_path: Path, manifest: Mapping, state: MergeState, evaluator: Evaluator) -> None:
    """Writes the models as they came, in the type of the merged store; manifest: of the result that they belong to.

    Files that are there already are not written again. Raises ResultsError as `write_results` does. All ranks call it.
    """
    models = models_as_they_came(state)
    reached = {name: evaluator.accuracy[name].unmerged for name in models}
    if evaluator.rounds:
        reached = evaluator.measure_all(dict(models.items()))
    ranks.of_first(lambda: _write(results_path / UNMERGED, manifest, state, models, reached))


def models_as_they_came(state: MergeState) -> nn.ModuleDict:
    """Copies of the unmerged models with their channels in the order that they came in, bit by bit."""
    models = deep_copy(state.unmerged)
    for name, permutations in state.order.permutations.items():
        if permutations:
            back = {space: inverse(order) for space, order in permutations.items()}
            apply_permutations(models[name], back, state.order.spaces.get(name))
    return models


def unmerged_problems(results_path: Path, tasks: Mapping[str, Task]) -> list[Problem]:
    """Files of something else that the unmerged models would overwrite."""
    folder = results_path / UNMERGED
    allowed = "a folder in which nothing of yours would be overwritten"
    found = [f"{folder}, which holds {name} of something else" for name in foreign_files(folder, tasks)]
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        found = [f"{folder}, which is no folder, or a link"]
    return [Problem("options", "keep_unmerged", got, allowed) for got in found]


def _write(path: Path, manifest: Mapping, state: MergeState, models: nn.ModuleDict, reached: Mapping) -> None:
    own = {"permuted": False, "per_class": None, "frozen_normalisation": None, "agreement": None}
    tasks = {
        name: {
            **manifest["tasks"][name],
            **own,
            "merged_acc": reached[name],
            "test_acc": manifest["tasks"][name]["unmerged_test_acc"],
            "met": reached[name] >= manifest["tasks"][name]["target_acc"],
        }
        for name in models
    }
    size = state.unmerged_bytes
    memory = {"unmerged_bytes": size, "merged_bytes": size, "saved_bytes": 0, "optimal_saved_bytes": 0}
    mark = {"options": {"kept": KEPT}, "tasks": manifest["run"]["fingerprint"]["tasks"]}
    parts = {"tasks": tasks, "shared_layers": [], "memory": memory, "precision": precision_part(state)}
    whole = {**parts, "run": {"history": [], "fingerprint": mark}}
    write_results(path, models, whole, statistics_of(whole))
