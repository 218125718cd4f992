"""The round loop, the only file that knows the order of things.

propose a configuration -> tie -> recover accuracy -> validate -> keep or undo -> store, until the strategy is done or
the time is over. A round depends only on what was kept before it, the seed and its number, so an interrupted run that
goes on from the results folder ends as it would have ended.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from gemel.alignment.align import apply_permutations
from gemel.alignment.matching import BY_ACTIVATIONS, BY_ORDER, match_groups
from gemel.datasets.folders import SampleError
from gemel.datasets.loaders import TaskData, plain_images
from gemel.environment.failures import is_out_of_memory
from gemel.evaluation.eval_method import evaluate
from gemel.forward.modes import to_channels_last
from gemel.merging import console as tables
from gemel.merging.initialisation import (
    ALIGN_PIXELS,
    LEAST_SQUARES,
    align_channels,
    fit_weights,
    prefixes_of,
    refit_frozen,
    reset_to_unmerged,
    restore_channel_order,
    rule_of,
    screen_targets,
    sensitivity_of,
    set_sensitivity,
    standings,
    state_of,
    teachers_of,
)
from gemel.merging.records import (
    Accuracy,
    history_entry,
    manifest_of,
    per_class_of,
    round_record,
    run_record,
    statistics_of,
)
from gemel.results_store.checkpoint import drop_checkpoint, read_checkpoint, write_checkpoint
from gemel.results_store.load import load_merged
from gemel.results_store.write import update_run, write_results
from gemel.sharing.adapters import fold, own_modules
from gemel.sharing.groups import Configuration, affected_tasks, from_plain, reconciled, restrict, to_plain
from gemel.sharing.memory import distinct_bytes
from gemel.sharing.tying import Snapshot, is_tied, restore_snapshot, retie, take_snapshot
from gemel.strategies import STEM, strategy_class
from gemel.strategies.base import Strategy
from gemel.training.cut import Cuts
from gemel.training.early_stopping import Standing
from gemel.training.options import TrainingOptions
from gemel.training.outcome import OUT_OF_MEMORY, TIME_OVER, Interrupted, Outcome, RoundContext, never
from gemel.training.prefix import Prefix
from gemel.workload import Problem, Task, WorkloadError
from trainer import recover

CHECKPOINT_SHARE = 0.05  # of the time that writing the state of a round in flight may take


@dataclass
class Run:
    """One merge: what was given, and what is known so far."""

    tasks: Mapping[str, Task]
    data: Mapping[str, TaskData]
    models: nn.ModuleDict
    unmerged: nn.ModuleDict  # copies of the models as they came, in eval mode: the teachers
    results_path: Path
    strategy_name: str
    strategy: Strategy
    training: TrainingOptions
    initial_weights: str
    alignment: str  # how channels are lined up before anything is tied, or NO_ALIGNMENT
    seed: int
    device: torch.device
    flags: dict  # what the manifest says of how the run was started
    fingerprint: dict  # what must be equal for another run to go on from this one
    matching: str = BY_ORDER  # which layer of a signature pairs with which
    prefix_bytes: int = 0  # of the memory in which a task's frozen prefix keeps what it puts out
    adapter_budget: float = 0.0  # what a task may pay for a residual of its own, as a share of the layer's bytes
    say: Callable[[str], None] = print
    per_class: bool = False  # whether what was written is judged class by class as well
    stop_asked: Callable[[], bool] = never
    deadline: float = math.inf  # on time.monotonic()
    started: float = field(default_factory=time.monotonic)
    cpu_started: float = field(default_factory=time.process_time)
    seconds_before: float = 0.0  # spent by the runs that this one continues
    cpu_seconds_before: float = 0.0
    groups: Configuration = ()
    unmerged_bytes: int = 0
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    screen_accuracy: dict[str, float] = field(default_factory=dict)  # of the unmerged models on TaskData.screen
    rounds: list[dict] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)
    finished: bool = False
    is_new: bool = True  # whether the results folder holds nothing of this workload yet
    working: Configuration | None = None  # what is tied now, after a failed trial from which the next one goes on
    undo: Snapshot | None = None  # of what is kept, while the models hold something else
    in_flight: dict | None = None  # the state of a round to go on from
    permutations: dict[str, dict] = field(default_factory=dict)  # task -> what was permuted, by permutations_of
    cuts: dict[str, Cuts] = field(default_factory=dict)  # task -> where its model can be cut, once that is asked
    prefixes: dict[str, Prefix] = field(default_factory=dict)  # task -> the last one that was frozen
    originals: dict[str, dict] = field(default_factory=dict)  # task -> state of the permuted models as they came

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    @property
    def cpu_seconds(self) -> float:
        """Of all threads of this process; loader processes (none on a CPU) are not counted."""
        return self.cpu_seconds_before + time.process_time() - self.cpu_started


def start(tasks: Mapping[str, Task], data: Mapping[str, TaskData], results_path: str | Path, **options) -> Run:
    """A run over the tasks' models, in place and on the device; nothing is evaluated, tied or written yet."""
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()}).to(options["device"])
    to_channels_last(models, options["device"])
    unmerged = copy.deepcopy(models).eval().requires_grad_(False)
    by = options.get("matching", BY_ORDER)
    images = None
    if by == BY_ACTIVATIONS:
        images = {name: plain_images(d, ALIGN_PIXELS, options["seed"], "match") for name, d in data.items()}
    groups = match_groups(models, by, images)
    strategy = _strategy(models, groups, **options)
    run = Run(tasks, data, models, unmerged, Path(results_path), strategy=strategy, **options)
    run.groups, run.unmerged_bytes = groups, distinct_bytes(models)
    return run


