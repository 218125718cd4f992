"""Judging a trial with weights in the type of the store, where that is not float32.

The search computes in float32. What it would keep is measured once more as it will be loaded, and a task that misses
its target only there has missed it. Weights in 8 bits are rounded for that on the images of the fits (rounding.py), and
stay so if they are kept.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from gemel.environment.clock import Clock
from gemel.environment.failures import is_out_of_memory
from gemel.sharing.groups import affected_tasks
from gemel.sharing.precision import weights_of
from gemel.training.outcome import BELOW_AS_STORED, OUT_OF_MEMORY, Outcome
from gemel.trials.evaluator import Evaluator
from gemel.trials.state import MergeState
from gemel.workload import Problem, Task, WorkloadError


def judged_as_stored(state: MergeState, evaluator: Evaluator, clock: Clock, outcome: Outcome) -> Outcome:
    """The outcome of a trial with what its tasks reach as stored; a success only if all are at target there as well.

    Of a trial that failed, the tasks are measured of which a part may be kept. Raises Interrupted or TimeOver.
    """
    names = list(outcome.accuracies) if outcome.success else outcome.verified
    if not evaluator.rounds or not names:
        return outcome
    unrounded: dict = {}
    try:
        with clock.interruptible():
            unrounded = evaluator.rounding.of_trial(affected_tasks(state.kept, state.tied))
            measured = evaluator.measure_all({name: state.models[name] for name in names})
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        evaluator.rounding.undo(unrounded)
        return replace(outcome, reason=OUT_OF_MEMORY, met=(), verified=())
    judged = _with(outcome, evaluator, measured)
    if not judged.success and not judged.verified:
        evaluator.rounding.undo(unrounded)  # a later trial may go on from these weights
    return judged


def _with(outcome: Outcome, evaluator: Evaluator, measured: Mapping[str, float]) -> Outcome:
    """The outcome with what was measured of its tasks as stored."""
    missed = {name for name, accuracy in measured.items() if accuracy < evaluator.tasks[name].target_acc}
    return replace(
        outcome,
        reason=BELOW_AS_STORED if missed and outcome.success else outcome.reason,
        accuracies={**outcome.accuracies, **measured},
        met=tuple(name for name in outcome.met if name not in missed),
        verified=tuple(name for name in outcome.verified if name not in missed),
    )


def judge_folded(state: MergeState, evaluator: Evaluator, names: Iterable[str]) -> None:
    """Measures tasks whose scales, biases or adapters went into their weights, which rounds them to other values.

    Raises WorkloadError with every task that is below its target then.
    """
    if not evaluator.rounds:
        return
    problems = []
    measured = evaluator.measure_all({name: state.models[name] for name in names})
    evaluator.keep(measured)
    for name, reached in measured.items():
        if reached < (target := evaluator.tasks[name].target_acc):
            got = (
                f"{str(state.store_dtype).removeprefix('torch.')}, in which the task reaches {reached:.4f}, below its "
                f"target {target:.4f}, since a task that it shared layers with is gone"
            )
            problems.append(Problem(name, "store_dtype", got, "--fresh to start anew (the old result is kept aside)"))
    if problems:
        state.hand_back()
        raise WorkloadError(problems)


def type_problems(tasks: Mapping[str, Task], store_dtype: str) -> list[Problem]:
    """The tasks whose models cannot be stored in a type other than float32: their weights have another type."""
    if store_dtype == "float32":
        return []
    problems = []
    for name, task in tasks.items():
        found = {p.dtype for p in weights_of(task.model) if p.is_floating_point()} - {torch.float32}
        if found:
            got = f"{store_dtype}, for a model with weights in {', '.join(sorted(map(str, found)))}"
            problems.append(Problem(name, "store_dtype", got, "a model in float32, or store_dtype float32"))
    return problems
