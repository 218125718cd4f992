"""The channel spaces of a model, and permuting them without changing what the model computes.

The model is traced with torch.fx in train and in eval mode, and the graphs are interpreted by graph_walk.py with the
rules of graph_rules.py. Of a model that cannot be traced as a whole (detectors, code that branches on values), each
traceable submodule is analysed by itself, with its input and output fixed. Code that is in no trace, such as a parent
that reads its child's parameters, is not analysed.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gemel.alignment.channel_layouts import Layout, Layouts, identity_of
from gemel.alignment.graph_rules import RULES
from gemel.alignment.graph_walk import DoesNotRun, Walk
from gemel.environment.failures import is_out_of_memory
from gemel.forward.modes import evaluating

BATCH = 2
IMAGE_SIZES = (224, 299, 32, 28, 64, 96, 128, 256, 384, 512)  # tried in this order; some networks take one size only


class Member(NamedTuple):
    """Channels of a space along `axis` of a parameter or buffer, from `offset` on, each `inner` elements long."""

    key: str
    axis: int
    offset: int
    inner: int


@dataclass(frozen=True)
class Space:
    """Channels that can be permuted, in all members in the same way, without changing the function."""

    name: str  # the first layer whose output channels they are
    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class ChannelSpaces:
    """The channel spaces of a model, and the layers whose output channels are fixed: (layer, reason)."""

    spaces: tuple[Space, ...]
    unaligned: tuple[tuple[str, str], ...]


@dataclass
class _Search:
    """Results so far, over all parts of the model and both modes."""

    layouts: Layouts = field(default_factory=Layouts)
    produced: dict[str, Layout] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    visited: set[tuple[int, str]] = field(default_factory=set)  # (module, name of its parameter or buffer)


def find_channel_spaces(model: nn.Module, example: Tensor | None = None) -> ChannelSpaces:
    """The spaces of a model, from its structure alone: no data is run, and no weights are read.

    example: an input of the model, of which only shape and type matter; without it usual image sizes are tried. The
    model's inputs and outputs are fixed, and so are the inputs and outputs of operations without a rule.
    """
    search = _Search()
    with evaluating(model):
        _explore(model, "", search, example)
    _fix_unseen(model, search)
    return ChannelSpaces(_collect(model, search), _unaligned(search))


@torch.no_grad()
def permute(model: nn.Module, space: Space, permutation: Sequence[int]) -> None:
    """Permutes the channels of a space in place: channel permutation[i] becomes channel i. Parameter objects stay.

    Raises ValueError.
    """
    if sorted(map(int, permutation)) != list(range(space.size)):
        raise ValueError(f"{space.name}: permutation: must hold each number from 0 to {space.size - 1} once")
    order = torch.as_tensor(list(map(int, permutation)))
    for member in space.members:
        part = channels_of(tensor_at(model, member.key), space, member)
        part.copy_(part.index_select(member.axis, order.to(part.device)))


def channels_of(tensor: Tensor, space: Space, member: Member) -> Tensor:
    """A view of a member, its axis split into (channels of the space, `inner`)."""
    part = tensor.narrow(member.axis, member.offset, space.size * member.inner)
    return part.unflatten(member.axis, (space.size, member.inner))


def inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes this one."""
    return tuple(sorted(range(len(permutation)), key=lambda i: permutation[i]))


def tensor_at(model: nn.Module, key: str) -> Tensor:
    owner, _, name = key.rpartition(".")
    return getattr(model.get_submodule(owner), name)


# ---- tracing -----------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Traces FrozenBatchNorm2d as one operation, like torch's own layers."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, torchvision.ops.FrozenBatchNorm2d) or super().is_leaf_module(module, name)


def _explore(part: nn.Module, prefix: str, search: _Search, example: Tensor | None) -> None:
    """Analyses a part of the model as a whole, or if it cannot be traced, each of its children by itself."""
    if next(part.parameters(), None) is None:
        return
    if not any(True for _ in part.children()):
        search.unknown[prefix] = "used by code that cannot be traced"
        return
    walks = _walks_of(part, search.layouts, example)
    if walks is None:
        for name, child in part.named_children():
            _explore(child, f"{prefix}{name}" if not prefix else f"{prefix}.{name}", search, None)
        return
    search.layouts = walks[-1].spaces
    for walk in walks:
        _note(part, walk, f"{prefix}." if prefix else "", search)


def _note(part: nn.Module, walk: Walk, prefix: str, search: _Search) -> None:
    search.produced.update({prefix + name: layout for name, layout in walk.produced.items()})
    search.unknown.update({prefix + name: reason for name, reason in walk.unknown.items()})
    for node in walk.graph.nodes:
        if node.op == "call_module":
            for module in walk.modules[node.target].modules():
                search.visited |= {(id(module), key) for key in (*module._parameters, *module._buffers)}
        elif node.op == "get_attr":
            owner, _, key = node.target.rpartition(".")
            search.visited.add((id(part.get_submodule(owner)), key))