def _strategy(
    models: nn.ModuleDict, groups: Configuration, strategy_name: str, adapter_budget: float = 0.0, **_
) -> Strategy:
    given = {"price": adapter_budget} if adapter_budget else {}
    return strategy_class(strategy_name)(models, **given, **({} if strategy_name == STEM else {"groups": groups}))


def preflight(run: Run) -> None:
    """Measures every model that was not measured yet, before anything is merged.

    Raises WorkloadError if one is below its own target already, or cannot be evaluated.
    """
    problems = []
    for name, task in _with_bar(run, "evaluating the unmerged models"):
        if name in run.accuracy:
            continue
        raise_if_interrupted(run)
        try:
            measured = evaluate(task, run.data[name].val)
        except SampleError:
            raise
        except Exception as error:  # a user's eval method may raise anything
            got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            problems.append(Problem(name, "eval_method", got, "f(model, data_loader) -> float in [0, 1]"))
            continue
        run.accuracy[name] = Accuracy(measured, measured)
        if run.data[name].test is not None:
            test = evaluate(task, run.data[name].test)
            run.accuracy[name].unmerged_test = run.accuracy[name].merged_test = test
        if measured < task.target_acc:
            got = (
                f"an unmerged model that reaches {measured:.4f} on val, {task.target_acc - measured:.4f} below its "
                f"target {task.target_acc:.4f} ({task.tolerance:g} x unmerged_acc {task.unmerged_acc:g})"
            )
            problems.append(Problem(name, "unmerged_acc", got, "the accuracy that the model has on the val split"))
    if problems:
        raise WorkloadError(problems)


def raise_if_interrupted(run: Run) -> None:
    """Ends the run if the user asked for it. Raises Interrupted."""
    if run.stop_asked():
        raise Interrupted


def resume(run: Run, manifest: Mapping) -> None:
    """Puts a fresh run where the run that wrote the manifest was: kept ties and weights, search state, measurements."""
    _load_kept(run, manifest, list(run.tasks))
    state = manifest["run"]
    run.is_new = False
    if "groups" in state:  # found again, likeness could be another by a hair
        run.groups = from_plain(state["groups"])
        run.strategy = _strategy(run.models, run.groups, run.strategy_name, run.adapter_budget)
    run.strategy.load_state(state["strategy_state"])
    assert all(is_tied(run.models, group) for group in run.strategy.kept), "the store and the search state disagree"
    run.finished = state["finished"]
    checkpoint = None if run.finished else read_checkpoint(run.results_path)
    if checkpoint is not None and checkpoint["round"] == len(run.rounds):
        _load_checkpoint(run, checkpoint)


def extend(run: Run, manifest: Mapping) -> None:
    """Puts a fresh run on top of a result for other tasks: those that are still here keep what they share.

    New tasks are to be measured by `preflight`; the search begins anew from what is kept.
    """
    common = [name for name in run.tasks if name in manifest["tasks"]]
    _load_kept(run, manifest, common)
    kept = restrict(from_plain(manifest["shared_layers"]), common)
    if run.matching != BY_ORDER:  # with other tasks, others may be the most alike
        run.groups = reconciled(kept, run.groups)
        run.strategy = _strategy(run.models, run.groups, run.strategy_name, run.adapter_budget)
    run.strategy.adopt(kept)
    adapted = {occurrence for group in run.strategy.kept if group.rank for occurrence in group.occurrences}
    for name in common:  # what shared a layer at a price with a task that is gone has it for itself
        for layer, module in list(own_modules(run.models[name])):
            if (name, layer) not in adapted:
                fold(module)


