"""The profile of a merged workload on one device: how long models run and load, what they share, what they allocate.

Saved as edge_profile.json beside the results; the simulator and the choice of batch sizes read it. It holds for the
results, the device and the sizes of images with which it was measured.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemel.edge.activations import peak_bytes
from gemel.edge.counts import Stopwatch
from gemel.edge.frames import Frames
from gemel.edge.runtime import Runtime
from gemel.results_store import files
from gemel.results_store.files import ResultsError
from gemel.results_store.manifest import json_bytes

PROFILE = "edge_profile.json"
FORMAT = 1


@dataclass(frozen=True)
class TaskProfile:
    """Of one model."""

    bytes: int
    shared_bytes: dict[str, int]  # with every other task
    load_ms: float  # all of its weights
    run_ms: dict[int, float]  # by batch size
    input_ms: float  # the transform of one frame
    input: int  # tasks with the same number take the same input: it is made once a frame
    activation_bytes: dict[int, int]  # most at once, by batch size
    group: int | None = None  # tasks with the same number compute their first layers alike
    following_ms: dict[int, float] = field(default_factory=dict)  # where another one of its group ran before it

    def run_seconds(self, batch: int, follows: bool = False) -> float:
        """Of a batch of any size: between the measured ones along straight lines, beyond the largest in proportion.

        follows: whether another task of its group ran on the same frames just before.
        """
        measured = self.following_ms if follows and self.following_ms else self.run_ms
        sizes = list(measured)
        if batch > sizes[-1]:
            return measured[sizes[-1]] * batch / sizes[-1] / 1e3
        return float(np.interp(batch, sizes, list(measured.values()))) / 1e3


@dataclass(frozen=True)
class Profile:
    """Of a workload."""

    store: str  # the file that it was measured with
    device: str
    image_ms: float  # reading or decoding one image of the source
    ms_per_tensor: float  # of loading
    ms_per_mib: float
    tasks: dict[str, TaskProfile]

    def load_seconds(self, num_tensors: int, num_bytes: int) -> float:
        """Of reading so many tensors of so many bytes together."""
        return (self.ms_per_tensor * num_tensors + self.ms_per_mib * num_bytes / (1 << 20)) / 1e3

    @property
    def groups(self) -> list[list[str]]:
        """Tasks that compute their first layers alike."""
        numbers = sorted({task.group for task in self.tasks.values() if task.group is not None})
        return [[name for name, task in self.tasks.items() if task.group == number] for number in numbers]

    def write(self, results: str | Path) -> Path:
        """Writes it into the results folder. Raises ResultsError if that is refused."""
        file = Path(results) / PROFILE
        files.write(file, [json_bytes({"format": FORMAT, **asdict(self)})])
        return file


def read_profile(results: str | Path, store: str) -> Profile:
    """The profile of a results folder. Raises ResultsError if there is none, or if it is of other results."""
    file = Path(results) / PROFILE
    if not file.is_file():
        raise ResultsError(f"{file}: not found; `python -m gemel edge profile` measures it")
    try:
        with files.naming(file, "read"):
            content = json.loads(file.read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError(f"format: allowed: {FORMAT}")
        tasks = {name: _task_profile(record) for name, record in content.pop("tasks").items()}
        profile = Profile(tasks=tasks, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResultsError(f"{file}: is no profile: {error}; measure it again") from None
    if profile.store != store:
        raise ResultsError(f"{file}: is of {profile.store}, the results are {store}; measure it again")
    return profile


def _task_profile(record: dict[str, Any]) -> TaskProfile:
    for name in ("run_ms", "activation_bytes", *(["following_ms"] if "following_ms" in record else [])):
        record[name] = {int(size): record[name][size] for size in sorted(record[name], key=int)}
    return TaskProfile(**record)


# ---- measuring ------------------------------------------------------------------------------------------


def measure(runtime: Runtime, source: Iterable, sizes: Sequence[int] = (1, 2, 4, 8), repeats: int = 5) -> Profile:
    """Measures every model alone, on frames of the source; medians of `repeats` after one that warms up.

    A model's weights are read anew before each of its runs, as in a turn: what ran before has left the caches.
    sizes: of batches, ascending. Raises ValueError if the source has fewer frames than the largest batch.
    """
    frames = Frames(source, runtime.transforms)
    if (there := frames.read_until(sizes[-1])) < sizes[-1]:
        raise ValueError(f"frames: got {there}; allowed: at least {sizes[-1]}, the largest batch")
    runtime.weights.start_counting()
    loads: list[tuple[int, int, float]] = []
    inputs = {id(transform): i for i, transform in enumerate({id(t): t for t in runtime.transforms.values()}.values())}
    tasks = {}
    for task in runtime.kinds:
        load = partial(_load, runtime, task, loads)
        tasks[task] = _measure_task(runtime, frames, task, sizes, repeats, load, inputs[id(runtime.transforms[task])])
        runtime.weights.start_counting()
    runtime.find_common_layers(frames)
    for i, group in enumerate(runtime.common.groups):
        for task, following_ms in _measure_group(runtime, frames, list(group), sizes, repeats).items():
            tasks[task] = replace(tasks[task], group=i, following_ms=following_ms)
    runtime.weights.start_counting()
    per_tensor, per_mib = _fit_loading(loads)
    clock = runtime.options.clock
    image_ms = statistics.median(_timed(clock, partial(_image, source, frames, k)) for k in range(sizes[-1]))
    store = runtime.weights.manifest["store"]["file"]
    return Profile(store, str(runtime.device), image_ms, per_tensor, per_mib, tasks)


def _measure_task(
    runtime: Runtime,
    frames: Frames,
    task: str,
    sizes: Sequence[int],
    repeats: int,
    load: Callable[[], float],
    number: int,
) -> TaskProfile:
    """load: reads the model's weights anew; milliseconds."""
    clock = runtime.options.clock
    blocks, images = runtime.blocks, [frames.input(task, k) for k in range(sizes[-1])]
    transform, image = runtime.transforms[task], frames.image(0)
    run_ms, activations, load_ms = {}, {}, []
    for size in sizes:
        run = partial(runtime.forward, task, images[:size])
        times = [(load(), _timed(clock, run)) for _ in range(repeats + 1)][1:]
        load_ms += [ms for ms, _ in times]
        run_ms[size] = round(statistics.median(ms for _, ms in times), 4)
        activations[size] = peak_bytes(run)
    return TaskProfile(
        bytes=blocks.bytes_of(task),
        shared_bytes={other: blocks.shared_bytes(task, other) for other in runtime.kinds if other != task},
        load_ms=round(statistics.median(load_ms), 4),
        run_ms=run_ms,
        input_ms=round(statistics.median(_timed(clock, partial(transform, image)) for _ in range(repeats)), 4),
        input=number,
        activation_bytes=activations,
    )