def _walks_of(part: nn.Module, layouts: Layouts, example: Tensor | None) -> list[Walk] | None:
    """Walks of the part in eval mode and, where that does something else (auxiliary heads), in train mode.

    None if either cannot be traced. The second starts from the layouts of the first. Both change copies, so that a
    failure leaves the given layouts.
    """
    walks: list[Walk] = []
    evaluated, trained = (_trace(part, training) for training in (False, True))
    traces = [evaluated, trained]
    if evaluated is not None and trained is not None and _steps(evaluated) == _steps(trained):
        traces = [evaluated]
    for traced in traces:
        walk = None if traced is None else _walk(traced, part, walks[-1].spaces if walks else layouts, example)
        if walk is None:
            return None
        walks.append(walk)
    return walks


def _steps(traced: fx.GraphModule) -> list[tuple]:
    """What a traced network does; arguments are values or the names of earlier steps."""
    return [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in traced.graph.nodes]


def _trace(part: nn.Module, training: bool) -> fx.GraphModule | None:
    part.train(training)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(part.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    try:
        with _unchanged_buffers(part):
            return fx.GraphModule(part, _Tracer().trace(part, defaults or None)).eval()
    except Exception as error:  # a user's code may raise anything when it gets proxies; it is then not traceable
        if is_out_of_memory(error):
            raise
        return None
    finally:
        part.eval()


@contextlib.contextmanager
def _unchanged_buffers(part: nn.Module) -> Iterator[None]:
    """Restores buffers: code that counts in train mode (a normalisation of a user's library) counts in a trace, too."""
    before = [(module, {**module._buffers}) for module in part.modules() if module._buffers]
    values = [(buffer, buffer.clone()) for _, own in before for buffer in own.values() if buffer is not None]
    try:
        yield
    finally:
        for module, own in before:
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _walk(traced: fx.GraphModule, part: nn.Module, layouts: Layouts, example: Tensor | None) -> Walk | None:
    """The walk on the first input shape on which the network runs."""
    shapes = [tuple(example.shape)] if example is not None else _input_shapes(part)
    parameter = next(part.parameters())
    defaults = [p.default for p in inspect.signature(part.forward).parameters.values()]
    for shape in shapes:
        walk = Walk(traced, layouts.copy(), RULES)
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(DoesNotRun):
            inputs = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            walk.run(*(inputs if d is inspect.Parameter.empty else d for d in defaults))
            return walk
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses torch's log entry for each shape that does not fit."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _input_shapes(part: nn.Module) -> Iterator[tuple[int, ...]]:
    """Input shapes to try, by the part's first layer."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            yield from ((BATCH, module.in_features), (BATCH, 16, module.in_features))
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            channels = module.num_features if isinstance(module, nn.BatchNorm2d) else module.num_channels
            yield from ((BATCH, channels, size, size) for size in IMAGE_SIZES)
        elif isinstance(module, nn.modules.conv._ConvNd):
            dims = len(module.kernel_size)
            yield from ((BATCH, module.in_channels, *[size] * dims) for size in IMAGE_SIZES)
        else:
            continue
        return


# ---- results -----------------------------------------------------------------------------------------------


def _slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(full key, owner, key, tensor) of every parameter and buffer; one that has several owners comes several times."""
    for name, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield (f"{name}.{key}" if name else key), module, key, tensor


def _fix_unseen(model: nn.Module, search: _Search) -> None:
    """Fixes every tensor that is also held by a module that is in no trace."""
    for _, module, key, tensor in _slots(model):
        if (id(module), key) not in search.visited and identity_of(tensor) in search.layouts.bound:
            search.layouts.fix_tensor(tensor, "a parameter that is also used by code that cannot be traced")


def _collect(model: nn.Module, search: _Search) -> tuple[Space, ...]:
    members: dict[int, list[Member]] = {}
    sizes: dict[int, int] = {}
    seen = set()
    for key, _, _, tensor in _slots(model):
        identity = identity_of(tensor)
        if identity in seen:
            continue
        seen.add(identity)
        for axis, layout in sorted(search.layouts.bound.get(identity, {}).items()):
            offset = 0
            for segment in layout:
                root = search.layouts.root(segment.space)
                if segment.size > 1 and search.layouts.reason(root) is None:
                    members.setdefault(root, []).append(Member(key, axis, offset, segment.inner))
                    sizes[root] = segment.size
                offset += segment.length
    names = _names(search)
    return tuple(
        Space(names.get(root, found[0].key.rpartition(".")[0]), sizes[root], tuple(found))
        for root, found in members.items()
    )


def _names(search: _Search) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, layout in search.produced.items():
        if len(layout) == 1:
            names.setdefault(search.layouts.root(layout[0].space), name)
    return names


def _unaligned(search: _Search) -> tuple[tuple[str, str], ...]:
    """Layers whose output channels are fixed, with the first reason of each."""
    found: dict[str, Any] = {}
    for name, layout in search.produced.items():
        reasons = [search.layouts.reason(segment.space) for segment in layout]
        if any(reasons):
            found[name] = next(reason for reason in reasons if reason)
    return tuple({**found, **search.unknown}.items())
