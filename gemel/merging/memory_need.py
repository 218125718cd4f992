"""How much memory a merge is predicted to take, before anything is trained, beside what it then took.

Every part is the most that it can be: all tasks in one trial, and nothing tied. What is tied is there once, so a round
that ties much takes less. Fits and training are never there at the same time: the larger one counts.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemel.datasets.loaders import TaskData
from gemel.environment import ranks
from gemel.environment.device import pick_device
from gemel.environment.memory import memory_there, memory_used, peak_memory
from gemel.environment.units import mib
from gemel.merging import earlier_merges
from gemel.merging.console import wrap
from gemel.merging.images import ImageSampler
from gemel.merging.measured_memory import bytes_of_fits, bytes_of_samples, bytes_of_training
from gemel.merging.options import LEAST_SQUARES, MergeOptions
from gemel.merging.state import MergeState
from gemel.sharing.holders import own_models
from gemel.sharing.memory import distinct_bytes
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
    def predicted(self) -> int:
        return sum(self.at_worst.values())

    def to_plain(self) -> dict[str, Any]:
        """As JSON values, with the most that was used so far; with several ranks, of the rank that used most."""
        used = max(ranks.gathered(peak_memory(self.device)))
        sizes = {"available_bytes": self.there, "predicted_bytes": self.predicted, "used_bytes": used}
        return {"memory_of": self.device.type, **sizes, "parts": self.at_worst}


def memory_needs(
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    state: MergeState,
    images: ImageSampler,
    options: MergeOptions,
) -> list[MemoryNeed]:
    """What this rank is predicted to take of the machine's memory and of its device's, if that has one of its own.

    Runs every task of this rank forward on a few images of train; the models stay as they are.
    """
    own = {name: tasks[name] for name in ranks.taking_part(tasks)}
    models = distinct_bytes(own_models(state.models))
    live = {"models": models, "unmerged copies": distinct_bytes(own_models(state.unmerged))}
    came = {"models as they came": earlier_merges.bytes_kept(task.model for task in tasks.values())}
    loaded = {"samples in memory": sum(bytes_of_samples(data[name], _cache(options, tasks)) for name in own)}
    kept = {**came, **loaded, "copies to undo a round": models}
    fits, fit_work = {}, {}
    if options.initial_weights == LEAST_SQUARES:
        fits = {"copies of weights in a fit": 2 * models}
        fit_work = {"images, activations and rows of a fit": bytes_of_fits(own, data, state, images)}
    training = bytes_of_training(own, data, state, options)
    written = {
        "state of a round that is written": training["average of weights"] + training["optimizer state"] + models
    }
    machine = pick_device("cpu")
    if state.device == machine:
        other = {"the rest of the process": max(0, memory_used(machine) - sum({**live, **came}.values()))}
        phases = {FITS: {**fits, **fit_work}, TRAINING: {**training, **written}}
        return [MemoryNeed(machine, {**live, **kept, **other}, phases, memory_there(machine))]
    other = {"the process": max(0, memory_used(machine) - sum(came.values()))}
    return [
        MemoryNeed(machine, {**other, **kept}, {FITS: fits, TRAINING: written}, memory_there(machine)),
        MemoryNeed(state.device, live, {FITS: fit_work, TRAINING: training}, memory_there(state.device)),
    ]


def _cache(options: MergeOptions, tasks: Mapping[str, Task]) -> int:
    """Bytes that samples of one task may take."""
    return options.memory_per_task(len(tasks))


def warn_if_short(needs: Sequence[MemoryNeed]) -> None:
    """Warns of every memory that is smaller than what is predicted, and says what would take less of it."""
    for need in needs:
        if need.there is not None and need.predicted > need.there:
            log.warning(
                "memory of the %s: up to %s are predicted, and there are %s: if it runs out, smaller batches "
                "(batch_size of a task), fit_memory or cache_bytes, or several processes take less (docs/multi_gpu.md)",
                *(_name_of(need), mib(need.predicted), mib(need.there)),
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
