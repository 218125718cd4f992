"""How much of an error in the output of a layer arrives at the outputs of its model, without labels.

To first order, for random vectors v at the outputs of the model: the mean of (e . J'v)^2 is ||J e||^2, for an error e
and the Jacobian J, so one backward pass serves all layers (Hutchinson, "A stochastic estimator of the trace of the
influence matrix", 1989).
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemel.fitting.batch_norm import channel_moments
from gemel.fitting.rows import is_linear_map, linear_map_at, output_rows
from gemel.forward.batches import Batch, to_device
from gemel.forward.hooks import hooked
from gemel.forward.modes import device_of, evaluating

# Of each task, about PIXELS values of images: benchmarks/LOG.md, 2026-11-28 Errors count by what arrives at the outputs
LEAST_IMAGES, MAX_IMAGES, PIXELS = 4, 32, 2**18


class OutputMetric(NamedTuple):
    """How much errors in the outputs of a linear or convolutional layer count.

    matrix G [groups, o, o]: an error e [groups, o] at a position changes the outputs of the model by e G e', up to a
    factor that all errors of the layer have in common. importance: relative squared error of the model's outputs, per
    relative squared error of the layer's, for errors that are independent noise with the variance of each channel.
    """

    matrix: Tensor
    importance: float


def output_metrics(
    model: nn.Module, batches: Sequence[Batch], generator: torch.Generator, images_at_a_time: int = MAX_IMAGES
) -> dict[str, OutputMetric]:
    """Linear or convolutional layer -> the metric of its outputs, from MAX_IMAGES images at most.

    images_at_a_time: in a backward pass, which holds all their activations.
    G is the sum of g'g over all calls and positions, g being the gradient J'v there. The last layers, on which no other
    of them depends, count as outputs of the model (heads before non-maximum suppression). Layers that are never called,
    through which no gradient flows or whose gradients are not finite are left out. Sources: Martens and Grosse,
    "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, for this factor; Tam et al.,
    "Merging by Matching Models in Task Parameter Subspaces", TMLR 2024, for such factors in merging.
    """
    wanted = min(MAX_IMAGES, max(LEAST_IMAGES, PIXELS // max(1, batches[0][0][0].numel())))
    chunks = list(_chunks(batches, wanted, images_at_a_time))
    names = [name for name, module in model.named_modules() if is_linear_map(module)]
    found: dict[str, OutputMetric] = {}
    for images in chunks:
        for name, (output, gradient) in _gradients(model, names, images, generator):
            g = output_rows(linear_map_at(model, name), gradient)
            old = found.get(name, OutputMetric(g.new_zeros(()), 0.0))
            importance = old.importance + _share(output, gradient) / len(chunks)
            found[name] = OutputMetric(old.matrix + g.mT @ g, importance)
    return {name: metric for name, metric in found.items() if torch.isfinite(metric.matrix).all()}


def _gradients(
    model: nn.Module, names: Collection[str], images: Batch, generator: torch.Generator
) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """Layer, its output and the gradient of a random projection of the model's outputs there, for each call."""
    outputs = _outputs(model, names, images)
    with torch.enable_grad():
        score = torch.zeros(())
        for name in _final(outputs):
            values = [y.detach() for y in outputs[name]]
            energy = sum(((y - y.mean()).square().sum() for y in values), start=torch.zeros(()))
            for y in outputs[name]:
                noise = torch.randn(y.shape, generator=generator).to(y)
                score = score + (y * noise).sum() / energy.sqrt().clamp_min(1e-12)
    watched = [(name, y) for name, values in outputs.items() for y in values]
    if not watched:
        return []
    gradients = torch.autograd.grad(score, [y for _, y in watched], allow_unused=True)
    pairs = zip(watched, gradients, strict=True)
    return [(name, (y.detach(), gradient)) for (name, y), gradient in pairs if gradient is not None]


def _outputs(model: nn.Module, names: Iterable[str], images: Batch) -> dict[str, list[Tensor]]:
    """What the layers put out in one forward pass, in the graph of which the first of them are the leaves."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, layer: nn.Module, inputs: tuple, output: Any) -> Tensor | None:
        if not torch.is_tensor(output) or not output.is_floating_point():
            return None
        kept = output if output.requires_grad else output.detach().requires_grad_()
        found.setdefault(name, []).append(kept)
        return kept.clone()  # an operation in place behind the layer changes the clone

    with evaluating(model), torch.enable_grad(), hooked(model, names, keep):
        model(to_device(images, device_of(model)))
    return found


def _final(outputs: dict[str, list[Tensor]]) -> list[str]:
    """Layers with an output that no other of the outputs was computed from."""
    seen: set[Any] = set()
    left = [node for values in outputs.values() for y in values for node in _inputs_of(y.grad_fn)]
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += _inputs_of(node)
    leaves = {id(node.variable) for node in seen if hasattr(node, "variable")}
    return [
        name for name, values in outputs.items() if any(y.grad_fn not in seen and id(y) not in leaves for y in values)
    ]


def _inputs_of(node: Any) -> list[Any]:
    return [] if node is None else [other for other, _ in node.next_functions if other is not None]


def _share(output: Tensor, gradient: Tensor) -> float:
    """The sum over channels of the variance of the output and the squared gradient; both [N, channels, ...]."""
    dims = [d for d in range(output.dim()) if d != min(1, output.dim() - 1)]
    variance = channel_moments(output).var if dims else output.square()
    return float((variance * gradient.square().sum(dims)).sum())


def _chunks(batches: Sequence[Batch], num_images: int, at_a_time: int) -> Iterator[Batch]:
    """The first images, as many as that, in batches of one image size that do not depend on those they come in."""
    images = itertools.islice(itertools.chain.from_iterable(batches), num_images)
    for _, same in itertools.groupby(images, key=lambda image: image.shape):
        while part := list(itertools.islice(same, at_a_time)):
            yield torch.stack(part) if torch.is_tensor(batches[0]) else part
