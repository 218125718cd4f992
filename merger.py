"""The round loop, the only file that knows the order of things.

propose a configuration -> tie -> recover accuracy -> validate -> keep or undo -> store, until the strategy is done or
the time is over. A round depends only on what was kept before it, the seed and its number, so an interrupted run that
goes on from the results folder ends as it would have ended.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import tables
from dataset_manager import TaskData
from model_architectures import architecture_of
from results_store import load_merged, update_run, write_results
from sharing.groups import Configuration, affected_tasks, find_groups, saved_bytes
from sharing.memory import Memory, distinct_bytes
from sharing.strategies import STRATEGIES, Strategy
from sharing.tying import is_tied, restore_snapshot, take_snapshot, tie
from trainer import TIME_OVER, Outcome, TrainingOptions, evaluate, recover
from workload import Problem, Task, WorkloadError


@dataclass
class Accuracy:
    """What was measured of one task."""

    unmerged: float
    merged: float
    unmerged_test: float | None = None
    merged_test: float | None = None


@dataclass
class Run:
    """One merge: what was given, and what is known so far."""

    tasks: Mapping[str, Task]
    data: Mapping[str, TaskData]
    models: nn.ModuleDict
    results_path: Path
    strategy_name: str
    strategy: Strategy
    training: TrainingOptions
    initial_weights: str
    seed: int
    device: torch.device
    flags: dict  # what the manifest says of how the run was started
    fingerprint: dict  # what must be equal for another run to go on from this one
    say: Callable[[str], None] = print
    deadline: float = math.inf  # on time.monotonic()
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0  # spent by the runs that this one continues
    groups: Configuration = ()
    unmerged_bytes: int = 0
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    rounds: list[dict] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)
    finished: bool = False

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started


def start(tasks: Mapping[str, Task], data: Mapping[str, TaskData], results_path: str | Path, **options) -> Run:
    """A run over the tasks' models, in place and on the device; nothing is evaluated, tied or written yet."""
    models = nn.ModuleDict({name: task.model for name, task in tasks.items()}).to(options["device"])
    strategy = STRATEGIES[options["strategy_name"]](models)
    run = Run(tasks, data, models, Path(results_path), strategy=strategy, **options)
    run.groups, run.unmerged_bytes = find_groups(models), distinct_bytes(models)
    return run


def preflight(run: Run) -> None:
    """Measures every model before anything is merged. Raises WorkloadError if one is below its own target already."""
    problems = []
    for name, task in _with_bar(run, "evaluating the unmerged models"):
        measured = evaluate(task, run.data[name].val)
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


def resume(run: Run, manifest: Mapping) -> None:
    """Puts a fresh run where the run that wrote the manifest was: kept ties and weights, search state, measurements."""
    state = manifest["run"]
    run.strategy.load_state(state["strategy_state"])
    load_merged(run.results_path, run.models, run.device)
    assert all(is_tied(run.models, group) for group in run.strategy.kept), "the store and the search state disagree"
    run.accuracy = {name: Accuracy(**values) for name, values in state["accuracy"].items()}
    run.rounds, run.history = state["rounds"], state["history"]
    run.seconds_before, run.finished = state["seconds"], state["finished"]


def merge(run: Run) -> dict:
    """Runs rounds until nothing is left to try or the time is over; returns the manifest of the results folder.

    From the first moment on, and after every round, the folder holds a complete result (at first: nothing shared).
    """
    if not run.rounds:
        store(run)
    run.say(tables.round_header())
    while time.monotonic() < run.deadline:
        proposal = run.strategy.propose()
        if proposal is None:
            run.finished = True
            break
        if not play_round(run, proposal):
            break
    return confirm(run)


def play_round(run: Run, proposal: Configuration) -> bool:
    """Tries one configuration, keeps or undoes it, and stores; False if the time ran out before it was decided."""
    began = time.monotonic()
    before = run.strategy.kept
    trained = {name: run.tasks[name] for name in affected_tasks(before, proposal)}
    snapshot = take_snapshot(nn.ModuleDict({name: run.models[name] for name in trained}))
    try:
        tie(run.models, proposal, run.initial_weights)
        outcome = recover(
            run.models,
            trained,
            run.data,
            run.training,
            device=run.device,
            seed=run.seed,
            purpose=("round", len(run.rounds)),
            deadline=run.deadline,
        )
    except BaseException:
        restore_snapshot(snapshot)
        raise
    if not outcome.success:
        restore_snapshot(snapshot)
    if outcome.reason == TIME_OVER:
        return False
    run.strategy.record(outcome.success, outcome.met)
    run.rounds.append(round_record(run, before, proposal, outcome, time.monotonic() - began))
    run.say(tables.round_row(run.rounds[-1]))
    if outcome.success:
        for name, accuracy in outcome.accuracies.items():
            run.accuracy[name].merged = accuracy
        run.history.append(history_entry(run))
        store(run)
    else:
        update_run(run.results_path, run_record(run))
    return True