def _load_kept(run: Run, manifest: Mapping, names: list[str]) -> None:
    state = manifest["run"]
    load_merged(run.results_path, {name: run.models[name] for name in names}, run.device, tasks=names, verify=True)
    to_channels_last(run.models, run.device)
    run.accuracy = {name: Accuracy(**state["accuracy"][name]) for name in names}
    run.rounds, run.history = state["rounds"], state["history"]
    run.seconds_before, run.cpu_seconds_before = state["seconds"], state["cpu_seconds"]
    run.permutations = {name: permutations for name, permutations in state["permutations"].items() if name in names}
    for name, permutations in run.permutations.items():
        if permutations:
            run.originals[name] = state_of(run.unmerged[name])
            apply_permutations(run.unmerged[name], permutations)


def _load_checkpoint(run: Run, checkpoint: dict) -> None:
    """A round in flight is tied and loaded by `play_round`; weights between two trials that go on are loaded here."""
    if checkpoint["state"] is not None:
        run.in_flight = checkpoint
    if checkpoint["working"] is not None:
        working = from_plain(checkpoint["working"])
        trained = affected_tasks(run.strategy.kept, working)
        run.undo = take_snapshot(nn.ModuleDict({name: run.models[name] for name in trained}))
        retie(run.models, run.strategy.kept, working, run.unmerged)
        run.models.load_state_dict(checkpoint["models"], strict=False)
        run.working = working


def merge(run: Run) -> dict:
    """Runs rounds until nothing is left to try or the time is over; returns the manifest of the results folder.

    From the first moment on, and after every round, the folder holds a complete result (at first: nothing shared).
    """
    if run.is_new:
        store(run)
        drop_checkpoint(run.results_path)
    align_channels(run)
    if not run.rounds or run.is_new:
        set_sensitivity(run)
    run.say(tables.round_header())
    try:
        while time.monotonic() < run.deadline:
            raise_if_interrupted(run)
            proposal = run.strategy.propose()
            if proposal is None:
                run.finished = True
                break
            if not play_round(run, proposal):
                break
    finally:
        _undo(run)
        restore_channel_order(run)
    return confirm(run)


def play_round(run: Run, proposal: Configuration) -> bool:
    """Tries one configuration, keeps or undoes it, and stores; False if the time ran out before it was decided."""
    began = time.monotonic()
    before = run.strategy.kept
    trained = {name: run.tasks[name] for name in affected_tasks(before, proposal)}
    outcome = _try(run, before, proposal, trained)
    if outcome.reason == TIME_OVER:
        return False
    run.in_flight = None
    harm = sensitivity_of(run, proposal) if not outcome.success and run.strategy.uses_sensitivity else {}
    ratios = {name: accuracy / run.tasks[name].target_acc for name, accuracy in outcome.accuracies.items()}
    run.strategy.record(outcome.success, outcome.met, ratios, harm)
    run.working = proposal if run.strategy.continues_failed_trial and not outcome.success else None
    run.rounds.append(round_record(run, before, proposal, outcome, time.monotonic() - began))
    run.say(tables.round_row(run.rounds[-1]))
    if outcome.success:
        run.undo = None
        for name, accuracy in outcome.accuracies.items():
            run.accuracy[name].merged, run.accuracy[name].per_class = accuracy, None
        run.history.append(history_entry(run))
        store(run)
        drop_checkpoint(run.results_path)
    else:
        if not run.strategy.continues_failed_trial:
            _undo(run)
        save_checkpoint(run, None)
        update_run(run.results_path, run_record(run))
    return True


def _try(run: Run, before: Configuration, proposal: Configuration, trained: Mapping[str, Task]) -> Outcome:
    """Ties the proposal and recovers accuracy; `run.undo` is then what brings back the state before the trial."""
    container = nn.ModuleDict({name: run.models[name] for name in trained})
    if run.undo is None:
        run.undo = take_snapshot(container)
    retie(run.models, run.working or before, proposal, run.unmerged, rule_of(run.initial_weights))
    try:
        return _recover(run, before, proposal, trained)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Outcome(OUT_OF_MEMORY, {name: 0.0 for name in trained}, (), 0, 0)


