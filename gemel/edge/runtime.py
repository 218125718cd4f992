"""Runs the models of a results folder in turn on frames, under a budget of memory for their weights.

    from gemel.edge import Runtime

    with Runtime("results", memory=600 << 20) as runtime:
        summary = runtime.run(frames, fps=10, sla=0.1, on_result=print)

A turn: weights of the model that are not in memory are read, evicting what is needed last; the model runs on the frames
that it can still answer in time; meanwhile a thread (on a GPU: and a stream) reads weights of the next model. Outputs
are those of the models loaded whole, bit by bit: the same tensors go through the same modules.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemel.edge.arrivals import Arrivals
from gemel.edge.blocks import Blocks
from gemel.edge.counts import Counts, Stopwatch, counts_of
from gemel.edge.frames import Frames, Transform, default_transform
from gemel.edge.residency import Move, Step
from gemel.edge.stopping import Stopped, stop_at_layers
from gemel.edge.turns import Turns
from gemel.edge.weights import Weights
from gemel.environment.device import pick_device
from gemel.workload import DETECTION


@dataclass(frozen=True)
class Result:
    """The answer of a task for one frame."""

    task: str
    frame: int
    output: Any  # a classifier's row of logits [K]; a detector's dictionary
    latency: float  # seconds from the frame's arrival to the answer
    in_time: bool


@dataclass(frozen=True)
class RuntimeOptions:
    """How the models of a results folder are run."""

    device: str = "auto"
    order: Sequence[str] | None = None  # of the turns; None: as in the results
    batches: Mapping[str, int] | None = None  # most frames of a turn, by task; 1 where it is missing
    merged: bool = True  # False: every model has weights of its own
    eager: bool = False  # load the next model early even where that moves more bytes
    clock: Callable[[], Stopwatch] = Stopwatch  # made at the start of a run; counts.py has another one
    through_cache: bool = True  # False: the system forgets what was read from the store's file


class Runtime:
    """The models of a results folder, run in turn under a budget.

    memory: bytes that their weights may take; None: all of them. models: by task, where the results name no
    architecture. transforms: by task, image -> float tensor [3, H, W] on the CPU; without one torchvision's usual
    values, and the size of the image. options: as RuntimeOptions.
    Raises ResultsError as `load_merged` does, and ValueError for a budget below the largest model or a wrong option.
    """

    def __init__(
        self,
        results: str | Path,
        memory: int | None = None,
        tasks: Sequence[str] | None = None,
        models: Mapping[str, nn.Module] | None = None,
        transforms: Mapping[str, Transform] | None = None,
        **options: Any,
    ):
        self.options = RuntimeOptions(**options)
        self.device = pick_device(self.options.device)
        self.weights = Weights(results, self.device, tasks, models, self.options.merged, self.options.through_cache)
        self.blocks: Blocks = self.weights.blocks
        self.budget = self.blocks.distinct_bytes if memory is None else memory
        records = self.weights.manifest["tasks"]
        self.kinds: dict[str, str] = {task: records[task]["task"] for task in self.blocks.needs}
        self.transforms = {kind: default_transform(kind, None) for kind in set(self.kinds.values())}
        self.transforms = {task: self.transforms[kind] for task, kind in self.kinds.items()} | dict(transforms or {})
        _check_batches(self.options.batches or {}, self.kinds)
        self._turns(dict.fromkeys(self.kinds, Arrivals(1, None, 1, 1)))  # raises for a wrong budget or order
        self._stop = self.weights.stop
        for model in self.weights.models.values():
            stop_at_layers(model, self._stop)
        self._reader = ThreadPoolExecutor(1, "weights")
        self._ahead: Future | None = None

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread that reads weights, and closes the store."""
        self._reader.shutdown()
        self.weights.close()

    def stop(self) -> None:
        """Ends `run` after the layer that runs now; may be called from a signal handler or another thread.

        Frames of a batch that is given up count as dropped.
        """
        self._stop.set()

    def run(
        self,
        frames: Iterable,
        fps: float,
        sla: float | None = None,
        count: int | None = None,
        seconds: float | None = None,
        max_turns: int | None = None,
        on_result: Callable[[Result], object] | None = None,
        on_counts: Callable[[Counts], object] | None = None,
    ) -> dict[str, Any]:
        """Runs until the frames end, or until `stop`; returns the summary.

        frames: a sequence, which is repeated, or an iterable; frame k arrives k / fps seconds after the start. sla:
        seconds within which a frame is to be answered; None: no frame is dropped. count: frames of the stream;
        seconds: its duration. max_turns: ends after so many. on_counts: called once, at the start, with the counts,
        which change as frames are answered.
        """
        total = min(math.inf if count is None else count, math.inf if seconds is None else math.ceil(seconds * fps))
        if total == math.inf and isinstance(frames, Sequence):
            total = len(frames)
        batches = self.options.batches or {}
        arrivals = {task: Arrivals(fps, sla, batches.get(task, 1), total) for task in self.kinds}
        source, counts = Frames(frames, self.transforms), counts_of(self.kinds)
        if on_counts is not None:
            on_counts(counts)
        self.weights.start_counting()
        self._stop.clear()
        run = _Run(self, source, self._turns(arrivals), counts, on_result or (lambda result: None))
        run.until_the_end(max_turns)
        return {**self.describe(), "turns": run.turns.number, "fps": fps, "sla_seconds": sla, **counts.summary()}

    def describe(self) -> dict[str, Any]:
        """How models are run: budget, order, batches."""
        order = self.options.order or list(self.kinds)
        return {
            "merged": self.options.merged,
            "budget_bytes": self.budget,
            "distinct_bytes": self.blocks.distinct_bytes,
            "order": list(order),
            "batches": {task: (self.options.batches or {}).get(task, 1) for task in order},
            "device": str(self.device),
        }

    def _turns(self, arrivals: Mapping[str, Arrivals]) -> Turns:
        return Turns(self.blocks, self.options.order, self.budget, arrivals, self.options.eager)

    # ---- moving weights -----------------------------------------------------------------------------------

    def enter(self, step: Step) -> None:
        """Moves what the step's model needs, after what was being read ahead has arrived."""
        if self._ahead is not None:
            self._ahead.result()
            self._ahead = None
        self._move(step.enter)

    def read_ahead(self, step: Step) -> None:
        """Begins to read weights of the next model."""
        if step.prefetch.loaded:
            self._ahead = self._reader.submit(self._move, step.prefetch)

    def _move(self, move: Move) -> None:
        self.weights.evict(move.evicted)
        self.weights.load(move.loaded)
        assert self.weights.resident_bytes <= self.budget, "more in memory than the budget"

    # ---- running a model ----------------------------------------------------------------------------------

    def forward(self, task: str, inputs: Sequence[Tensor]) -> list[Any]:
        """The outputs of a model whose weights are in memory, one a frame, on its device. Raises Stopped."""
        images = [image.to(self.device) for image in inputs]
        with torch.inference_mode():
            if self.kinds[task] == DETECTION:
                outputs = self.weights.models[task](images)
            else:
                outputs = self.weights.models[task](torch.stack(images))
            outputs = list(getattr(outputs, "logits", outputs))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return outputs


