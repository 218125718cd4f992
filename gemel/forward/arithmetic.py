"""Running a model whose weights have 16 bits: images go in and answers come out in float32, as without that.

On a CUDA device the model computes under torch.autocast, in the type of its weights where torch holds that to be safe.
On a CPU, which has slow kernels for these types or none, every weight becomes float32 as it is used, and for as long as
it is used: the model computes what a float32 model with the same (rounded) weights computes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from gemel.environment.device import computes_in_16_bits
from gemel.forward import STORE_TYPES, WEIGHT_TYPES
from gemel.forward.eight_bits import FromInt8, widen_attention
from gemel.forward.modes import device_of

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WEIGHT_TYPES}
STORE_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in STORE_TYPES}
SHORT = (torch.float16, torch.bfloat16)

_running = threading.local()  # .entered: a list of (id of a model, what its forward pass runs in)


def arithmetic_on(device_type: str, weights: str) -> str:
    """The name of the type in which a model with weights of a type (of STORE_TYPES) computes on a kind of device."""
    return weights if weights != "int8" and computes_in_16_bits(device_type) else "float32"


def run_with_weights_of(model: nn.Module, dtype: torch.dtype) -> None:
    """From now on the model, which is called with float32 images, runs with weights of that type (float32: as ever).

    int8: weights are parameters of eight_bits.with_scale; called once for a model.
    """
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(hook, _Enter | _Leave):
                del hooks[number]
    if dtype == torch.int8:
        widen_attention(model)
    if dtype != torch.float32:
        model.register_forward_pre_hook(_Enter(dtype), prepend=True)
        model.register_forward_hook(_Leave(), always_call=True)


class _Enter:
    """The hook before a model runs."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, model: nn.Module, inputs: tuple) -> None:
        stack = contextlib.ExitStack()
        if self.dtype == torch.int8:
            stack.enter_context(FromInt8())
        elif computes_in_16_bits(kind := device_of(model).type):
            stack.enter_context(torch.autocast(kind, self.dtype))
        else:
            stack.enter_context(InFloat32(self.dtype))
        _entered().append((id(model), stack))


class _Leave:
    """The hook after a model ran, also where it failed."""

    def __call__(self, model: nn.Module, inputs: tuple, output: Any) -> Any:
        entered = _entered()
        if entered and entered[-1][0] == id(model):  # else a hook before ours failed, and nothing was entered
            entered.pop()[1].close()
        return tree_map(_as_float32, output)


def _entered() -> list[tuple[int, contextlib.ExitStack]]:
    if not hasattr(_running, "entered"):
        _running.entered = []
    return _running.entered


def _as_float32(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype in SHORT else value


class InFloat32(TorchFunctionMode):
    """Within it every function of torch gets a float32 copy of each tensor of a type that it is given."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self,
        func: Callable,
        types: Iterable[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.__name__ == "__get__":  # an attribute, such as the shape
            value = func(*args)
            return torch.float32 if value is self.dtype else value
        kwargs = {key: self._widened(value) for key, value in (kwargs or {}).items()}
        return func(*(self._widened(value) for value in args), **kwargs)

    def _widened(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.float() if value.dtype == self.dtype else value
        if type(value) in (list, tuple):
            return type(value)(self._widened(item) for item in value)
        return value
