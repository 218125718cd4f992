"""How much memory a merge is predicted to take, before anything is trained, beside what it then took.

Every part is the most that it can be, for a trial that changes all tasks which can share with each other. What it ties
is there once, beside the weights that it would be undone to: how much that is, the strategy says (`tied_share`). Fits
and training are never there at the same time: the larger one counts.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from gemel.console.tables import wrap
from gemel.datasets.loaders import TaskData
from gemel.environment import ranks
from gemel.environment.device import pick_device
from gemel.environment.memory import give_back_unused, memory_there, memory_used, peak_memory
from gemel.environment.units import mib
from gemel.fitting.memory import FitMemory
from gemel.merging import earlier_merges
from gemel.merging.measured_memory import (
    FitWork,
    bytes_of_activations,
    bytes_of_fit,
    bytes_of_samples,
    bytes_of_training,
    work_of_fits,
)
from gemel.options import LEAST_SQUARES, MergeOptions
from gemel.sharing.groups import Configuration, restrict, saved_bytes
from gemel.sharing.memory import distinct_bytes
from gemel.strategies.base import Strategy
from gemel.trials.images import ImageSampler
from gemel.trials.state import MergeState
from gemel.workload import Task

log = logging.getLogger(__name__)

Parts = Mapping[str, int]  # what -> bytes
FITS, TRAINING = "fits", "training"


@dataclass(frozen=True)
class MemoryNeed:
    """What is predicted of one memory, that of the machine or of a device.

    always: what is there all the time. phases: what only fits, and what only training takes. there: bytes that can be
    used, None where that is not known.
    """

    device: torch.device
    always: Parts
    phases: Mapping[str, Parts]
    there: int | None

    @property
    def at_worst(self) -> dict[str, int]:
        """The parts at the worst moment, the largest first."""
        phase = max(self.phases.values(), key=lambda parts: sum(parts.values()))
        found = {**self.always, **phase}
        return {what: found[what] for what in sorted(found, key=lambda what: -found[what]) if found[what]}

    @property
    def by_phase(self) -> dict[str, int]:
        """Phase -> bytes in all while it lasts."""
        return {phase: _sum(self.always, parts) for phase, parts in self.phases.items()}

    @property
    def predicted(self) -> int:
        return sum(self.at_worst.values())

    def to_plain(self) -> dict[str, Any]:
        """As JSON values, with the most that was used so far; with several ranks, of the rank that used most."""
        used = max(ranks.gathered(peak_memory(self.device)))
        sizes = {"available_bytes": self.there, "predicted_bytes": self.predicted, "used_bytes": used}
        return {"memory_of": self.device.type, **sizes, "predicted_by_phase": self.by_phase, "parts": self.at_worst}


class Trial(NamedTuple):
    """What a trial takes beside the models: what -> bytes, by where and when it is there."""

    undo: Parts  # in the memory of the machine, all the time
    tied: Parts  # on the device, all the time
    copies: Parts  # in the memory of the machine, while weights are fitted
    fits: Parts  # on the device, while weights are fitted
    training: Parts  # on the device
    written: Parts  # in the memory of the machine, while it trains

    @property
    def total(self) -> int:
        """At its worst moment, in all memories together."""
        always, fits, training = ((self.undo, self.tied), (self.copies, self.fits), (self.training, self.written))
        return _sum(*always) + max(_sum(*fits), _sum(*training))


def _sum(*parts: Parts) -> int:
    return sum(size for part in parts for size in part.values())


@dataclass(frozen=True)
class Searched:
    """What is searched: the groups that tasks could share, how much of it trials tie, and which tasks are apart."""

    groups: Configuration
    tied_share: float = 0.0
    apart: Sequence[Collection[str]] = ()

    def parts(self, names: Collection[str]) -> list[list[str]]:
        """Of these tasks, sets of which a trial changes one at most."""
        return [part for tasks in self.apart or [names] if (part := [name for name in names if name in tasks])]

    def bytes_of_tied(self, names: Collection[str]) -> int:
        """Of the weights that a trial of these tasks shares."""
        return int(self.tied_share * sum(group.bytes for group in restrict(self.groups, names)))

    def bytes_saved(self, names: Collection[str]) -> int:
        """By a trial of these tasks."""
        return int(self.tied_share * saved_bytes(restrict(self.groups, names)))


def searched_by(strategy: Strategy, groups: Configuration) -> Searched:
    """What a strategy searches; groups: that could be shared."""
    return Searched(groups, strategy.tied_share, strategy.searched_apart)


def memory_needs(
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    state: MergeState,
    images: ImageSampler,
    options: MergeOptions,
    searched: Searched,
) -> list[MemoryNeed]:
    """What this rank is predicted to take of the machine's memory and of its device's, if that has one of its own.

    Runs every task of this rank forward on a few images of train; the models stay as they are.
    """
    own = {name: tasks[name] for name in ranks.taking_part(tasks)}
    live = live_bytes(state, own)
    came = {"models as they came": earlier_merges.bytes_kept(task.model for task in tasks.values())}
    loaded = {"samples in memory": sum(bytes_of_samples(data[name], _cache(options, tasks)) for name in own)}
    activations = {name: bytes_of_activations(task, data[name], state, options) for name, task in own.items()}
    fit_work = work_of_fits(own, data, state, images) if options.initial_weights == LEAST_SQUARES else {}
    memory = images.of_fits.memory
    parts = [_of_trial(part, state, searched, activations, fit_work, memory) for part in searched.parts(list(own))]
    trial = max(parts, key=lambda trial: trial.total, default=Trial(*[{}] * len(Trial._fields)))
    machine = pick_device("cpu")
    give_back_unused()
    if state.device == machine:
        other = {"the rest of the process": max(0, memory_used(machine) - sum({**live, **came}.values()))}
        phases = {FITS: {**trial.copies, **trial.fits}, TRAINING: {**trial.training, **trial.written}}
        always = {**live, **came, **loaded, **trial.undo, **trial.tied, **other}
        return [MemoryNeed(machine, always, phases, memory_there(machine))]
    other = {"the process": max(0, memory_used(machine) - sum(came.values()))}
    host = {**other, **came, **loaded, **trial.undo}
    on_device = {FITS: trial.fits, TRAINING: trial.training}
    return [
        MemoryNeed(machine, host, {FITS: trial.copies, TRAINING: trial.written}, memory_there(machine)),
        MemoryNeed(state.device, {**live, **trial.tied}, on_device, memory_there(state.device)),
    ]


def _of_trial(
    names: Collection[str],
    state: MergeState,
    searched: Searched,
    activations: Mapping[str, int],
    fit_work: Mapping[str, FitWork],
    memory: FitMemory,
) -> Trial:
    """Of a trial that changes all of these tasks; memory: of a fit."""
    models = {name: state.models[name] for name in names}
    whole, in_float32 = distinct_bytes(models), distinct_bytes(state.models) / max(1, state.unmerged_bytes)
    distinct = max(0, whole - int(searched.bytes_saved(names) * in_float32))
    training = bytes_of_training(models, distinct / max(1, whole), max((activations[n] for n in names), default=0))
    united = training["average of weights"] + training["optimizer state"] + distinct if ranks.size() > 1 else 0
    fit_bytes = bytes_of_fit([fit_work[name] for name in names if name in fit_work], memory)
    return Trial(
        undo={"copies to undo a round": whole},
        tied={"weights that a round shares": int(searched.bytes_of_tied(names) * in_float32)},
        copies={"copies of weights in a fit": 2 * distinct} if fit_work else {},
        fits={"images, activations and rows of a fit": fit_bytes},
        training=training,
        written={"state of a round of all ranks": united},
    )


def live_bytes(state: MergeState, names: Collection[str]) -> dict[str, int]:
    """Of the models of these tasks and their unmerged copies, each tensor once."""
    pairs = {"models": state.models, "unmerged copies": state.unmerged}
    return {what: distinct_bytes({name: models[name] for name in names}) for what, models in pairs.items()}


def _cache(options: MergeOptions, tasks: Mapping[str, Task]) -> int:
    """Bytes that samples of one task may take."""
    return options.memory_per_task(len(tasks))


def predict_memory(
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    state: MergeState,
    images: ImageSampler,
    options: MergeOptions,
    searched: Searched,
) -> list[MemoryNeed]:
    """`memory_needs`; where there is less, models of tasks that are searched apart wait, and a warning says it.

    In one process: several have the models of some tasks each.
    """
    needs = memory_needs(tasks, data, state, images, options, searched)
    if len(searched.apart) > 1 and ranks.size() == 1 and any(map(is_short, needs)):
        state.waiting.apart = searched.apart
        needs = _while_others_wait(needs, state, searched)
        where = "in files" if state.device == pick_device("cpu") else "in the memory of the machine"
        log.warning("memory is short: the models of tasks that a round does not change wait %s", where)
    warn_if_short(needs)
    return needs


def _while_others_wait(needs: Sequence[MemoryNeed], state: MergeState, searched: Searched) -> list[MemoryNeed]:
    """The same with the models of the largest set of tasks alone; what waits in files is not counted."""
    there = max((live_bytes(state, part) for part in searched.parts(list(state.models))), key=_sum)
    away = _sum(live_bytes(state, list(state.models))) - _sum(there)
    found = [replace(need, always={**need.always, **there}) for need in needs if need.device == state.device]
    hosts = [need for need in needs if need.device != state.device]
    return [*(replace(need, always={**need.always, "models that wait": away}) for need in hosts), *found]


def is_short(need: MemoryNeed) -> bool:
    """Whether there is less memory than what is predicted."""
    return need.there is not None and need.predicted > need.there


def warn_if_short(needs: Sequence[MemoryNeed]) -> None:
    """Warns of every memory that is smaller than what is predicted, and says what would take less of it."""
    for need in filter(is_short, needs):
        log.warning(
            "memory of the %s: up to %s are predicted, and there are %s: if it runs out, smaller batches "
            "(batch_size of a task), fit_memory or cache_bytes, or several processes take less (docs/multi_gpu.md)",
            *(_name_of(need), mib(need.predicted), mib(need.there or 0)),
        )


def memory_text(needs: Sequence[MemoryNeed]) -> str:
    """A line per memory: what is predicted, of what it is the sum, and what there is."""
    lines = []
    for need in needs:
        parts = ", ".join(f"{what} {mib(size)}" for what, size in need.at_worst.items())
        there = "" if need.there is None else f" of {mib(need.there)}"
        lines.append(wrap(f"memory of the {_name_of(need)}: up to about {mib(need.predicted)}{there}: {parts}"))
    return "\n".join(lines)


def _name_of(need: MemoryNeed) -> str:
    return "machine" if need.device.type == "cpu" else f"device ({need.device.type})"