def _check_batches(batches: Mapping[str, int], tasks: Iterable[str]) -> None:
    wrong = {task: size for task, size in batches.items() if task not in tasks or type(size) is not int or size < 1}
    if wrong:
        raise ValueError(f"batches: got {wrong}; allowed: whole numbers of at least 1, for {', '.join(tasks)}")


class _Run:
    """One call of `Runtime.run`."""

    def __init__(
        self, runtime: Runtime, frames: Frames, turns: Turns, counts: Counts, on_result: Callable[[Result], object]
    ):
        self.runtime, self.frames, self.turns, self.counts, self.on_result = runtime, frames, turns, counts, on_result
        self.now = runtime.options.clock()

    def until_the_end(self, max_turns: int | None) -> None:
        try:
            while not self.runtime._stop.is_set() and (turn := self.turns.next()) is not None:
                self._take(*turn)
                if self.turns.number == max_turns:
                    break
        finally:
            if self.runtime._ahead is not None:
                self.runtime._ahead.result()
                self.runtime._ahead = None
            self.counts.seconds = self.now()
            self._count_bytes()
            for task, arrivals in self.turns.arrivals.items():  # what arrived and was not answered
                self._is_there(arrivals.num_arrived(self.counts.seconds))
                self.counts.tasks[task].dropped += arrivals.drop_arrived(self.counts.seconds)

    def _take(self, task: str, step: Step) -> None:
        """One turn."""
        counted, arrivals = self.counts.tasks[task], self.turns.arrivals[task]
        began = self.now()
        self.runtime.enter(step)
        counted.turns += 1
        counted.swap_seconds += self.now() - began
        self.runtime.read_ahead(step)
        if not self._wait_until(arrivals.next_arrival):
            return
        if not self._is_there(arrivals.num_wanted(self.now())) and arrivals.is_exhausted:
            return
        began = self.now()
        taken, dropped = arrivals.take(began)
        counted.dropped += dropped
        try:
            outputs = self.runtime.forward(task, [self.frames.input(task, k) for k in taken])
        except Stopped:
            counted.dropped += len(taken)
            return
        ended = self.now()
        arrivals.ran(ended - began)
        counted.run_seconds += ended - began
        for k, output in zip(taken, outputs, strict=True):
            latency = ended - k / arrivals.fps
            counted.answered(latency, arrivals.sla)
            self.on_result(Result(task, k, output, latency, arrivals.sla is None or latency <= arrivals.sla))
        self._count_bytes()
        self.frames.forget(min(a.following for a in self.turns.arrivals.values()))

    def _count_bytes(self) -> None:
        self.counts.bytes_moved = self.runtime.weights.moved_bytes
        self.counts.peak_resident_bytes = self.runtime.weights.peak_bytes

    def _is_there(self, count: int) -> bool:
        """Whether the source has that many frames; if it ended before, no task waits for more than it had."""
        there = self.frames.read_until(count)
        if there < count:
            for arrivals in self.turns.arrivals.values():
                arrivals.count = min(arrivals.count, there)
        return there == count

    def _wait_until(self, arrival: float) -> bool:
        """Waits for a frame; whether it came before the run was stopped."""
        while (left := arrival - self.now()) > 0:
            if self.runtime._stop.is_set():
                return False
            self.now.wait(self.runtime._stop, left)
        return not self.runtime._stop.is_set()
