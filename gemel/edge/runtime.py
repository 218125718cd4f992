"""Runs the models of a results folder in turn on frames, under a budget of memory for their weights.

    from gemel.edge import Runtime

    with Runtime("results", memory=600 << 20) as runtime:
        summary = runtime.run(frames, fps=10, sla=0.1, on_result=print)

A turn: weights of the model that are not in memory are read, evicting what is needed last; the model runs on the frames
that it can still answer in time; meanwhile a thread (on a GPU: and a stream) reads weights of the next model. Outputs
are those of the models loaded whole, bit by bit: the same tensors go through the same modules.
"""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemel.edge.arrivals import Arrivals
from gemel.edge.blocks import Blocks
from gemel.edge.common_layers import CommonLayers, find_groups, same_bits, traced
from gemel.edge.counts import Counts, Stopwatch, counts_of
from gemel.edge.frames import Frames, Transform, default_transform
from gemel.edge.residency import Move, Step
from gemel.edge.stopping import Stopped, stop_at_layers
from gemel.edge.turns import Turns, neighbouring
from gemel.edge.two_stores import TwoStores, task_of, unmerged_name, with_unmerged
from gemel.edge.watch import Watch, WatchOptions
from gemel.edge.weights import Weights
from gemel.environment.device import pick_device
from gemel.evaluation.agreement import agreement_of
from gemel.results_store.files import UNMERGED
from gemel.sharing.computation import Member
from gemel.workload import DETECTION

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The answer of a task for one frame."""

    task: str
    frame: int
    output: Any  # a classifier's row of logits [K]; a detector's dictionary
    latency: float  # seconds from the frame's arrival to the answer
    in_time: bool
    unmerged: bool = False  # by its unmerged model, to which the task went back


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
    shared_computation: bool = True  # run layers once that several tasks compute alike on the same frames
    watch: WatchOptions | None = None  # compare with the unmerged models on sampled frames


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
        options_of_weights = (tasks, models, self.options.merged, self.options.through_cache)
        merged = Weights(results, self.device, *options_of_weights)
        self.weights: Weights | TwoStores = merged
        if self.options.watch is not None:
            self.weights = with_unmerged(merged, self.options.watch.store or Path(results) / UNMERGED, models)
        self.blocks: Blocks = self.weights.blocks
        self.budget = self.weights.default_budget if memory is None else memory
        records = merged.manifest["tasks"]
        self.kinds: dict[str, str] = {task: records[task]["task"] for task in merged.models}
        self.transforms = {kind: default_transform(kind, None) for kind in set(self.kinds.values())}
        self.transforms = {task: self.transforms[kind] for task, kind in self.kinds.items()} | dict(transforms or {})
        _check_batches(self.options.batches or {}, self.kinds)
        self.common = CommonLayers([], self.options.clock)
        self._turns(dict.fromkeys(self.kinds, Arrivals(1, None, 1, 1)))  # raises for a wrong budget or order
        self._stop = self.weights.stop
        self._hooks = [end for model in self.weights.models.values() for end in stop_at_layers(model, self._stop)]
        self._reader = ThreadPoolExecutor(1, "weights")
        self._ahead: Future | None = None

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread that reads weights, closes the store, and removes its hooks from the models."""
        self._reader.shutdown()
        for end in self._hooks:
            end()
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
        if self.options.watch is not None:
            records = self.weights.manifest["tasks"]
            counts.watch = Watch(self.options.watch, {task: records[task] for task in self.kinds})
        if on_counts is not None:
            on_counts(counts)
        self._stop.clear()
        with contextlib.suppress(Stopped):  # the run ends at once then
            self.find_common_layers(source)
        self.weights.start_counting()
        run = _Run(self, source, self._turns(arrivals), counts, on_result or (lambda result: None))
        run.until_the_end(max_turns)
        said = {"turns": run.turns.number, "fps": fps, "sla_seconds": sla}
        return {**self.describe(), **said, **counts.summary(), "shared_computation": self.common.summary()}

    def describe(self) -> dict[str, Any]:
        """How models are run: budget, order, batches."""
        order = self.options.order or neighbouring(list(self.kinds), self.common.groups)
        return {
            "merged": self.options.merged,
            "budget_bytes": self.budget,
            "distinct_bytes": self.weights.workload_bytes,
            "order": list(order),
            "batches": {task: (self.options.batches or {}).get(task, 1) for task in order},
            "device": str(self.device),
        }

    def _turns(self, arrivals: Mapping[str, Arrivals]) -> Turns:
        groups = self.common.groups
        return Turns(self.blocks, self.options.order, self.budget, arrivals, self.options.eager, groups)

    # ---- moving weights -----------------------------------------------------------------------------------

    def enter(self, step: Step) -> None:
        """Moves what the step's model needs, after what was being read ahead has arrived."""
        self.move(step.enter)

    def move(self, move: Move) -> None:
        """Moves weights, after what was being read ahead has arrived."""
        if self._ahead is not None:
            self._ahead.result()
            self._ahead = None
        self._move(move)

    def read_ahead(self, step: Step) -> None:
        """Begins to read weights of the next model."""
        if step.prefetch.loaded:
            self._ahead = self._reader.submit(self._move, step.prefetch)

    def _move(self, move: Move) -> None:
        self.weights.evict(move.evicted)
        self.weights.load(move.loaded)
        assert self.weights.resident_bytes <= self.budget, "more in memory than the budget"

    # ---- running a model ----------------------------------------------------------------------------------

    def forward(self, model: str, inputs: Sequence[Tensor]) -> list[Any]:
        """The outputs of a model whose weights are in memory, one a frame, on its device. Raises Stopped.

        model: the name of its task, or as `unmerged_name` gives it.
        """
        with torch.inference_mode():
            outputs = self.weights.models[model](self._as_batch(task_of(model), inputs))
            outputs = list(getattr(outputs, "logits", outputs))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return outputs

    def answer(self, model: str, inputs: Sequence[Tensor], frames: range) -> list[Any]:
        """As `forward`, but layers whose outputs another task has for these frames do not run."""
        return self.common.run(model, self.weights.models[model], lambda: self.forward(model, inputs), frames)

    def _as_batch(self, task: str, inputs: Sequence[Tensor]) -> Tensor | list[Tensor]:
        images = [image.to(self.device) for image in inputs]
        return images if self.kinds[task] == DETECTION else torch.stack(images)

    # ---- shared computation -------------------------------------------------------------------------------

    def find_common_layers(self, source: Frames) -> None:
        """Finds what tasks compute alike on the first frame (`common`); each model is in memory alone meanwhile.

        Nothing without frames, or where the models are to run as if they were not merged.
        """
        self.common, keys = CommonLayers([], self.options.clock), self._content_keys()
        wanted = self.options.shared_computation and self.options.merged and len(keys) > 1
        if not wanted or source.read_until(1) < 1:
            return
        traces = {}
        for task, own in keys.items():
            with self._alone(task):
                found = traced(task, self.weights.models[task], self._as_batch(task, [source.input(task, 0)] * 2), own)
            if found is not None:
                traces[task] = found
        exact = [group for group in find_groups(traces) if self._is_exact(group, source)]
        self.common = CommonLayers(exact, self.options.clock)

    def _content_keys(self) -> dict[str, dict[str, str]]:
        """Task -> state-dict key -> what stands for the content; only tasks that have a tensor in common with others.

        A store key is a digest of the content, and a number where there are several such tensors.
        """
        stored = self.weights.manifest["tensors"]
        keys = {task: {name: key.partition(".")[0] for name, key in stored[task].items()} for task in self.kinds}
        users = Counter(content for own in keys.values() for content in set(own.values()))
        return {task: own for task, own in keys.items() if any(users[content] > 1 for content in own.values())}

    def _is_exact(self, group: Mapping[str, Member], source: Frames) -> bool:
        """Whether all answers for the first frame are those of the whole models, bit by bit; warns if not."""
        self.common = CommonLayers([group], self.options.clock)
        for task in group:
            with self._alone(task):
                inputs = [source.input(task, 0)]
                if not same_bits(self.forward(task, inputs), self.answer(task, inputs, range(1))):
                    log.warning("%s share no computation: %s would answer otherwise", ", ".join(group), task)
                    return False
        return True

    @contextlib.contextmanager
    def _alone(self, task: str) -> Iterator[None]:
        """Within, the weights of this model are in memory, and no others."""
        self.weights.start_counting()
        self.weights.load(self.blocks.needs[task])
        try:
            yield
        finally:
            self.weights.evict(self.weights.resident())


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
        taken, dropped = self.turns.take(task, began)
        counted.dropped += dropped
        model = self.turns.models[task]
        inputs = {k: self.frames.input(task, k) for k in taken}
        try:
            outputs = self.runtime.answer(model, list(inputs.values()), taken)
        except Stopped:
            counted.dropped += len(taken)
            return
        ended = self.now()
        arrivals.ran(ended - began)
        counted.run_seconds += ended - began
        for k, output in zip(taken, outputs, strict=True):
            latency = ended - k / arrivals.fps
            counted.answered(latency, arrivals.sla)
            in_time = arrivals.sla is None or latency <= arrivals.sla
            self.on_result(Result(task, k, output, latency, in_time, model != task))
        if self.counts.watch is not None:
            self._compare(self.counts.watch, task, inputs, dict(zip(taken, outputs, strict=True)))
        self._count_bytes()
        self.frames.forget(min(a.following for a in self.turns.arrivals.values()))

    def _compare(self, watch: Watch, task: str, inputs: Mapping[int, Tensor], merged: Mapping[int, Any]) -> None:
        """Runs the unmerged model on the sampled ones of the frames that were just answered."""
        if not (sampled := watch.samples(task, inputs)):
            return
        began, name = self.now(), unmerged_name(task)
        self.runtime.move(self.turns.visit(name))
        try:
            unmerged = self.runtime.forward(name, [inputs[k] for k in sampled])
        except Stopped:
            return
        for k, output in zip(sampled, unmerged, strict=True):
            if watch.observe(task, k, agreement_of(self.runtime.kinds[task], merged[k], output)):
                self.turns.serve_by(task, name)
        self.counts.tasks[task].watch_seconds += self.now() - began

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
