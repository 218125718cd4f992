"""Measures what a frozen prefix saves: the time of a training step and of an evaluation of 16 images.

    python -m benchmarks.frozen_prefix [MODEL:FIRST_TIED_LAYER ...] [--size 96] [--threads 1]

Layers from FIRST_TIED_LAYER on are tied; the prefix is what is computed before them. Medians in CPU milliseconds with
everything trained, with the prefix frozen, and with the prefix frozen and its outputs cached, as for images that are
evaluated repeatedly (merge_workload, option freeze_prefix). torchvision classifiers with random weights.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models as zoo

from gemel.console.tables import table
from gemel.forward.modes import evaluation_mode, to_channels_last
from gemel.sharing.signatures import find_layers
from gemel.training.cut import Cuts
from gemel.training.prefix import frozen, prefix_of

HEADER = (
    *("model", "tied from", "last frozen layer", "in the prefix", "training: whole", "frozen", "cached"),
    *("evaluation: whole", "cached"),
)
DEFAULT = ("mobilenet_v2:features.15.conv.0.0", "resnet18:layer4.0.conv1", "vgg11_bn:classifier.0")
NUM_IMAGES, NUM_CLASSES, REPEATS = 16, 10, 10
CACHE_BYTES = 1 << 30


def cpu_milliseconds(function: Callable[[], object]) -> float:
    """Median over REPEATS calls, after two calls that are not counted."""
    times = []
    for _ in range(REPEATS + 2):
        began = time.process_time()
        function()
        times.append(1000 * (time.process_time() - began))
    return statistics.median(times[2:])


def costs_of(model: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """CPU milliseconds of a training step and of an evaluation."""
    labels = torch.arange(len(images)) % NUM_CLASSES
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    model.train()
    training = cpu_milliseconds(step)
    with evaluation_mode(model):
        return training, cpu_milliseconds(lambda: model(images))


def row_of(name: str, first_tied: str, size: int) -> list[str]:
    """The cells of one model; "-" where it cannot be cut. Raises ValueError for a layer that it does not have."""
    torch.manual_seed(0)
    model = to_channels_last(zoo.get_model(name, weights=None, num_classes=NUM_CLASSES), torch.device("cpu"))
    images = torch.rand(NUM_IMAGES, 3, size, size)
    layers = [layer.name for layer in find_layers(model)]
    if first_tied not in layers:
        raise ValueError(f"{name}: got layer {first_tied}; allowed: {', '.join(layers)}")
    cut = Cuts(model, images[:4]).before(layers[layers.index(first_tied) :])
    costs = [costs_of(model, images)]
    if cut is None:
        return [name, first_tied, "-", "-", f"{costs[0][0]:.0f} ms", "-", "-", f"{costs[0][1]:.0f} ms", "-"]
    for caches_training in (False, True):
        with frozen({name: model}, {name: prefix_of(model, cut, CACHE_BYTES, caches_training)}):
            costs.append(costs_of(model, images))
    before = sum(p.numel() for p in cut.parameters(model)) / sum(p.numel() for p in model.parameters())
    times = [f"{ms:.0f} ms" for ms in (*(training for training, _ in costs), costs[0][1], costs[2][1])]
    return [name, first_tied, cut.last, f"{100 * before:.0f} % of weights", *times]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL:FIRST_TIED_LAYER", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--size", type=int, default=96, help="pixels (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    flags = parser.parse_args(arguments)
    pairs = [tuple(pair.split(":", 1)) for pair in flags.models or DEFAULT]
    known = zoo.list_models(module=zoo)
    if wrong := [":".join(pair) for pair in pairs if len(pair) != 2 or pair[0] not in known]:
        parser.error(f"got {', '.join(wrong)}; allowed: MODEL:LAYER, MODEL one of {', '.join(known)}")
    torch.set_num_threads(flags.threads)
    try:
        print(table(HEADER, [row_of(name, layer, flags.size) for name, layer in pairs]))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
