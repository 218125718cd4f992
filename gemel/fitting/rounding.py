"""Rounding weights to 8 bits so that layers put out for their inputs what they put out before.

With X the inputs of a layer, rounding a row w to v costs ||X w - X v||^2. The scale of a row is the one of a few with
the least cost if inputs were uncorrelated; then its numbers are rounded one after the other, each to the nearest one
after the errors of those before it were taken up by those that are left, and by the bias at last. Source: Frantar et
al., "GPTQ", ICLR 2023 (after Hassibi and Stork, "Optimal brain surgeon", 1993), in the form of Babai's nearest plane
(Chen et al., "The geometry of LLM quantization", 2025), which takes one Cholesky factor and no inverse.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemel.environment import ranks
from gemel.environment.seeds import generator as generator_of
from gemel.fitting.rows import (
    TRANSPOSED,
    input_rows,
    is_linear_map,
    linear_map_at,
    matrix_of,
    output_width,
    set_matrix,
    shape_of,
)
from gemel.forward.batches import Batch, run
from gemel.forward.hooks import hooked
from gemel.forward.modes import Models
from gemel.sharing.adapters import LinearMap, as_linear_map
from gemel.sharing.quantisation import (
    LEVELS,
    is_rounded,
    named_quantised_weights,
    quantise,
    scales_for,
    with_17_bits,
)

CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)  # the largest number of a row stands for these shares of its largest value
DAMPING = 0.01  # of the mean square of the inputs, as in GPTQ
BLOCK = 128
ROWS = 4096  # of inputs, per layer and task
MOST_INPUTS = 4608  # of a layer; wider ones are rounded to the nearest numbers
MOST_BYTES = 256 << 20  # of the moments that are gathered at a time


class _Place(NamedTuple):
    task: str
    layer: str


def round_to_inputs(
    models: Models, images: Mapping[str, Sequence[Batch]], seed: int, with_other_ranks: bool = True
) -> None:
    """Rounds the weights that a store in int8 rounds, in place; weights that have such values already stay.

    models: with their ties; a shared weight is rounded on the inputs of all tasks here that hold it. images: by task;
    inputs are those of the models as they are. Weights whose inputs are not seen (attention reads them by itself),
    transposed convolutions and very wide layers get the nearest numbers. with_other_ranks: whether all ranks call it
    with models of the same ties and values, and images of their own tasks.
    """
    places: dict[nn.Parameter, list[_Place]] = {}
    for task, model in models.items():
        for layer, weight in named_quantised_weights(model):
            places.setdefault(weight, []).append(_Place(task, layer))
    places = {w: found for w, found in places.items() if bool(w.isfinite().all()) and not is_rounded(w)}
    seen = {weight: found for weight, found in places.items() if _see_inputs(models, found)}
    for chunk in _chunks(models, seen):
        with ranks.sharing_memory_errors() if with_other_ranks else contextlib.nullcontext():
            grams = _grams(models, chunk, images, seed)
        for weight, found in chunk.items():
            if with_other_ranks and ranks.size() > 1:
                ranks.sum_in_place(grams[weight])
            _round_layer(models, found, grams.pop(weight))
    for weight in places:  # those that are rounded stay as they are
        weight.data.copy_(quantise(weight).dequantised())


def _see_inputs(models: Models, places: Sequence[_Place]) -> bool:
    """Whether moments of the inputs of all places can be summed."""
    layers = [models[place.task].get_submodule(place.layer) for place in places]
    if not all(is_linear_map(layer) and not isinstance(layer, TRANSPOSED) for layer in layers):
        return False
    shapes = {shape_of(as_linear_map(layer)) for layer in layers}
    return len(shapes) == 1 and max(inputs for _, inputs, _ in shapes) <= MOST_INPUTS


def _chunks(models: Models, places: Mapping[nn.Parameter, list[_Place]]) -> Iterator[dict[nn.Parameter, list[_Place]]]:
    """The weights in parts whose moments are at most MOST_BYTES together, or single ones."""
    chunk: dict[nn.Parameter, list[_Place]] = {}
    held = 0
    for weight, found in places.items():
        groups, inputs, _ = shape_of(linear_map_at(models[found[0].task], found[0].layer))
        size = groups * inputs * inputs * torch.float32.itemsize
        if chunk and held + size > MOST_BYTES:
            yield chunk
            chunk, held = {}, 0
        chunk[weight] = found
        held += size
    if chunk:
        yield chunk


# ---- moments of inputs ----------------------------------------------------------------------------------


def _grams(
    models: Models, places: Mapping[nn.Parameter, list[_Place]], images: Mapping[str, Sequence[Batch]], seed: int
) -> dict[nn.Parameter, Tensor]:
    """Weight -> x'x [groups, d, d] over sampled rows of the inputs of all its places."""
    grams: dict[nn.Parameter, Tensor] = {}
    for weight, found in places.items():
        groups, inputs, _ = shape_of(linear_map_at(models[found[0].task], found[0].layer))
        grams[weight] = torch.zeros(groups, inputs, inputs, device=weight.device)
    for task, batches in images.items():
        weight_of = {p.layer: weight for weight, found in places.items() for p in found if p.task == task}
        _add_rows(grams, models[task], weight_of, batches, generator_of(seed, "rounding", task))
    return grams


