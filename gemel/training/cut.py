"""Where a classifier is cut in two: after the last module before its tied layers whose output is all the rest needs.

Found by running a copy of the model, whatever its architecture, and checked by running the modules after the cut with
NaN in place of all outputs before it except that one. Not for detectors: the padding of an image depends on the others
in its batch, and necks read the outputs of early layers.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from gemel.environment.seeds import seeded
from gemel.forward.hooks import EndForward, hooked, run_until_end
from gemel.forward.modes import deep_copy, evaluating

MIN_SHARE = 0.15  # of a model's multiplications before the cut: with less, reading a stored output takes as long


@dataclass(frozen=True)
class Cut:
    """Where a model is cut."""

    last: str  # the module whose output is all that the rest needs
    skipped: dict[str, torch.Size]  # modules before the cut, `last` among them -> shape of their output for one image

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """All modules before the cut."""
        return [module for name in self.skipped for module in model.get_submodule(name).modules()]

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for name in self.skipped for p in model.get_submodule(name).parameters()]

    def output(self, model: nn.Module, forward: Callable, images: Tensor) -> Tensor:
        """The output of `last` for these images, in eval mode, without gradients.

        forward: that of the model, or the one that it had before it was replaced.
        """
        reached: list[Tensor] = []

        def stop(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
            reached.append(output)
            raise EndForward

        in_float32 = torch.autocast(images.device.type, enabled=False)  # kept outputs serve steps in any precision
        with torch.no_grad(), in_float32, evaluating(model), hooked(model, [self.last], stop):
            run_until_end(forward, images)
        return reached[0]

    @contextlib.contextmanager
    def given(self, model: nn.Module, output: Tensor) -> Iterator[None]:
        """Within, the modules before the cut do not run: `last` returns `output`, the others return NaN."""
        modules = {name: model.get_submodule(name) for name in self.skipped}
        own = {name: vars(module).get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            nan = output.new_full((), torch.nan).expand(len(output), *self.skipped[name])
            value = output if name == self.last else nan
            module.forward = lambda *args, value=value, **kwargs: value
        try:
            yield
        finally:
            for name, module in modules.items():
                del module.forward
                if (forward := own[name]) is not None:
                    module.forward = forward


# ---- where to cut ---------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call of a module in a forward pass."""

    name: str
    began: int  # counted over the beginnings and ends of all calls
    outer: "_Call | None"  # the call within which it began
    ended: int = -1
    shape: torch.Size | None = None  # of its output; None: no tensor


