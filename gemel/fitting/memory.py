"""How much memory a forward pass takes that waits at a layer, and how many images may therefore wait there."""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gemel.fitting.rows import is_linear_map, output_width
from gemel.forward.batches import Batch, to_device
from gemel.forward.hooks import hooked
from gemel.forward.modes import device_of, evaluating

# Of the memory of a fit. The rest of it is what the allocator leaves unused between tensors that come and go
# (benchmarks/LOG.md, 2026-11-26 Fits in bounded memory).
IN_FLIGHT_SHARE = 0.4  # activations
SAMPLES_SHARE = 0.2  # images and the teachers' outputs; what is more goes to a file
ROWS_SHARE = 0.2  # sums over the rows of one group
FEWEST_IMAGES = 2  # in a batch: normalisation and variances need more than one value a channel


class LayerFootprint(NamedTuple):
    """What one image costs, and gives, at one layer."""

    waiting: float  # bytes in flight while a forward pass waits before the layer
    positions: float  # rows that an image gives, over all calls


class Footprint(NamedTuple):
    """What one image costs in a forward pass of one model."""

    layers: Mapping[str, LayerFootprint]  # in the order in which they are called
    peak: float  # bytes at the worst moment of the pass
    flops: float = 0.0  # floating-point operations of the pass
    total: float = 0.0  # bytes of all that its operations return, which a backward pass needs


@torch.no_grad()
def footprint_of(model: nn.Module, names: Iterable[str], images: Batch) -> Footprint:
    """Runs the model once, counts what lives, and returns what one of the images takes.

    names: linear or convolutional layers and normalisation; those that are never called are left out. The figures are
    of the storages that operations return, on any device; work space within an operation is not seen.
    """
    num_images, device = len(images), device_of(model)
    layers: dict[str, LayerFootprint] = {}

    def arrive(name: str, layer: nn.Module, inputs: tuple) -> None:
        layers.setdefault(name, LayerFootprint(alive.now / num_images, 0.0))

    def leave(name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        positions = output.numel() / output_width(layer) / num_images if is_linear_map(layer) else 0.0
        layers[name] = layers[name]._replace(positions=layers[name].positions + positions)

    names = list(names)
    alive, counter = LiveBytes([*model.parameters(), *model.buffers()]), Flops()
    with evaluating(model), hooked(model, names, arrive, before=True), hooked(model, names, leave), alive, counter:
        model(_copied(to_device(images, device)))
    return Footprint(layers, alive.peak / num_images, counter.total / num_images, alive.total / num_images)


def _copied(images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return images.clone() if torch.is_tensor(images) else [image.clone() for image in images]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations return, from then until their memory is free again."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = self.total = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if torch.is_tensor(value):
                self._watch(value.untyped_storage())
        return result

    def _watch(self, storage: UntypedStorage) -> None:
        address, num_bytes = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now += num_bytes
        self.total += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, address, num_bytes)

    def _release(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.now -= num_bytes


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions, as torch.utils.flop_counter does."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


# ---- a plan ---------------------------------------------------------------------------------------------------------


class FitMemory(NamedTuple):
    """How the memory of a fit is divided. Nothing is bounded where `limit` is infinite."""

    limit: float = math.inf  # bytes above those of the models
    num_tasks: int = 1  # among which what is in flight is divided

    @property
    def is_bounded(self) -> bool:
        return math.isfinite(self.limit)

    @property
    def samples(self) -> float:
        """Bytes for images and the teachers' outputs."""
        return SAMPLES_SHARE * self.limit

    @property
    def rows(self) -> float:
        """Bytes for the sums over rows of one group."""
        return ROWS_SHARE * self.limit

    @property
    def in_flight(self) -> float:
        """Bytes for activations of all tasks."""
        return IN_FLIGHT_SHARE * self.limit

    @property
    def moving(self) -> float:
        """Bytes that one forward pass may take while it runs."""
        return self.in_flight / 2

    def waiting(self, moving: float) -> float:
        """Bytes of one task's forward passes that wait, if one that runs takes `moving`."""
        return (self.in_flight - moving) / self.num_tasks

    def largest_batch(self, footprint: Footprint) -> float:
        """Images in a batch such that one of each task can be in flight; at least FEWEST_IMAGES."""
        if not self.is_bounded:
            return math.inf
        most = max((layer.waiting for layer in footprint.layers.values()), default=0.0)
        batches = (self.moving / max(footprint.peak, 1.0), self.waiting(self.moving) / max(most, 1.0))
        return max(FEWEST_IMAGES, math.floor(min(batches)))

    def images_with_gradients(self, footprint: Footprint, wanted: int) -> int:
        """Images that go through a forward and a backward pass at a time while nothing waits: at most those wanted, and
        at least FEWEST_IMAGES, as a single one says nothing of how much a channel of a linear layer varies."""
        return int(max(FEWEST_IMAGES, min(wanted, self.in_flight / max(footprint.total + footprint.peak, 1.0))))

    def batches_that_wait(self, footprint: Footprint, layers: Iterable[str], sizes: Sequence[int]) -> dict[str, int]:
        """Layer -> how many of the task's first batches may wait there together, one at least.

        layers: that will be waited at. No more than at any layer behind it, as those who wait go on to that. sizes: of
        the batches.
        """
        share = self.waiting(footprint.peak * max(sizes))
        limits, limit = {}, math.inf
        wanted = set(layers)
        for name in reversed([name for name in footprint.layers if name in wanted]):
            limit = min(limit, share / max(footprint.layers[name].waiting, 1.0))
            limits[name] = limit
        return {name: max(1, _leading(sizes, limit)) for name, limit in reversed(limits.items())}


UNBOUNDED = FitMemory()


def _leading(sizes: Sequence[int], limit: float) -> int:
    """How many of the first sizes have a sum of at most `limit`."""
    total = count = 0
    for size in sizes:
        total += size
        if total > limit:
            break
        count += 1
    return count


def predicted_peak(
    footprints: Mapping[str, Footprint], sizes: Mapping[str, Sequence[int]], waiting: Mapping[str, Mapping[str, int]]
) -> float:
    """Bytes of the activations of a fit at the worst moment: what waits of all tasks, and one pass that runs.

    waiting: task -> layer -> how many batches wait there.
    """
    held = 0.0
    for task, layers in waiting.items():
        own = footprints[task].layers
        called = {name: count for name, count in layers.items() if name in own}  # the others are no places to wait at
        held += max((own[name].waiting * sum(sizes[task][:count]) for name, count in called.items()), default=0.0)
    moving = (footprints[task].peak * max(sizes[task]) for task in waiting)
    return held + max(moving, default=0.0)