def _measure_group(
    runtime: Runtime, frames: Frames, group: Sequence[str], sizes: Sequence[int], repeats: int
) -> dict[str, dict[int, float]]:
    """Task -> batch size -> milliseconds behind the tasks before it; of the first task behind all others."""
    found: dict[str, dict[int, float]] = {task: {} for task in group}
    for size in sizes:
        for order, measured in ((group, group[1:]), (group[::-1], group[:1])):
            times: dict[str, list[float]] = {task: [] for task in group}
            for task in [*order] * (repeats + 1):
                runtime.weights.start_counting()
                runtime.weights.load(runtime.blocks.needs[task])
                images = [frames.input(task, k) for k in range(size)]
                run = partial(runtime.answer, task, images, range(size))
                times[task].append(_timed(runtime.options.clock, run))
            for task in measured:
                found[task][size] = round(statistics.median(times[task][1:]), 4)
    return found


def _load(runtime: Runtime, task: str, loads: list[tuple[int, int, float]]) -> float:
    """Reads a model's weights anew; milliseconds. Notes (tensors, bytes, milliseconds) of every block."""
    runtime.weights.start_counting()
    clock = runtime.options.clock
    total = 0.0
    for i in runtime.blocks.needs[task]:
        block = runtime.blocks.all[i]
        loads.append((len(block.keys), block.bytes, _timed(clock, partial(runtime.weights.load, [i]))))
        total += loads[-1][2]
    return total


def _fit_loading(loads: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """(ms per tensor, ms per MiB), least squares; neither below zero."""
    found = np.array([(tensors, size / (1 << 20)) for tensors, size, _ in loads], float)
    times = np.array([ms for *_, ms in loads])
    per_tensor, per_mib = np.linalg.lstsq(found, times, rcond=None)[0]
    if per_tensor < 0:
        per_tensor, per_mib = 0.0, times.sum() / found[:, 1].sum()
    elif per_mib < 0:
        per_tensor, per_mib = times.sum() / found[:, 0].sum(), 0.0
    return round(float(per_tensor), 6), round(float(per_mib), 6)


def _image(source: Iterable, frames: Frames, k: int) -> Any:
    return source[k % len(source)] if isinstance(source, Sequence) else frames.image(k)


def _timed(clock: Callable[[], Stopwatch], run: Callable[[], object]) -> float:
    watch = clock()
    run()
    return watch() * 1e3
