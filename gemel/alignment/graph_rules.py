"""The rules of a Walk: the layout of the output of each operation of a traced network, given those of its inputs."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gemel.alignment.channel_layouts import Axes, Layout, length_of
from gemel.alignment.graph_walk import Rules, Walk, argument, label, source_of

# ---- layers with parameters --------------------------------------------------------------------------------


def linear(walk: Walk, node: fx.Node, out: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Axes:
    *batch, channels = walk.axes(source_of(node))
    walk.spaces.bind(weight, 1, channels, name)
    produced = walk.spaces.bind(bias, 0, walk.spaces.axis_of(weight, 0), name)
    walk.produced[name] = produced
    return (*batch, produced)


def convolution(walk: Walk, node: fx.Node, out: Tensor, weight: Tensor, bias: Tensor | None, name: str, **kind) -> Axes:
    """kind: groups, transposed. Depthwise convolutions keep their input's channels; other grouped ones are fixed."""
    spaces, axes = walk.spaces, walk.axes(source_of(node))
    channel = out.ndim - (weight.ndim - 2) - 1
    walk.fix_axes(axes[channel + 1 :], f"spatial axis of {name}")
    groups, transposed = kind["groups"], kind["transposed"]
    num_in, num_out = length_of(axes[channel]), out.shape[channel]
    if groups == 1:
        spaces.bind(weight, 0 if transposed else 1, axes[channel], name)
        produced = spaces.bind(bias, 0, spaces.axis_of(weight, 1 if transposed else 0), name)
    elif groups == num_in and (num_in == num_out or not transposed):
        times = num_out // num_in
        through = tuple(segment._replace(inner=segment.inner * times) for segment in axes[channel])
        produced = spaces.bind(bias, 0, spaces.bind(weight, 0, through, name), name)
    else:
        reason = "grouped convolution"
        for tensor in (weight, *([] if bias is None else [bias])):
            spaces.fix_tensor(tensor, reason)
        spaces.fix(axes[channel], reason)
        produced = spaces.positions(num_out, reason)
    walk.produced[name] = produced
    return (*axes[:channel], produced, *walk.positions(out.shape[channel + 1 :]))


def channel_norm(walk: Walk, node: fx.Node, tensors: list[Tensor | None], name: str, groups: int | None = None) -> Axes:
    """Batch, group and instance normalisation, whose tensors have one value per channel of axis 1.

    groups: of a group normalisation; unless there is one, or one per channel, the channels are fixed.
    """
    axes = walk.axes(source_of(node))
    for tensor in tensors:
        walk.spaces.bind(tensor, 0, axes[1], name)
    if groups not in (None, 1, length_of(axes[1])):
        walk.spaces.fix(axes[1], "group normalisation")
    return axes


def last_norm(walk: Walk, node: fx.Node, shape, tensors: list[Tensor | None], name: str) -> Axes:
    """Layer and RMS normalisation over the last axes: their statistics do not depend on the order of channels."""
    axes = walk.axes(source_of(node))
    over = len(shape) if isinstance(shape, (tuple, list, torch.Size)) else 1
    for tensor in tensors:
        for axis in range(over):
            walk.spaces.bind(tensor, axis, axes[len(axes) - over + axis], name)
    return axes


def _linear_module(walk, node, out, m):
    return linear(walk, node, out, m.weight, m.bias, node.target)


def _convolution_module(walk, node, out, m):
    return convolution(walk, node, out, m.weight, m.bias, node.target, groups=m.groups, transposed=m.transposed)


def _batch_norm_module(walk, node, out, m):
    return channel_norm(walk, node, [m.weight, m.bias, m.running_mean, m.running_var], node.target)


def _group_norm_module(walk, node, out, m):
    return channel_norm(walk, node, [m.weight, m.bias], node.target, m.num_groups)


def _layer_norm_module(walk, node, out, m):
    return last_norm(walk, node, m.normalized_shape, [m.weight, getattr(m, "bias", None)], node.target)


def _prelu_module(walk, node, out, m):
    return channel_norm(walk, node, [m.weight] if m.weight.numel() > 1 else [], node.target)


