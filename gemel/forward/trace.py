"""What a forward pass computes, operation by operation, and after which modules the rest needs few of their outputs.

Every tensor of the pass has a number that stands for how it was computed: from which parameters, by which operations
with which settings, all the way from the entry, which is the input of the first module that has parameters. So two
tensors of two models with one number are equal, whatever the modules are called. Source: value numbering (Alpern,
Wegman, Zadeck, "Detecting equality of variables in programs", POPL 1988), here over the operations of PyTorch.
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from gemel.forward.hooks import hooked
from gemel.forward.modes import evaluating

Labels = Callable[[str, Tensor], Hashable]  # (state-dict name, tensor) -> what stands for a parameter or buffer
ENTRY = "entry"
MOST_NEEDED = 8  # tensors
_UNKNOWN = itertools.count()  # of all passes: the id of one that has gone may be that of another


@dataclass(frozen=True)
class Point:
    """A moment within the pass; all that comes later needs a few outputs of modules, and nothing else of before."""

    needed: dict[str, str]  # module -> number of its output
    skipped: dict[str, torch.Size]  # modules that need not run, those of `needed` too -> shape of one image's output
    flops: int  # of the model from its start to here, for one image

    @property
    def last(self) -> str:
        """The module that ends here."""
        return next(reversed(self.skipped))


@dataclass(frozen=True)
class Trace:
    """Of one forward pass."""

    entry: Tensor | None  # [N, ...], a copy; None: the first module with parameters does not take one tensor
    points: tuple[Point, ...]  # in the order of the pass
    outputs: dict[str, tuple[str, ...]]  # number -> modules, called once, that put out that tensor, a row per image
    flops: int  # of the whole model, for one image


@dataclass
class _Value:
    """What a tensor holds between two writes to it."""

    number: str
    made: int  # the operation that made it, counted from 0
    read: float = -1  # the last operation that read it
    disturbed: int = -1  # the last operation that wrote to it through another tensor in the same memory


@dataclass
class _Call:
    """One call of a module."""

    name: str
    began: int  # over the beginnings and ends of all calls
    before: int  # operations done when it began
    argument: Tensor | None  # its one argument, where that is a tensor
    ended: int = -1
    operations: int = 0  # done when it ended
    flops: int = 0
    shape: torch.Size | None = None  # of its output; None: no tensor
    output: _Value | None = None


class _Numbering(TorchDispatchMode):
    """Numbers the tensors of a pass. Holds all of them until the pass is over, so that none takes another's id."""

    def __init__(self, labels: dict[int, str]):
        super().__init__()
        self.labels = labels  # id of a parameter or buffer -> its number
        self.values: dict[int, _Value] = {}  # by id of the tensor
        self.all: list[_Value] = []
        self.held: list[Tensor] = []
        self.storages: dict[int, list[Tensor]] = {}
        self.operations = self.flops = 0
        self.leaks: list[int] = []  # operations whose result is no tensor: Python may decide by it what comes next

    def unique(self) -> str:
        """A number that no other tensor of any pass has."""
        return f"unknown {next(_UNKNOWN)}"

    def hold(self, tensor: Tensor, number: str) -> _Value:
        """Gives a tensor a new value, made by the operation that runs now."""
        if id(tensor) not in self.values:
            self.held.append(tensor)
            self.storages.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        self.values[id(tensor)] = value = _Value(number, self.operations)
        self.all.append(value)
        return value

    def value(self, tensor: Tensor) -> _Value:
        """What a tensor holds now; one that was made elsewhere is like no other, unless it has a label."""
        if id(tensor) not in self.values:
            value = self.hold(tensor, self.labels.get(id(tensor)) or self.unique())
            value.made = -1
        return self.values[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [tensor for tensor in pytree.tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        self.operations += 1
        numbers = []
        for tensor in given:
            self.value(tensor).read = self.operations
            numbers.append(self.value(tensor).number)
        output = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
        settings = pytree.tree_map(lambda leaf: "tensor" if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        number = _digest(str(func).replace("_.", "."), settings, numbers)  # relu_ computes what relu does
        if torch.Tag.nondeterministic_seeded in func.tags:
            number = self.unique()
        written = _written(func, args, kwargs)
        for i, tensor in enumerate(written):
            self._write(tensor, _digest(number, i))
        made = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if not made:
            self.leaks.append(self.operations)
        for i, tensor in enumerate(made):
            if not any(tensor is other for other in (*written, *given)):
                self.hold(tensor, _digest(number, i))
        return output

    def _write(self, tensor: Tensor, number: str) -> None:
        """Others that lie in the same memory have changed in a way that is not followed."""
        for other in self.storages.get(tensor.untyped_storage()._cdata, ()):
            if other is not tensor:
                value = self.values[id(other)]
                value.number, value.disturbed = self.unique(), self.operations
        self.value(tensor)
        self.hold(tensor, number)


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operation writes to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class _Calls:
    """The calls of modules within a pass, and its entry; `begin` and `end` are hooks."""

    def __init__(self, numbering: _Numbering):
        self.numbering = numbering
        self.all: list[_Call] = []
        self.open: list[_Call] = []
        self.entry: Tensor | None = None  # the tensor itself
        self.copied: Tensor | None = None  # with what it held
        self.entered = -1  # operations done before it was used
        self._clock = itertools.count()

    def begin(self, name: str, module: nn.Module, inputs: tuple) -> None:
        one = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None
        if self.entered < 0 and any(True for _ in module.parameters(recurse=False)):
            self.entered = self.numbering.operations
            if one is not None:
                self.entry = one
                self.numbering.hold(one, ENTRY)
                with _disable_current_modes():
                    self.copied = one.clone()
        self.all.append(_Call(name, next(self._clock), self.numbering.operations, one))
        self.open.append(self.all[-1])

    def end(self, name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        call = self.open.pop()
        call.ended, call.operations, call.flops = next(self._clock), self.numbering.operations, self.numbering.flops
        if isinstance(output, Tensor):
            call.shape, call.output = output.shape, self.numbering.value(output)

    def once(self, num_images: int) -> list[_Call]:
        """The calls of modules that are called once and put out a row per image."""
        times = Counter(call.name for call in self.all)
        return [c for c in self.all if times[c.name] == 1 and c.shape is not None and c.shape[:1] == (num_images,)]


def trace(model: nn.Module, images: Any, labels: Labels) -> Trace:
    """Traces model(images) in eval mode; images: [N, ...] or a list of N, N at least 2.

    labels: what stands for a parameter or buffer; equal ones stand for equal values. Raises whatever the model raises.
    """
    named = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    numbering = _Numbering({id(tensor): _digest(labels(name, tensor)) for name, tensor in named.items()})
    calls = _Calls(numbering)
    names = [name for name, _ in model.named_modules() if name]
    with torch.no_grad(), evaluating(model), hooked(model, names, calls.begin, before=True):
        with hooked(model, names, calls.end), numbering:
            outputs = model(images)
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                numbering.value(leaf).read = math.inf
    flops = numbering.flops // len(images)
    if calls.entry is None:
        return Trace(None, (), {}, flops)
    return Trace(calls.copied, tuple(_points(calls, len(images))), _outputs(calls, len(images)), flops)


def _outputs(calls: _Calls, num_images: int) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for call in calls.once(num_images):
        if call.output is not None:
            found[call.output.number] = (*found.get(call.output.number, ()), call.name)
    return found


# ---- where the rest needs a few tensors alone -----------------------------------------------------------


def _points(calls: _Calls, num_images: int) -> Iterator[Point]:
    """In the order of the pass."""
    once = {id(call) for call in calls.once(num_images)}
    outermost: list[_Call] = []  # of those that have ended
    for end in sorted((c for c in calls.all if c.before >= calls.entered and c.ended >= 0), key=lambda c: c.ended):
        while outermost and outermost[-1].began > end.began:
            outermost.pop()
        outermost.append(end)
        if not all(id(call) in once for call in outermost) or outermost[0].argument is not calls.entry:
            continue
        needed = _needed(calls, end, outermost)
        if needed is not None and 0 < len(needed) <= MOST_NEEDED:
            skipped = {call.name: call.shape[1:] for call in outermost if call.shape is not None}
            yield Point(needed, skipped, end.flops // num_images)


def _needed(calls: _Calls, end: _Call, outermost: list[_Call]) -> dict[str, str] | None:
    """What is read after the end of a call, of all that was made from the entry on: outputs of the outermost calls.

    None if other tensors are read, or if Python has seen values of tensors.
    """
    numbering, entered, now = calls.numbering, calls.entered, end.operations
    if any(entered < leak <= now for leak in numbering.leaks):
        return None
    found: dict[str, str] = {}
    for value in numbering.all:
        if not (entered < value.made <= now and value.read > now):
            continue
        of_module = [call for call in outermost if call.output is value]
        if not of_module or value.disturbed > now:
            return None
        found[of_module[-1].name] = value.number
    return found
