"""Running a model whose weights are held in 8 bits: each becomes float32 as it is used, and for as long as it is used.

The answers are, bit by bit, those of a model with the same weights in float32.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SCALE = "int8_scale"  # the attribute of a parameter in int8 that holds its scales
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # quick paths of theirs ask what functions do


def dequantised(values: Tensor, scale: Tensor) -> Tensor:
    """The float32 numbers of int8 values [R, ...] with a float32 scale for each row [R]; the same bits everywhere."""
    return values.float() * scale.view(-1, *[1] * (values.dim() - 1))


def with_scale(values: Tensor, scale: Tensor) -> nn.Parameter:
    """A parameter in int8, for a model that `run_with_weights_of` prepared for int8 (gemel/forward/arithmetic.py)."""
    parameter = nn.Parameter(values, requires_grad=False)
    setattr(parameter, SCALE, scale)
    return parameter


class FromInt8(TorchFunctionMode):
    """Within it every function of torch gets a float32 copy of each parameter of `with_scale` that it is given."""

    def __torch_function__(
        self,
        func: Callable,
        types: Iterable[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.__name__ == "__get__":  # an attribute, such as the shape, or the transposed tensor
            value = func(*args)
            if _scale_of(args[0]) is None:
                return value
            return func(_widened(args[0])) if isinstance(value, Tensor | torch.dtype) else value
        kwargs = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*(_widened(value) for value in args), **kwargs)


def _scale_of(value: object) -> Tensor | None:
    return getattr(value, SCALE, None) if isinstance(value, Tensor) else None


def _widened(value: Any) -> Any:
    if (scale := _scale_of(value)) is not None:
        return dequantised(value.detach(), scale)
    if type(value) in (list, tuple):
        return type(value)(_widened(item) for item in value)
    return value


def widen_attention(model: nn.Module) -> None:
    """From now on layers of attention have float32 weights while they run, and no function is intercepted meanwhile.

    Where functions are intercepted, or hooks are on them, they compute on another path, whose answers differ in the
    last bits.
    """
    for module in model.modules():
        if isinstance(module, READS_WEIGHTS):
            module.forward = partial(_with_float32, module, module.forward)  # type: ignore[method-assign]


def _with_float32(module: nn.Module, forward: Callable, *inputs: Any, **named: Any) -> Any:
    with torch._C.DisableTorchFunction():
        parts = [(part._parameters, name) for part in module.modules() for name in part._parameters]
        held = [(holder, name, holder[name]) for holder, name in parts if _scale_of(holder[name]) is not None]
        try:
            for holder, name, parameter in held:
                holder[name] = nn.Parameter(_widened(parameter), requires_grad=False)
            return forward(*inputs, **named)
        finally:
            for holder, name, parameter in held:
                holder[name] = parameter
