"""Walks a traced network and keeps track of how channels lie on the axes of every value.

An operation without a rule fixes every channel that it touches: what is not understood is never permuted.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from gemel.alignment.channel_layouts import Axes, Layout, Layouts, length_of


class Rules(NamedTuple):
    """What to do at a kind of node: rule(walk, node, value[, module]) -> Axes of the value, or of each part of it."""

    modules: Mapping[type[nn.Module], Callable]  # whoever has the same forward follows the same rule
    functions: Mapping[Callable, Callable]
    methods: Mapping[str, Callable]


class Held(NamedTuple):
    """A parameter or buffer that the graph reads by itself."""

    tensor: Tensor


class DoesNotRun(Exception):
    """The network raised an error on the input that it was given."""


class Walk(fx.Interpreter):
    """Interprets a graph under a FakeTensorMode; what it finds goes into `spaces`, `produced` and `unknown`."""

    def __init__(self, graph_module: fx.GraphModule, spaces: Layouts, rules: Rules):
        super().__init__(graph_module, garbage_collect_values=False)
        self.rules = rules
        self.spaces = spaces
        self.layouts: dict[fx.Node, Any] = {}  # Axes of a tensor, a tuple of Axes, a Held, or None
        self.produced: dict[str, Layout] = {}  # layer -> the channels that it puts out
        self.unknown: dict[str, str] = {}  # layer -> why it could not be followed
        self.modules = dict(graph_module.named_modules())

    def run_node(self, node: fx.Node) -> Any:
        try:
            value = super().run_node(node)
        except Exception as error:  # the network's own code
            raise DoesNotRun(node.name) from error
        found = getattr(self, f"_{node.op}")(node, value)
        if isinstance(value, Tensor) and isinstance(found, tuple) and not _fits(found, value):
            found = self.not_understood(node, value)  # a use of the operation that its rule does not know
        self.layouts[node] = found
        return value

    # ---- nodes ------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, value: Any) -> Any:
        return self.fixed(value, "input")

    def _output(self, node: fx.Node, value: Any) -> None:
        self.fix_inputs(node, "output")

    def _get_attr(self, node: fx.Node, value: Any) -> Any:
        owner, _, key = node.target.rpartition(".")
        tensor = getattr(self.module.get_submodule(owner), key)
        return Held(tensor) if isinstance(tensor, Tensor) else None

    def _call_module(self, node: fx.Node, value: Any) -> Any:
        module = self.modules[node.target]
        kind = next((kind for kind in self.rules.modules if type(module).forward is kind.forward), None)
        plain = all(key in module._parameters for key, _ in module.named_parameters()) and not has_hooks(module)
        if kind is None or not plain:
            reason = f"no rule for {type(module).__name__}" + (" with hooks or parametrisation" if kind else "")
            self.unknown[node.target] = reason
            for tensor in [*module.parameters(), *module.buffers()]:
                self.spaces.fix_tensor(tensor, reason)
            return self.not_understood(node, value, reason)
        return self.rules.modules[kind](self, node, value, module)

    def _call_function(self, node: fx.Node, value: Any) -> Any:
        if isinstance(node.target, type) and issubclass(node.target, tuple):  # a named tuple of outputs
            return self.not_understood(node, value, "output")
        rule = self.rules.functions.get(node.target)
        return rule(self, node, value) if rule else self.not_understood(node, value)

    def _call_method(self, node: fx.Node, value: Any) -> Any:
        rule = self.rules.methods.get(node.target)
        return rule(self, node, value) if rule else self.not_understood(node, value)

    # ---- what rules need --------------------------------------------------------------------------------

    def axes(self, node: fx.Node) -> Axes | None:
        """Axes of a tensor in the graph; None for what is no tensor."""
        held = self.layouts[node]
        if not isinstance(held, Held):
            return held
        if not isinstance(held.tensor, nn.Parameter):  # a buffer: tables and masks, whose order is part of the code
            self.spaces.fix_tensor(held.tensor, "a buffer used in arithmetic")
        return tuple(self.spaces.axis_of(held.tensor, axis) for axis in range(held.tensor.ndim))

    def held(self, value: Any) -> Tensor | None:
        """The parameter behind an argument. Raises LookupError if it was computed in the graph."""
        if value is None:
            return None
        if isinstance(value, fx.Node) and isinstance(self.layouts[value], Held):
            return self.layouts[value].tensor
        raise LookupError(f"{value} is no parameter of the model")

    def fixed(self, value: Any, reason: str) -> Any:
        """Axes, all fixed, of a tensor or a sequence of tensors."""
        if isinstance(value, Tensor):
            return tuple(self.spaces.positions(length, reason) for length in value.shape)
        if isinstance(value, (tuple, list)):
            return tuple(self.fixed(part, reason) for part in value)
        return None

    def fix_inputs(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            self._fix_all(self.axes(source), reason)

    def _fix_all(self, found: Any, reason: str) -> None:
        for part in found or ():
            if isinstance(part, tuple) and part and isinstance(part[0], tuple) and not hasattr(part[0], "space"):
                self._fix_all(part, reason)  # the axes of one tensor of a sequence
            elif part:
                self.spaces.fix(part, reason)

    def not_understood(self, node: fx.Node, value: Any, reason: str | None = None) -> Any:
        reason = reason or f"no rule for {label(node)}"
        self.fix_inputs(node, reason)
        return self.fixed(value, reason)

    def fix_axes(self, axes: Axes, reason: str) -> None:
        for layout in axes:
            self.spaces.fix(layout, reason)

    def places(self, shape) -> Axes:
        return tuple(self.spaces.positions(length) for length in shape)


def _fits(found: Axes | Held, value: Tensor) -> bool:
    return isinstance(found, Held) or tuple(map(length_of, found)) == tuple(value.shape)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after the module's own forward, such as pruning or weight normalisation."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def label(node: fx.Node) -> str:
    """The operation of a node, as a reason to give."""
    return node.target if isinstance(node.target, str) else node.target.__name__


def source_of(node: fx.Node) -> fx.Node:
    return argument(node, 0, "input")
