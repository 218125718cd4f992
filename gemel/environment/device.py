"""The device of a run, chosen here and nowhere else."""

import torch

from gemel.environment import DEVICES


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