def _functional(rule: Callable, *parameters: tuple[int, str]) -> Callable:
    """A rule for a function that takes its parameters as arguments; there is none for weights that are computed."""

    def follow(walk: Walk, node: fx.Node, out: Any) -> Any:
        try:
            tensors = [walk.stored_tensor(argument(node, position, name)) for position, name in parameters]
        except LookupError:
            return walk.without_rule(node, out, f"{label(node)} with a computed weight")
        return rule(walk, node, out, *tensors)

    return follow


def _linear_function(walk, node, out, *tensors):
    return linear(walk, node, out, *tensors, node.name)


def _convolution_function(walk, node, out, *tensors):
    groups = argument(node, 6, "groups", 1)
    return convolution(walk, node, out, *tensors, node.name, groups=groups, transposed=False)


def _batch_norm_function(walk, node, out, *tensors):
    return channel_norm(walk, node, list(tensors), node.name)


def _group_norm_function(walk, node, out, *tensors):
    return channel_norm(walk, node, list(tensors), node.name, argument(node, 1, "num_groups"))


def _layer_norm_function(walk, node, out, *tensors):
    return last_norm(walk, node, argument(node, 1, "normalized_shape"), list(tensors), node.name)


# ---- operations without parameters -------------------------------------------------------------------------


def elementwise(walk: Walk, node: fx.Node, out: Any, *_) -> Any:
    """Values that are combined element by element, with broadcasting: their axes are unified."""
    if isinstance(out, (tuple, list)):
        return walk.without_rule(node, out)
    if not isinstance(out, Tensor):
        return walk.fixed(out, "numbers, not channels")
    result: list[Layout | None] = [None] * out.ndim
    for axes in map(walk.axes_or_none, node.all_input_nodes):
        for axis, layout in enumerate(reversed(axes or ()), 1):
            if length_of(layout) == out.shape[-axis]:
                before = result[-axis]
                result[-axis] = layout if before is None else walk.spaces.unify(before, layout, label(node))
    return tuple(layout or walk.spaces.positions(length) for layout, length in zip(result, out.shape, strict=True))


def spatial(walk: Walk, node: fx.Node, out: Any, *_) -> Any:
    """Pooling and resizing: the spatial axes change, batch and channels stay."""
    if not isinstance(out, Tensor) or out.ndim != 4:
        return walk.without_rule(node, out)
    axes = walk.axes(source_of(node))
    walk.fix_axes(axes[2:], f"spatial axis of {label(node)}")
    return (*axes[:2], *walk.positions(out.shape[2:]))


def pad(walk: Walk, node: fx.Node, out: Tensor) -> Axes:
    axes = walk.axes(source_of(node))
    padded = len(argument(node, 1, "pad")) // 2
    walk.fix_axes(axes[len(axes) - padded :], "padded axis")
    return (*axes[: len(axes) - padded], *walk.positions(out.shape[len(axes) - padded :]))


def reduce(walk: Walk, node: fx.Node, out: Any) -> Any:
    """Mean, sum and others whose result does not depend on the order along the reduced axes."""
    dims = argument(node, 1, "dim")
    if not isinstance(out, Tensor) or dims is None or isinstance(dims, (bool, torch.dtype)):
        return walk.without_rule(node, out)
    axes = walk.axes(source_of(node))
    dims = {dim % len(axes) for dim in (dims if isinstance(dims, (tuple, list)) else [dims])}
    if out.ndim == len(axes):
        return tuple(walk.spaces.positions(1) if i in dims else layout for i, layout in enumerate(axes))
    return tuple(layout for i, layout in enumerate(axes) if i not in dims)


def concatenate(walk: Walk, node: fx.Node, out: Tensor) -> Axes:
    tensors = argument(node, 0, "tensors")
    parts: list[Axes] = (
        list(walk.axes_or_none(tensors)) if isinstance(tensors, fx.Node) else [walk.axes(part) for part in tensors]
    )
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0)) % out.ndim
    result = list(parts[0])
    for other in parts[1:]:
        for axis, layout in enumerate(other):
            joined = walk.spaces.unify(result[axis], layout, label(node)) if axis != dim else (*result[dim], *layout)
            result[axis] = joined
    return tuple(result)


