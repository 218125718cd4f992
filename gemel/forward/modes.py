"""The mode and the memory layout of models, and where they are."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Models = Mapping[str, nn.Module] | nn.ModuleDict  # the models of a workload by task; a ModuleDict is no Mapping


def to_channels_last(module: M, device: torch.device) -> M:
    """The module itself; on a CPU with its weights laid out channels-last, in which convolutions are quicker there.

    MobileNetV2 at 96 px, one thread: 1.5 times in evaluation and in training steps; ResNet-18 at 32 px: no difference.
    """
    if device.type == "cpu":
        set_layout(module, torch.channels_last)
    return module


def set_layout(module: nn.Module, layout: torch.memory_format) -> None:
    """Lays out all parameters and buffers of four dimensions, in place; objects and values stay the same."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def deep_copy(module: M) -> M:
    """copy.deepcopy of a module, also of one that keeps a weight which it computes in each pass from its parameters.

    weight_norm (the hook), spectral_norm and pruning keep it as a plain attribute, with its graph, which cannot be
    copied; without the graph it can, and the next pass computes it again. Raises whatever deepcopy raises else.
    """
    release_graphs(module)
    return copy.deepcopy(module)


def release_graphs(module: nn.Module) -> None:
    """Takes the graph off tensors that modules keep as plain attributes."""
    for part in module.modules():
        for key, value in vars(part).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(part)[key] = value.detach()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; afterwards every submodule has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # not model.train(): users may keep a BatchNorm in eval while the rest trains
            module.training = training


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`evaluating` in inference mode."""
    with evaluating(model), torch.inference_mode():
        yield


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters; the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def logits_of(output: Any) -> Tensor:
    """The tensor [N, K] of a classifier's output: the output itself, or its `logits`."""
    return getattr(output, "logits", output)


def state_on_cpu(model: nn.Module) -> dict:
    """A copy of the model's state dict in CPU memory; what it holds under several names is copied once."""
    own = model.state_dict(keep_vars=True)
    copies = {id(value): value.detach().to("cpu", copy=True) for value in {id(v): v for v in own.values()}.values()}
    return {key: copies[id(value)] for key, value in own.items()}
