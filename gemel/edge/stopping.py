"""Ending a run while a model computes: the layer that runs ends, and the next one does not begin."""

import threading
from collections.abc import Callable

from torch import nn

from gemel.forward.eight_bits import READS_WEIGHTS


class Stopped(Exception):
    """Raised within a model when the run is to end. An Exception: hooks that are always called see nothing else."""


def stop_at_layers(model: nn.Module, stop: threading.Event) -> list[Callable[[], None]]:
    """From now on a call of the model raises Stopped before the next layer, once the event is set.

    Returns what takes that back, by layer.

    Layers within torch's attention are left out: with hooks on them it computes on another path, and the answers differ
    in the last bits.
    """

    def check(module: nn.Module, inputs: tuple) -> None:
        if stop.is_set():
            raise Stopped

    inside = {id(part) for module in model.modules() if isinstance(module, READS_WEIGHTS) for part in module.modules()}
    layers = [module for module in model.modules() if id(module) not in inside and not any(module.children())]
    return [layer.register_forward_pre_hook(check).remove for layer in layers]
