"""Running a float32 model in 16 bits where torch holds that to be safe, with answers in float32.

Weights stay in float32. Where a part of a model runs under torch.autocast, what it hands on is float32 again: losses,
and the boxes of a detector, are computed in float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gemel.environment.device import products_in_tf32
from gemel.forward.hooks import hooked
from gemel.forward.modes import device_of

SHORT = (torch.bfloat16, torch.float16)
WHOLE = ""  # the name of a model itself among its parts


class Autocast(NamedTuple):
    """In which type which parts of a model compute.

    dtype: torch.bfloat16; torch.float32: as ever. parts: names of submodules, none within another; WHOLE: the model.
    tf32: whether matrix products in float32 compute in TF32, on CUDA.
    """

    dtype: torch.dtype = torch.float32
    parts: tuple[str, ...] = ()
    tf32: bool = False

    def whole_step(self) -> contextlib.AbstractContextManager[None]:
        """Within, a forward and its backward pass multiply matrices as they should; `within` is for the types."""
        return products_in_tf32() if self.tf32 else contextlib.nullcontext()

    @contextlib.contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Within, the parts of the model compute in that type, also if a forward pass is ended in their middle."""
        if self.dtype == torch.float32 or not self.parts:
            yield
            return
        entered: list[torch.autocast] = []
        kind = device_of(model).type

        def enter(name: str, module: nn.Module, inputs: tuple) -> None:
            entered.append(torch.autocast(kind, self.dtype))
            entered[-1].__enter__()

        def leave(name: str, module: nn.Module, inputs: tuple, output: Any) -> Any:
            entered.pop().__exit__(None, None, None)
            return tree_map(_as_float32, output)

        try:
            with hooked(model, self.parts, enter, before=True), hooked(model, self.parts, leave):
                yield
        finally:
            while entered:
                entered.pop().__exit__(None, None, None)


IN_FLOAT32 = Autocast()
IN_TF32 = Autocast(tf32=True)


def _as_float32(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype in SHORT else value