def _add_rows(
    grams: Mapping[nn.Parameter, Tensor],
    model: nn.Module,
    weight_of: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    generator: torch.Generator,
) -> None:
    """Adds the rows of one task's layers."""
    quota = -(-ROWS // max(1, len(batches)))

    def add(name: str, layer: LinearMap, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        total = outputs.numel() // output_width(layer)
        drawn = torch.randint(total, (quota,), generator=generator) if total > quota else torch.arange(total)
        x = input_rows(layer, inputs[0], outputs.shape, drawn.to(outputs.device))
        grams[weight_of[name]] += x.mT @ x

    for batch in batches if weight_of else ():
        with hooked(model, weight_of, add):
            run(model, batch)


# ---- rounding one layer ---------------------------------------------------------------------------------


@torch.no_grad()
def _round_layer(models: Models, places: Iterable[_Place], gram: Tensor) -> None:
    """Rounds a weight, given x'x [groups, d, d] of its inputs; a bias that all places share takes up what is left."""
    layers = [linear_map_at(models[place.task], place.layer) for place in places]
    biases = {id(layer.bias) for layer in layers}
    moves_bias = layers[0].bias is not None and len(biases) == 1 and layers[0].bias.requires_grad
    matrix = matrix_of(layers[0])
    bias = matrix[:, -1:] if layers[0].bias is not None else matrix[:, :0]
    inputs = matrix.shape[1] - bias.shape[1]
    if bool(gram.isfinite().all()) and bool((gram.diagonal(dim1=1, dim2=2)[:, :inputs] > 0).any()):
        first = [matrix.shape[1] - 1] if moves_bias else []  # what is rounded comes behind it
        order = [*first, *range(inputs)]
        rounded = rounded_matrix(matrix[:, order], gram[:, order][:, :, order], len(first))
        bias = rounded[:, :1] if moves_bias else bias
        set_matrix(layers[0], torch.cat([rounded[:, len(first) :], bias], 1))


def rounded_matrix(matrix: Tensor, gram: Tensor, num_free: int = 0) -> Tensor:
    """The matrix [groups, d, o] with the numbers of each column (an output) rounded to 8 bits.

    gram: x'x [groups, d, d] of its inputs. num_free: the first ones, which are not rounded (a bias). Where the nearest
    numbers are better for an output, it has those.
    """
    weights, inputs = matrix[:, num_free:], gram.diagonal(dim1=1, dim2=2)[:, num_free:]
    scale = best_scales(weights, inputs)
    nearest = _to_levels(weights / scale.unsqueeze(1)) * scale.unsqueeze(1)
    nearest = torch.cat([matrix[:, :num_free], nearest], 1)
    wide = gram.to(torch.float64 if gram.shape[1] <= 2048 else torch.float32)
    mean = wide.diagonal(dim1=1, dim2=2).mean(1)
    wide.diagonal(dim1=1, dim2=2).add_(DAMPING * mean.clamp_min(1e-30).unsqueeze(1))
    lower, failed = torch.linalg.cholesky_ex(wide)
    if bool(failed.any()):
        return nearest
    factor = lower.mT.contiguous()
    found = _nearest_plane(matrix.to(factor.dtype), factor, scale, num_free).to(matrix.dtype)
    errors = [(factor @ (matrix - m).to(factor.dtype)).square().sum(1, keepdim=True) for m in (found, nearest)]
    return torch.where(errors[0] <= errors[1], found, nearest)


def best_scales(weights: Tensor, inputs: Tensor) -> Tensor:
    """The scale of every output [groups, o], of the shares CLIPPED, by the mean squares of the inputs [groups, d]."""
    largest = weights.abs().amax(1)
    found, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for share in CLIPPED:
        scale = with_17_bits(scales_for(share * largest))
        error = weights - _to_levels(weights / scale.unsqueeze(1)) * scale.unsqueeze(1)
        cost = (error.square() * inputs.unsqueeze(2)).sum(1)
        found, least = torch.where(cost < least, scale, found), torch.minimum(cost, least)
    return found


def _to_levels(numbers: Tensor) -> Tensor:
    return numbers.round().clamp(-LEVELS, LEVELS)


def _nearest_plane(matrix: Tensor, factor: Tensor, scale: Tensor, num_free: int) -> Tensor:
    """Babai's rounding of each column, from the last number to the first; factor: upper, factor' factor = x'x."""
    errors, step = torch.zeros_like(matrix), scale.unsqueeze(1)
    found = torch.empty_like(matrix)
    largest = matrix[:, num_free:].abs().argmax(1) + num_free  # stays the largest, so that the scale can be found again
    for end in range(matrix.shape[1], 0, -BLOCK):
        begin = max(end - BLOCK, 0)
        moved = factor[:, begin:end, end:] @ errors[:, end:]
        for j in reversed(range(begin, end)):
            shift = moved[:, j - begin] + (factor[:, j : j + 1, j + 1 : end] @ errors[:, j + 1 : end]).squeeze(1)
            value = matrix[:, j] + shift / factor[:, j, j : j + 1]
            if j >= num_free:
                levels = _to_levels(value / step.squeeze(1))
                levels = torch.where(largest == j, LEVELS * matrix[:, j].sign(), levels)
                errors[:, j] = matrix[:, j] - levels * step.squeeze(1)
                found[:, j] = levels * step.squeeze(1)
            else:
                found[:, j] = value
                errors[:, j] = matrix[:, j] - value
    return found
