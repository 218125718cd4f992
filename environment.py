"""The device and the random generators of a run, both chosen here and nowhere else, and the mode of its models."""

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

DEVICES = ("auto", "cpu", "cuda")


def has_device(name: str) -> bool:
    """Whether this machine has what a run asks for by one of DEVICES."""
    return name != "cuda" or torch.cuda.is_available()


def pick_device(name: str = "auto") -> torch.device:
    """The device of a run; "auto" takes CUDA where there is one. Raises ValueError if "cuda" is asked for in vain."""
    if name not in DEVICES:
        raise ValueError(f"device: got {name!r}, allowed are {', '.join(DEVICES)}")
    if not has_device(name):
        raise ValueError("device: got 'cuda', but torch sees no CUDA device; allowed here are auto, cpu")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def in_quick_layout(module: M, device: torch.device) -> M:
    """The module itself; on a CPU with its weights laid out channels-last, in which convolutions are quicker there.

    MobileNetV2 at 96 px, one thread: 1.5 times in evaluation and in training steps; ResNet-18 at 32 px: no difference.
    """
    return module.to(memory_format=torch.channels_last) if device.type == "cpu" else module


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


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, such as ("round", 3, "loader", task), from the seed of the run."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator of its own for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def random_state() -> dict:
    """The state of the global generators, of plain values and tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss_next],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Sets the global generators to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Seeds the global generators (torch, random, numpy), which dropout and transforms draw from, and restores them."""
    value = derive_seed(seed, *purpose)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # asking must not start CUDA
    with torch.random.fork_rng(devices):
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