def split(walk: Walk, node: fx.Node, out: tuple) -> tuple[Axes, ...]:
    """chunk, split and tensor_split."""
    axes = walk.axes(source_of(node))
    dim = argument(node, 2, "dim", 0) % len(axes)
    parts, start = [], 0
    for piece in out:
        stop = start + piece.shape[dim]
        parts.append((*axes[:dim], walk.spaces.slice(axes[dim], start, stop, label(node)), *axes[dim + 1 :]))
        start = stop
    return tuple(parts)


def reshape(walk: Walk, node: fx.Node, out: Tensor, *_) -> Axes:
    return walk.spaces.reshape(walk.axes(source_of(node)), out.shape, label(node))


def reorder(walk: Walk, node: fx.Node, out: Tensor) -> Axes:
    """permute: args are (input, dims) or (input, *dims)."""
    axes = walk.axes(source_of(node))
    dims: Any = node.kwargs.get("dims", node.args[1:])
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return tuple(axes[dim] for dim in dims)


def transpose(walk: Walk, node: fx.Node, out: Tensor) -> Axes:
    axes = list(walk.axes(source_of(node)))
    a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def expand(walk: Walk, node: fx.Node, out: Tensor) -> Axes:
    axes = walk.axes(source_of(node))
    shape = [length_of(layout) for layout in axes]
    padded = [*[None] * (out.ndim - len(axes)), *zip(axes, shape, strict=True)]
    return tuple(
        old[0] if old and old[1] == length else walk.spaces.positions(length)
        for old, length in zip(padded, out.shape, strict=True)
    )


def get_item(walk: Walk, node: fx.Node, out: Any) -> Any:
    source, index = source_of(node), argument(node, 1, "index")
    found = walk.axes_or_none(source)
    if found is None:  # an item of a shape
        return walk.fixed(out, "numbers, not channels")
    if not isinstance(walk.env[source], Tensor):
        return found[index] if isinstance(index, int) else walk.without_rule(node, out)
    return _index(walk, node, out, found, index if isinstance(index, tuple) else (index,))


def _index(walk: Walk, node: fx.Node, out: Tensor, axes: Axes, index: tuple) -> Axes:
    if not all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in index):
        return walk.without_rule(node, out)
    named = sum(item is not None and item is not Ellipsis for item in index)
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    result, left = [], list(axes)
    for item in index:
        if item is Ellipsis:
            rest = len(axes) - named
            result += left[:rest]
            left = left[rest:]
        elif item is None:
            result.append(walk.spaces.positions(1))
        elif isinstance(item, int):
            walk.spaces.fix(left.pop(0), f"{label(node)} takes one of the channels")
        else:
            result.append(_slice(walk, node, left.pop(0), item))
    return tuple(result)


def _slice(walk: Walk, node: fx.Node, layout: Layout, item: slice) -> Layout:
    if any(isinstance(part, fx.Node) for part in (item.start, item.stop, item.step)):
        start, stop, step = (walk.env[p] if isinstance(p, fx.Node) else p for p in (item.start, item.stop, item.step))
        item = slice(start, stop, step)
    start, stop, step = item.indices(length_of(layout))
    if step == 1:
        return walk.spaces.slice(layout, start, max(start, stop), label(node))
    walk.spaces.fix(layout, f"{label(node)} takes some of the channels")
    return walk.spaces.positions(len(range(start, stop, step)))


def numbers(walk: Walk, node: fx.Node, out: Any) -> Any:
    """Shapes, devices and assertions about them do not depend on the order of channels."""
    return None if not isinstance(out, Tensor) else walk.without_rule(node, out)


def _getattr(walk: Walk, node: fx.Node, out: Any) -> Any:
    return (
        numbers(walk, node, out)
        if node.args[1] in ("shape", "ndim", "device", "dtype")
        else walk.without_rule(node, out)
    )


