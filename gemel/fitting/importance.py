"""How much of an error in the output of a layer arrives at the outputs of its model, without labels."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemel.fitting.batch_norm import channel_moments
from gemel.forward.batches import Batch, to_device
from gemel.forward.hooks import hooked
from gemel.forward.modes import device_of, evaluating

IMAGES_AT_A_TIME = 4  # a backward pass holds the activations of these
NUM_IMAGES = 16  # of a task


def importance_of_layers(
    model: nn.Module, names: Collection[str], batches: Sequence[Batch], generator: torch.Generator
) -> dict[str, float]:
    """Layer -> relative squared error of the model's outputs, per relative squared error of the layer's outputs.

    To first order, for errors that are independent noise, with the variance of each channel: the mean over random
    vectors v of ||J'v||^2 is the squared Frobenius norm of the Jacobian J (Hutchinson, "A stochastic estimator of the
    trace of the influence matrix", 1989), so one backward pass serves all layers. names: those layers, the last ones
    among them, count as outputs that no other of them depends on (heads before non-maximum suppression). Layers that
    are never called, or through which no gradient flows, are left out.
    """
    total: dict[str, float] = {}
    chunks = list(_chunks(batches))
    for images in chunks:
        outputs = _outputs(model, names, images)
        final = _final(outputs)
        scores = []
        for name in final:
            energy = sum(((y - y.mean()).square().sum() for y in outputs[name]), start=torch.zeros(())).sqrt()
            for y in outputs[name]:
                noise = torch.randn(y.shape, generator=generator).to(y)
                scores.append((y * noise).sum() / energy.detach().clamp_min(1e-12))
        watched = [(name, y) for name, values in outputs.items() for y in values]
        found: dict[str, list[float]] = {}
        if scores:
            gradients = torch.autograd.grad(torch.stack(scores).sum(), [y for _, y in watched], allow_unused=True)
            for (name, y), gradient in zip(watched, gradients, strict=True):
                if gradient is not None:
                    found.setdefault(name, []).append(_share(y.detach(), gradient))
        for name, shares in found.items():
            total[name] = total.get(name, 0.0) + sum(shares) / len(chunks)
    return total


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


def _chunks(batches: Sequence[Batch]) -> Iterator[Batch]:
    left = NUM_IMAGES
    for batch in batches:
        for begin in range(0, min(len(batch), left), IMAGES_AT_A_TIME):
            yield batch[begin : min(begin + IMAGES_AT_A_TIME, left)]
        left -= len(batch)
        if left <= 0:
            return
