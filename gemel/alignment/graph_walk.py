"""Interprets a traced network and follows which channels lie along the axes of every value.

An operation without a rule fixes the channels of its inputs and outputs, so they are never permuted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from gemel.alignment.channel_layouts import Axes, Layout, Layouts, length_of
from gemel.environment.failures import is_out_of_memory


class Rules(NamedTuple):
    """The rule of each operation: rule(walk, node, value[, module]) -> Axes of the value, or of each of its parts."""

    modules: Mapping[type[nn.Module], Callable]  # also for subclasses that do not override forward
    functions: Mapping[Callable, Callable]
    methods: Mapping[str, Callable]


class StoredTensor(NamedTuple):
    """A parameter or buffer that the graph reads directly, not through a module."""

    tensor: Tensor


class DoesNotRun(Exception):
    """The network raised an error on the given input."""


class Walk(fx.Interpreter):
    """Interprets a graph under a FakeTensorMode; results are in `spaces`, `produced` and `unknown`."""

    def __init__(self, graph_module: fx.GraphModule, spaces: Layouts, rules: Rules):
        super().__init__(graph_module, garbage_collect_values=False)
        self.rules = rules
        self.spaces = spaces
        self.layouts: dict[fx.Node, Any] = {}  # Axes of a tensor, a tuple of Axes, a StoredTensor, or None
        self.produced: dict[str, Layout] = {}  # layer -> layout of its output channels
        self.unknown: dict[str, str] = {}  # layer -> why its channels are not known
        self.modules = dict(graph_module.named_modules())

    def run_node(self, node: fx.Node) -> Any:
        try:
            value = super().run_node(node)
        except Exception as error:  # the network's own code
            if is_out_of_memory(error):
                raise
            raise DoesNotRun(node.name) from error
        found = getattr(self, f"_{node.op}")(node, value)
        if isinstance(value, Tensor) and isinstance(found, tuple) and not _fits(found, value):
            found = self.without_rule(node, value)  # a use of the operation that its rule does not cover
        self.layouts[node] = found
        return value

    # ---- nodes ------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, value: Any) -> Any:
        return self.fixed(value, "input")

    def _output(self, node: fx.Node, value: Any) -> None:
        self.fix_inputs(node, "output")

    def _get_attr(self, node: fx.Node, value: Any) -> Any:
        owner, _, key = target_name(node).rpartition(".")
        tensor = getattr(self.module.get_submodule(owner), key)
        return StoredTensor(tensor) if isinstance(tensor, Tensor) else None

    def _call_module(self, node: fx.Node, value: Any) -> Any:
        name = target_name(node)
        module = self.modules[name]
        kind = next((kind for kind in self.rules.modules if type(module).forward is kind.forward), None)
        plain = all(key in module._parameters for key, _ in module.named_parameters()) and not has_hooks(module)
        if kind is None or not plain:
            reason = f"no rule for {type(module).__name__}" + (" with hooks or parametrisation" if kind else "")
            self.unknown[name] = reason
            for tensor in [*module.parameters(), *module.buffers()]:
                self.spaces.fix_tensor(tensor, reason)
            return self.without_rule(node, value, reason)
        return self.rules.modules[kind](self, node, value, module)

    def _call_function(self, node: fx.Node, value: Any) -> Any:
        function = node.target
        assert not isinstance(function, str), "only the targets of other nodes are names"
        if isinstance(function, type) and issubclass(function, tuple):  # a named tuple of outputs
            return self.without_rule(node, value, "output")
        rule = self.rules.functions.get(function)
        return rule(self, node, value) if rule else self.without_rule(node, value)

    def _call_method(self, node: fx.Node, value: Any) -> Any:
        rule = self.rules.methods.get(target_name(node))
        return rule(self, node, value) if rule else self.without_rule(node, value)

    # ---- for the rules ----------------------------------------------------------------------------------

    def axes(self, node: fx.Node) -> Axes:
        """Axes of a tensor in the graph."""
        found = self.axes_or_none(node)
        assert found is not None, f"{node.name} is no tensor"
        return found

    def axes_or_none(self, node: fx.Node) -> Any:
        """Axes of a tensor in the graph; a tuple of these for several tensors, and None for other values."""
        stored = self.layouts[node]
        if not isinstance(stored, StoredTensor):
            return stored
        if not isinstance(stored.tensor, nn.Parameter):  # a buffer: a table or mask, whose order the code relies on
            self.spaces.fix_tensor(stored.tensor, "a buffer used in arithmetic")
        return tuple(self.spaces.axis_of(stored.tensor, axis) for axis in range(stored.tensor.ndim))

    def stored_tensor(self, value: Any) -> Tensor | None:
        """The parameter or buffer that an argument is. Raises LookupError if it was computed in the graph."""
        if value is None:
            return None
        if isinstance(value, fx.Node) and isinstance(self.layouts[value], StoredTensor):
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
            self._fix_all(self.axes_or_none(source), reason)

    def _fix_all(self, found: Any, reason: str) -> None:
        for part in found or ():
            if isinstance(part, tuple) and part and isinstance(part[0], tuple) and not hasattr(part[0], "space"):
                self._fix_all(part, reason)  # the axes of one tensor of a sequence
            elif part:
                self.spaces.fix(part, reason)

    def without_rule(self, node: fx.Node, value: Any, reason: str | None = None) -> Any:
        """Fixes the channels of the node's inputs, and gives the value fixed axes."""
        reason = reason or f"no rule for {label(node)}"
        self.fix_inputs(node, reason)
        return self.fixed(value, reason)

    def fix_axes(self, axes: Axes, reason: str) -> None:
        for layout in axes:
            self.spaces.fix(layout, reason)

    def positions(self, shape: Sequence[int]) -> Axes:
        """Axes of that shape that must not be permuted."""
        return tuple(self.spaces.positions(length) for length in shape)


def _fits(found: Axes | StoredTensor, value: Tensor) -> bool:
    return isinstance(found, StoredTensor) or tuple(map(length_of, found)) == tuple(value.shape)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after the module's forward, as those of pruning or weight normalisation do."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def target_name(node: fx.Node) -> str:
    """The name of what a node reads or calls: a module, a parameter or a method."""
    assert isinstance(node.target, str), node.target
    return node.target


def label(node: fx.Node) -> str:
    """Name of a node's operation, for reasons."""
    return node.target if isinstance(node.target, str) else node.target.__name__


def source_of(node: fx.Node) -> fx.Node:
    return argument(node, 0, "input")
