"""Layers that several tasks compute alike on the same frames, run once: later tasks get the outputs of the first one.

At the start of a run every model is traced on the first frame (gemel/forward/trace.py). Models whose entries, that is,
the inputs of their first layers, are equal there, and which compute the same up to some point, are a group. When a
task of a group runs, what others need is kept; when the next one runs on the same frames, and its own entry is equal in
every bit, it goes on from there. So the answers are those of the whole models, whatever the transforms are. What is
kept counts as activations, not against the budget of weights; it is of one batch of frames a group.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gemel.edge.counts import Stopwatch
from gemel.edge.stopping import Stopped
from gemel.forward.hooks import hooked
from gemel.forward.trace import Point, Trace, trace
from gemel.sharing.computation import Member, members_of, with_equal_entries

log = logging.getLogger(__name__)


@dataclass
class SharedCounts:
    """What was computed once for several tasks."""

    reused: dict[str, int]  # task -> frames whose first layers it did not run
    seconds_saved: float = 0.0  # what those layers took when they ran, less what taking over their outputs took
    peak_bytes: int = 0  # most that was kept at once


@dataclass
class _Kept:
    """Of the frames that the tasks of a group ran on last."""

    left: set[str]  # tasks that have not run on these frames yet
    frames: range = range(0)
    entry: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)  # by number
    seconds: dict[str, float] = field(default_factory=dict)  # from the entry on until there, by number

    @property
    def bytes(self) -> int:
        tensors = self.outputs.values() if self.entry is None else (self.entry, *self.outputs.values())
        return sum(tensor.nbytes for tensor in tensors)

    def clear(self) -> None:
        self.frames, self.entry, self.outputs, self.seconds = range(0), None, {}, {}


class CommonLayers:
    """The groups of a run, and what is kept for them."""

    def __init__(self, groups: Sequence[Mapping[str, Member]], clock: Callable[[], Stopwatch]):
        self.groups = groups
        self.now = clock()
        self._group_of = {task: i for i, group in enumerate(groups) for task in group}
        self._kept = [_Kept(set(group)) for group in groups]
        self.counts = SharedCounts(dict.fromkeys(self._group_of, 0))

    def run(self, task: str, model: nn.Module, run: Callable[[], Any], frames: range) -> Any:
        """What run() returns, which runs the model on these frames; layers run only where no other task ran them."""
        if task not in self._group_of:
            return run()
        number = self._group_of[task]
        kept = self._kept[number]
        one = _Pass(self, model, self.groups[number][task], kept, frames)
        with one.watching():
            outputs = run()
        if one.taken is not None:
            self.counts.reused[task] += len(frames)
            self.counts.seconds_saved += one.seconds_saved
        self.counts.peak_bytes = max(self.counts.peak_bytes, sum(other.bytes for other in self._kept))
        kept.left.discard(task)
        if not kept.left:
            kept.clear()
        return outputs

    def begin(self, number: int, frames: range, entry: Tensor) -> None:
        """Keeps outputs for these frames from now on, and those for others no longer."""
        kept = self._kept[number]
        kept.clear()
        kept.left, kept.frames, kept.entry = set(self.groups[number]), frames, entry.clone()

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "groups": [
                {"tasks": list(group), "share": {task: round(member.share, 4) for task, member in group.items()}}
                for group in self.groups
            ],
            "frames": dict(self.counts.reused),
            "seconds_saved": round(self.counts.seconds_saved, 6),
            "peak_bytes": self.counts.peak_bytes,
        }


class _Pass:
    """One forward pass of a task of a group."""

    def __init__(self, layers: CommonLayers, model: nn.Module, member: Member, kept: _Kept, frames: range):
        self.layers, self.model, self.member, self.kept, self.frames = layers, model, member, kept, frames
        self.taken: Point | None = None  # where it goes on
        self.entered: float | None = None  # when
        self.seconds_saved = 0.0
        self.seconds_before = 0.0  # that what is skipped took

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within, modules of the model give and take outputs."""
        names = {name for point in self.member.points for name in point.skipped} | set(self.member.gives)
        modules = {name: self.model.get_submodule(name) for name in names}
        own = {name: vars(module).get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            module.forward = _replaced(self._forward, name, module.forward)
        try:
            with hooked(self.model, names, self._ended):
                yield
        finally:
            for name, module in modules.items():
                del module.forward
                if (forward := own[name]) is not None:
                    module.forward = forward

    def _forward(self, name: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.entered is None:
            self._enter(args[0])
        if self.taken is None or name not in self.taken.skipped:
            return forward(*args, **kwargs)
        like = next(iter(self.kept.outputs.values()))  # its values are replaced, or not used: a mistake shows as NaN
        return like.new_full((len(self.frames), *self.taken.skipped[name]), torch.nan)

    def _ended(self, name: str, module: nn.Module, inputs: tuple, output: Any) -> Any:
        """The hook behind every module that gives or takes."""
        if self.taken is not None and name in self.taken.skipped:
            number = self.taken.needed.get(name)
            if number is None:
                return None
            output = self.kept.outputs[number].clone()  # what follows may write to it
            self.seconds_saved = self.seconds_before - self._seconds()
            return output
        if (number := self.member.gives.get(name)) is not None and number not in self.kept.outputs:
            self.kept.outputs[number] = output.clone()
            self.kept.seconds[number] = self.seconds_before + self._seconds()
        return None

    def _enter(self, entry: Tensor) -> None:
        """Decides where to go on."""
        self.entered = 0.0
        self.entered = self._seconds()
        kept = self.kept
        same = kept.entry is not None and kept.frames == self.frames and kept.entry.shape == entry.shape
        if same and torch.equal(kept.entry, entry):  # type: ignore[arg-type]
            for point in self.member.points:
                if all(number in kept.outputs for number in point.needed.values()):
                    self.taken = point
                    self.seconds_before = max(kept.seconds[number] for number in point.needed.values())
                    return
        else:
            self.layers.begin(self.layers._kept.index(kept), self.frames, entry)

    def _seconds(self) -> float:
        """Since the entry."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        assert self.entered is not None
        return self.layers.now() - self.entered


def _replaced(forward: Callable, name: str, own: Callable) -> Callable:
    return lambda *args, **kwargs: forward(name, own, *args, **kwargs)


# ---- finding groups -------------------------------------------------------------------------------------


def find_groups(traces: Mapping[str, Trace]) -> list[dict[str, Member]]:
    """The groups of tasks that compute their first layers alike on the frame on which they were traced."""
    return [group for tasks in with_equal_entries(traces) for group in members_of(traces, tasks)]


def traced(task: str, model: nn.Module, images: Any, keys: Mapping[str, str]) -> Trace | None:
    """The model's trace; None, with a warning, if the model cannot be traced.

    keys: state-dict key -> what stands for the content of that tensor.
    """

    def label(name: str, tensor: Tensor) -> object:
        return keys.get(name) or (str(tensor.dtype), tuple(tensor.shape), tensor.tolist())

    try:
        return trace(model, images, label)
    except Stopped:
        raise
    except Exception as error:  # a user's model may do anything
        log.warning("%s: shares no computation: its layers cannot be followed: %s", task, error)
        return None


def same_bits(one: Any, other: Any) -> bool:
    """Whether two outputs of a model are equal, with equal values that are no number."""
    pairs = list(zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True))
    return all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else a == b
        for a, b in pairs
    )