def confirm(run: Run) -> dict:
    """Loads the result from disk into copies of the models, evaluates every task again and closes the manifest.

    Raises RuntimeError if a reloaded task is below its target: what is shipped must hold what was measured.
    """
    reloaded = load_merged(
        run.results_path, {name: copy.deepcopy(model) for name, model in run.models.items()}, run.device
    )
    for name, task in _with_bar(run, "evaluating what was written"):
        accuracy = run.accuracy[name]
        accuracy.merged = evaluate(task, run.data[name].val, reloaded[name])
        if run.data[name].test is not None:
            accuracy.merged_test = evaluate(task, run.data[name].test, reloaded[name])
        if accuracy.merged < task.target_acc:
            raise RuntimeError(
                f"{name}: reloaded from {run.results_path} it reaches {accuracy.merged:.4f}, below its target "
                f"{task.target_acc:.4f}, though it met the target before it was written"
            )
    return store(run)


def _with_bar(run: Run, title: str) -> tqdm:
    return tqdm(run.tasks.items(), desc=title, unit="task", leave=False, disable=None)


# ---- what is written ------------------------------------------------------------------------------------


def store(run: Run) -> dict:
    """Writes the workload as it is now."""
    memory = memory_of(run)
    manifest = {
        "tasks": {name: task_record(task, run.accuracy[name]) for name, task in run.tasks.items()},
        "shared_layers": [
            {"signature": g.signature, "bytes": g.bytes, "occurrences": [o._asdict() for o in g.occurrences]}
            for g in run.strategy.kept
        ],
        "memory": {**asdict(memory), "saved_bytes": memory.saved_bytes},
        "run": run_record(run),
    }
    statistics = {
        "total_bytes": run.unmerged_bytes,
        "optimal_saved_bytes": memory.optimal_saved_bytes,
        "history": run.history,
    }
    return write_results(run.results_path, run.models, manifest, statistics)


def memory_of(run: Run) -> Memory:
    return Memory(run.unmerged_bytes, distinct_bytes(run.models), saved_bytes(run.groups))


def task_record(task: Task, accuracy: Accuracy) -> dict:
    return {
        "task": task.kind,
        "architecture": architecture_of(task.model),
        "unmerged_acc": task.unmerged_acc,
        "measured_unmerged_acc": accuracy.unmerged,
        "target_acc": task.target_acc,
        "merged_acc": accuracy.merged,
        "unmerged_test_acc": accuracy.unmerged_test,
        "test_acc": accuracy.merged_test,
        "met": accuracy.merged >= task.target_acc,
    }


def run_record(run: Run) -> dict:
    """The `run` part of the manifest: how it was started, and all that a later run needs to go on."""
    return {
        **run.flags,
        "strategy": run.strategy_name,
        "seed": run.seed,
        "seconds": run.seconds,
        "finished": run.finished,
        "strategy_state": run.strategy.state(),
        "accuracy": {name: asdict(accuracy) for name, accuracy in run.accuracy.items()},
        "rounds": run.rounds,
        "history": run.history,
        "fingerprint": run.fingerprint,
    }


def round_record(run: Run, before: Configuration, proposal: Configuration, outcome: Outcome, seconds: float) -> dict:
    """One round as it is shown and stored."""
    new = [group for group in proposal if group not in set(before)]
    largest = max(new, key=lambda group: group.saved_bytes)
    what = largest.signature.split(":")[0]
    return {
        "round": len(run.rounds) + 1,
        "what": what,
        "num_new_groups": len(new),
        "tasks": sorted({task for group in new for task in group.tasks}),
        "trained": sorted(outcome.accuracies),
        "met": list(outcome.met),
        "accuracies": outcome.accuracies,
        "kept": outcome.success,
        "reason": outcome.reason,
        "saved_bytes": saved_bytes(run.strategy.kept),
        "optimal_saved_bytes": saved_bytes(run.groups),
        "steps": outcome.steps,
        "samples": outcome.samples,
        "seconds": seconds,
    }


def history_entry(run: Run) -> dict:
    met = sum(run.accuracy[name].merged >= task.target_acc for name, task in run.tasks.items())
    return {
        "seconds": run.seconds,
        "round": len(run.rounds),
        "saved_bytes": saved_bytes(run.strategy.kept),
        "tasks_met": met,
    }