# ---- tables ------------------------------------------------------------------------------------------------

_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softmax, nn.LogSoftmax),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    torchvision.ops.StochasticDepth,
)
_POOLS = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.LPPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.ZeroPad2d,
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, torchvision.ops.FrozenBatchNorm2d)

_METHODS_AND_FUNCTIONS = (
    *("relu", "relu_", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "abs", "neg", "square", "reciprocal", "pow"),
    *("clamp", "clamp_min", "clamp_max", "softmax", "log_softmax", "where", "lerp"),
    *("add", "sub", "mul", "div", "true_divide", "maximum", "minimum"),
)
_METHODS = (
    *("add_", "sub_", "mul_", "div_", "clamp_", "sigmoid_", "tanh_"),
    *("contiguous", "clone", "detach", "float", "half", "double", "bfloat16", "to", "type_as"),
)
_ELEMENTWISE_FUNCTIONS = (
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.sigmoid, F.tanh),
    *(F.hardtanh, F.hardswish, F.hardsigmoid, F.softmax, F.log_softmax, F.normalize),
    *(F.dropout, F.dropout2d, F.alpha_dropout, torchvision.ops.stochastic_depth),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.neg),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
)
_POOL_FUNCTIONS = (
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, torch.max_pool2d),
)
_WEIGHT_AND_BIAS = ((1, "weight"), (2, "bias"))
_NORM_WEIGHT_AND_BIAS = ((2, "weight"), (3, "bias"))
_BATCH_NORM_TENSORS = ((3, "weight"), (4, "bias"), (1, "running_mean"), (2, "running_var"))

MODULE_RULES: dict[type[nn.Module], Callable] = {
    **dict.fromkeys(_ELEMENTWISE_MODULES, elementwise),
    **dict.fromkeys(_POOLS, spatial),
    **dict.fromkeys(_CONVOLUTIONS, _convolution_module),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm_module),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _layer_norm_module),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), reshape),
    nn.GroupNorm: _group_norm_module,
    nn.Linear: _linear_module,
    nn.PReLU: _prelu_module,
}
FUNCTION_RULES: dict[Callable, Callable] = {
    **dict.fromkeys((*_ELEMENTWISE_FUNCTIONS, *(getattr(torch, name) for name in _METHODS_AND_FUNCTIONS)), elementwise),
    **dict.fromkeys(_POOL_FUNCTIONS, spatial),
    **dict.fromkeys((torch.mean, torch.sum, torch.amax, torch.amin), reduce),
    **dict.fromkeys((torch.cat, torch.concat), concatenate),
    **dict.fromkeys((torch.chunk, torch.split, torch.tensor_split), split),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten), reshape),
    **dict.fromkeys((torch.transpose, torch.swapaxes), transpose),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _functional(_convolution_function, *_WEIGHT_AND_BIAS)),
    F.linear: _functional(_linear_function, *_WEIGHT_AND_BIAS),
    F.batch_norm: _functional(_batch_norm_function, *_BATCH_NORM_TENSORS),
    F.group_norm: _functional(_group_norm_function, *_NORM_WEIGHT_AND_BIAS),
    F.layer_norm: _functional(_layer_norm_function, *_NORM_WEIGHT_AND_BIAS),
    F.pad: pad,
    torch.permute: reorder,
    operator.getitem: get_item,
    getattr: _getattr,
    torch._assert: numbers,
}
METHOD_RULES: dict[str, Callable] = {
    **dict.fromkeys((*_METHODS_AND_FUNCTIONS, *_METHODS), elementwise),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), reduce),
    **dict.fromkeys(("chunk", "split", "tensor_split"), split),
    **dict.fromkeys(("flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten"), reshape),
    **dict.fromkeys(("transpose", "swapaxes"), transpose),
    **dict.fromkeys(("expand", "expand_as"), expand),
    **dict.fromkeys(("size", "dim", "numel", "ndimension"), numbers),
    "permute": reorder,
}
RULES = Rules(MODULE_RULES, FUNCTION_RULES, METHOD_RULES)