class Cuts:
    """Where one model can be cut, found by running copies of it on the images [N, 3, H, W], N at least 2.

    Depends on the model's modules and how they are called, not on its weights.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.model, self.images = model, images
        with torch.no_grad(), evaluating(model):
            self.calls = _record_calls(model, images)
        self.found: dict[int, Cut | None] = {}  # by the time at which the first tied layer is called

    def before(self, tied: Collection[str]) -> Cut | None:
        """The latest cut before all tied layers.

        None if there is none, or if less than MIN_SHARE of the model's multiplications are before it.
        """
        first = _first_call(self.calls, tied) if tied else 0
        if first not in self.found:
            self.found[first] = self._search(first)
        return self.found[first]

    def _search(self, first: int) -> Cut | None:
        before = _skippable(self.calls, first, len(self.images))
        if not before:
            return None
        probe = deep_copy(self.model)
        with torch.no_grad(), evaluating(probe):
            for end in range(len(before), 0, -1):
                cut = Cut(before[end - 1][0].name, {call.name: shape[1:] for call, shape in before[:end]})
                if _is_sufficient(probe, cut, self.images):
                    return cut if _share_before(probe, cut, self.images) >= MIN_SHARE else None
        return None


def _record_calls(model: nn.Module, images: Tensor) -> list[_Call]:
    """Every call of a module within one forward pass, in the order in which they begin."""
    calls: list[_Call] = []
    open_calls: list[_Call] = []
    clock = itertools.count()

    def begin(name: str, module: nn.Module, inputs: tuple) -> None:
        calls.append(_Call(name, next(clock), open_calls[-1] if open_calls else None))
        open_calls.append(calls[-1])

    def end(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        call = open_calls.pop()
        call.ended = next(clock)
        call.shape = output.shape if torch.is_tensor(output) else None

    names = [name for name, _ in model.named_modules() if name]
    with hooked(model, names, begin, before=True), hooked(model, names, end):
        model(images)
    return calls


def _first_call(calls: list[_Call], tied: Collection[str]) -> int:
    """When the first tied layer is called; for one that is never called, as in attention, when its parent is."""
    began: dict[str, int] = {}
    for call in calls:
        began.setdefault(call.name, call.began)
    times = []
    for layer in tied:
        while layer and layer not in began:
            layer = layer.rpartition(".")[0]
        times.append(began.get(layer, 0))
    return min(times)


def _skippable(calls: list[_Call], first: int, num_images: int) -> list[tuple[_Call, torch.Size]]:
    """The outermost calls that end before `first`, with the shapes of their outputs, in order.

    They end at the first call that cannot be skipped: of a module that is called several times, or whose output is not
    a tensor with a row per image.
    """
    times_called: dict[str, int] = {}
    for call in calls:
        times_called[call.name] = times_called.get(call.name, 0) + 1
    found: list[tuple[_Call, torch.Size]] = []
    for call in calls:
        if not 0 <= call.ended < first or (call.outer is not None and 0 <= call.outer.ended < first):
            continue
        if times_called[call.name] > 1 or call.shape is None or call.shape[:1] != (num_images,):
            break
        found.append((call, call.shape))
    return found


def _shares_parameters(model: nn.Module, cut: Cut) -> bool:
    """Whether a module after the cut uses a parameter of a module before it."""
    before = {id(module) for module in cut.modules(model)}
    others = {id(p) for m in model.modules() if id(m) not in before for p in m.parameters(recurse=False)}
    return any(id(parameter) in others for parameter in cut.parameters(model))


def _is_sufficient(model: nn.Module, cut: Cut, images: Tensor) -> bool:
    """Whether the rest of the model depends on the output at the cut alone, in evaluation and in training.

    All other outputs before the cut are NaN, and so are the images: whatever is computed from them is NaN as well.
    """
    if isinstance(model.get_submodule(cut.last), nn.modules.dropout._DropoutNd) or _shares_parameters(model, cut):
        return False  # the rest is to be trained with dropout, which a cut in eval mode would leave out
    nan = torch.full_like(images, torch.nan)
    output = cut.output(model, model.forward, images)
    try:
        if not _is_close(_rest(model, cut, output, nan), model(images)):
            return False
        with seeded(0, "cut"):  # dropout draws
            trained = deep_copy(model).train()  # a copy: its statistics change
            return _is_finite(_rest(trained, cut, output, nan))
    except Exception:  # a user's forward may raise anything when modules are skipped
        return False


def _rest(model: nn.Module, cut: Cut, output: Tensor, images: Tensor) -> Any:
    with cut.given(model, output.clone()):
        return model(images)


def _is_finite(outputs: Any) -> bool:
    tensors = [value for value in pytree.tree_leaves(outputs) if torch.is_tensor(value)]
    return bool(tensors) and all(bool(tensor.isfinite().all()) for tensor in tensors)


def _is_close(outputs: Any, expected: Any) -> bool:
    pairs = list(zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True))
    scales = [float(b.abs().max()) for _, b in pairs]
    return _is_finite(outputs) and all(
        float((a - b).abs().max()) <= 1e-3 * scale for (a, b), scale in zip(pairs, scales, strict=True)
    )


def _share_before(model: nn.Module, cut: Cut, images: Tensor) -> float:
    """Share of the model's multiplications that are before the cut."""
    output = cut.output(model, model.forward, images)
    with FlopCounterMode(display=False) as whole:
        model(images)
    with FlopCounterMode(display=False) as rest:
        _rest(model, cut, output, images)
    return 1 - rest.get_total_flops() / max(1, whole.get_total_flops())
