"""Forward hooks that are always removed, and ending a forward pass from a hook.

A hook sees what its layer puts out before a later operation that works in place, such as a ReLU, can change it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn


class EndForward(BaseException):
    """Raised by a hook to end the forward pass. Not an Exception: an `except Exception` of a model cannot catch it."""


@contextlib.contextmanager
def hooked(model: nn.Module, names: Iterable[str], hook: Callable, *, before: bool = False) -> Iterator[None]:
    """Within, every call of a named submodule ("": the model itself) calls `hook`; afterwards the hooks are removed.

    hook(name, module, inputs, output) runs after the submodule, hook(name, module, inputs) where `before` is set; what
    it returns, unless None, replaces the output or the inputs. A copy of the model has copies of its hooks, which do
    nothing: the hook sees this model alone. Raises AttributeError for a name that the model does not have.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(_for_module(module, name, hook)).remove)
        yield


def _for_module(own: nn.Module, name: str, hook: Callable) -> Callable:
    """A closure: copying a model would copy the object of a bound method and the arguments of a partial function."""

    def call(module: nn.Module, *values: Any) -> Any:
        return hook(name, module, *values) if module is own else None

    return call


def run_until_end(forward: Callable[..., Any], *inputs: Any) -> Any:
    """What forward(*inputs) returns, or None if it was ended by EndForward."""
    with contextlib.suppress(EndForward):
        return forward(*inputs)
    return None