def _recover(run: Run, before: Configuration, proposal: Configuration, trained: Mapping[str, Task]) -> Outcome:
    """What is tied as proposed is fitted, then trained, as far as the strategy asks for either."""
    options, fitted = run.training, {}
    if run.in_flight is None and run.initial_weights == LEAST_SQUARES:
        fitted = _fit(run, before, proposal, trained)
        raise_if_interrupted(run)
    elif run.in_flight is None:
        refit_frozen(run, trained)
    if run.strategy.releases_before_training:
        options = replace(options, max_epochs=0)
    teachers = teachers_of(run, trained, proposal)
    around = RoundContext(
        device=run.device,
        seed=run.seed,
        purpose=("round", len(run.rounds)),
        deadline=run.deadline,
        fitted=fitted,
        screen_targets=screen_targets(run, trained),
        prefixes=prefixes_of(run, trained, proposal) if options.max_epochs else {},
        save=_throttled(partial(save_checkpoint, run)),
        saved=run.in_flight["state"] if run.in_flight else None,
        stop_asked=run.stop_asked,
    )
    try:
        return recover(run.models, trained, run.data, options, around, teachers)
    finally:
        for teacher in teachers.values():
            teacher.close()


def _fit(run: Run, before: Configuration, proposal: Configuration, trained: Mapping[str, Task]) -> dict[str, Standing]:
    """Fits what the trial newly ties; all that it changes, if the strategy wants that and nothing kept was trained."""
    if run.working == proposal:
        return standings(run, trained)
    trained_before = any(record["kept"] and record["steps"] for record in run.rounds)
    if trained_before or not run.strategy.refits_all_changes:
        new = tuple(group for group in proposal if group not in set(before))
        return fit_weights(run, new, trained, max_fits=2)
    groups = tuple(group for group in proposal if set(group.tasks) <= set(trained))
    reset_to_unmerged(run, groups, trained)
    return fit_weights(run, groups, trained)


def _undo(run: Run) -> None:
    """Brings the models back to what is kept, bit by bit."""
    if run.undo is not None:
        restore_snapshot(run.undo)
    run.undo = run.working = None


def confirm(run: Run) -> dict:
    """Loads the result from disk into copies of the models, evaluates every task again and closes the manifest.

    Raises RuntimeError if a reloaded task is below its target: what is shipped must hold what was measured.
    """
    reloaded = load_merged(run.results_path, copy.deepcopy(dict(run.models.items())), run.device, verify=True)
    to_channels_last(nn.ModuleDict(reloaded), run.device)
    for name, task in _with_bar(run, "evaluating what was written"):
        accuracy = run.accuracy[name]
        accuracy.merged = evaluate(task, run.data[name].val, reloaded[name])
        if run.data[name].test is not None:
            accuracy.merged_test = evaluate(task, run.data[name].test, reloaded[name])
        if run.per_class:
            accuracy.per_class = per_class_of(task, run.unmerged[name], reloaded[name], run.data[name].val)
        if accuracy.merged < task.target_acc:
            raise RuntimeError(
                f"{name}: reloaded from {run.results_path} it reaches {accuracy.merged:.4f}, below its target "
                f"{task.target_acc:.4f}, though it met the target before it was written"
            )
    return store(run)


def store(run: Run) -> dict:
    """Writes the workload as it is now."""
    return write_results(run.results_path, run.models, manifest_of(run), statistics_of(run))


def save_checkpoint(run: Run, state: dict | None) -> None:
    """Keeps what a later run needs to go on within a round (its `state`), or between two trials that go on."""
    if state is None and run.working is None:
        drop_checkpoint(run.results_path)
        return
    names = affected_tasks(run.strategy.kept, run.working) if run.working else []
    models = nn.ModuleDict({name: run.models[name] for name in names}).state_dict() if state is None else {}
    working = to_plain(run.working) if run.working is not None else None
    write_checkpoint(run.results_path, {"round": len(run.rounds), "state": state, "working": working, "models": models})


def _throttled(save: Callable[[dict], None]) -> Callable[[dict, bool], None]:
    """Leaves out saves that would take more than their share of the time, except those that end a run."""
    next_save = 0.0

    def throttled(state: dict, last: bool) -> None:
        nonlocal next_save
        began = time.monotonic()
        if last or began >= next_save:
            save(state)
            next_save = time.monotonic() + (time.monotonic() - began) / CHECKPOINT_SHARE

    return throttled


def _with_bar(run: Run, title: str) -> tqdm:
    return tqdm(run.tasks.items(), desc=title, unit="task", leave=False, disable=None)
