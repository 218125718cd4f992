"""Resuming: what lies in the results folder, whether it is of this workload, and where the search was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemel.fitting.least_squares import with_affine
from gemel.forward.arithmetic import STORE_DTYPES
from gemel.forward.modes import Models
from gemel.merging.fingerprint import differences
from gemel.merging.retry import without_retried
from gemel.options import LEAST_SQUARES, MergeOptions
from gemel.results_store.files import ResultsError
from gemel.results_store.manifest import has_results, read_manifest
from gemel.results_store.write import repair
from gemel.sharing.groups import Configuration
from gemel.strategies import STEM, strategy_class
from gemel.strategies.base import Strategy
from gemel.strategies.components import Components, components_of, is_by_components
from gemel.training.predictions import learns_by_imitation
from gemel.trials.state import MergeState
from gemel.workload import Problem, WorkloadError

MAX_SET_ASIDE = 10_000


def previous_manifest(results_path: Path, fingerprint: Mapping, retried: str | None = None) -> dict | None:
    """The manifest to resume from, its files repaired; None if the folder holds none.

    retried: a task that is merged again with new data, and is left out if it was not merged with these before.
    Raises WorkloadError if it is of another workload; tasks that were added or taken away do not make it another one.
    """
    if not has_results(results_path):
        return None
    allowed = "the same as before, or --fresh to start anew (the old result is kept aside), or another --results"
    try:
        stored = without_retried(read_manifest(results_path), fingerprint, retried)["run"]["fingerprint"]
    except ResultsError as error:
        raise WorkloadError([Problem(str(results_path), "results", str(error), allowed)]) from None
    changed = differences(stored, fingerprint)
    if not set(stored["tasks"]) & set(fingerprint["tasks"]):
        changed.append(f"tasks: were {', '.join(stored['tasks'])}, are {', '.join(fingerprint['tasks'])}")
    if changed:
        raise WorkloadError([Problem(str(results_path), "results", line, allowed) for line in changed])
    for line in repair(results_path):
        print(line)
    return without_retried(read_manifest(results_path), fingerprint, retried)


def set_aside(results_path: Path) -> Path:
    """Renames a results folder to the first free <name>-previous-N; returns that."""
    for number in range(1, MAX_SET_ASIDE):
        aside = results_path.with_name(f"{results_path.name}-previous-{number}")
        if not aside.exists():
            return results_path.rename(aside)
    raise RuntimeError(f"{results_path}: there are too many earlier results beside it")


def groups_to_tie(options: MergeOptions, models: Models, groups: Configuration) -> Configuration:
    """The groups as a search ties them.

    Where weights are fitted, a layer without normalisation behind it gets a private scale and bias (with_affine), which
    take a few bytes of what it saves.
    """
    fits = options.initial_weights == LEAST_SQUARES and options.strategy != STEM
    return tuple(with_affine(models, group) for group in groups) if fits else groups


def new_search(options: MergeOptions, state: MergeState, groups: Configuration) -> Strategy:
    """A strategy that has tried nothing yet, with the memory goal of the options."""
    strategy = new_strategy(options, state.models, groups)
    strategy.goal_saving = None if options.memory is None else state.unmerged_bytes - options.memory
    return strategy


def new_strategy(options: MergeOptions, models: Models, groups: Configuration) -> Strategy:
    """A strategy that has tried nothing yet; of tasks that share nothing with others, "adaptive" searches apart.

    Not with a memory goal, which is of all tasks together.
    """
    is_apart = options.strategy == "adaptive" and options.memory is None and len(components_of(groups)) > 1
    return _by_components(options, models, groups) if is_apart else _as_one(options, models, groups)


def _as_one(options: MergeOptions, models: Models, groups: Configuration) -> Strategy:
    given: dict[str, Any] = {"adapter_budget": options.adapter_budget} if options.adapter_budget else {}
    if options.strategy != STEM:
        given["groups"] = groups_to_tie(options, models, groups)
    else:  # it finds its own groups
        given["store_dtype"] = STORE_DTYPES[options.store_dtype]
    strategy = strategy_class(options.strategy)(models, **given)
    strategy.learn_quickly = [name for name, model in models.items() if learns_by_imitation(model)]
    return strategy


def _by_components(options: MergeOptions, models: Models, groups: Configuration) -> Components:
    return Components(dict(models.items()), groups, lambda own, shared: _as_one(options, own, shared))


def load_search(
    strategy: Strategy, state: Mapping[str, Any], options: MergeOptions, models: Models, groups: Configuration
) -> bool:
    """Continues the search that a manifest has the state of; False: a new one begins, on top of what that one kept.

    A new one where tasks were searched together before and are searched apart now, or the other way round, as with and
    without a memory goal.
    """
    if is_by_components(state) == isinstance(strategy, Components):
        strategy.load_state(dict(state))
        return True
    earlier = _by_components(options, models, groups) if is_by_components(state) else _as_one(options, models, groups)
    earlier.load_state(dict(state))
    strategy.adopt(earlier.kept)
    return False
