"""Inputs and outputs of a linear or convolutional layer as rows of a matrix product.

A convolution is a matrix product over windows of its input (im2col). For a random sample of output positions this file
computes the windows X [groups, n, d] and outputs Y [groups, n, o] with Y = X @ M, where M [groups, d, o] is the layer's
matrix. Groups are those of a grouped convolution (1 for a dense or linear layer); a bias is the last row of M, and the
last column of X is then 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gemel.forward.batches import Batch, run
from gemel.forward.hooks import EndForward, hooked, run_until_end
from gemel.sharing.adapters import (
    KINDS,
    LinearMap,
    as_linear_map,
    is_addition,
    own_modules,
    owns_its_weight,
)

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Rows(NamedTuple):
    """Sampled rows of one layer of one task; y = x @ matrix_of(teacher's layer) where x are the teacher's inputs."""

    x: Tensor  # [groups, n, d]
    y: Tensor  # [groups, n, o]

    def centred(self) -> "Rows":
        """Without the mean of each column, which a normalisation after the layer removes."""
        means = self.means()
        return Rows(self.x - means.x, self.y - means.y)

    def means(self) -> "Rows":
        """The mean of each column, as a single row."""
        return Rows(self.x.mean(1, keepdim=True), self.y.mean(1, keepdim=True))


def is_linear_map(layer: nn.Module) -> TypeGuard[LinearMap]:
    """Whether the layer computes torch's own linear map or (transposed) convolution, of any dimension.

    Its weight must be a parameter of its own: one that is computed from others (weight_norm, pruning) cannot be set.
    """
    return owns_its_weight(layer) and any(type(layer).forward is kind.forward for kind in (*KINDS, *TRANSPOSED))


def normalisation_behind(model: nn.Module, name: str) -> _BatchNorm | None:
    """The batch normalisation right after the layer, which makes mean and scale of the layer's outputs free, or None.

    Found by the order of registration, which is the order of computation in the blocks of every torchvision model.
    """
    module = module_behind(model, name)
    if not isinstance(module, _BatchNorm):
        return None
    return module if module.num_features == output_width(linear_map_at(model, name)) else None


def module_behind(model: nn.Module, name: str) -> nn.Module | None:
    """The module without children that is registered next after a layer; None behind a layer that has children itself.

    Such a layer (a class token in the module that holds all blocks of a transformer) has no place in the order.
    """
    leaves = (pair for pair in own_modules(model) if all(map(is_addition, pair[1].children())))
    if next((pair for pair in leaves if pair[0] == name), None) is None:
        return None
    return next(leaves, ("", None))[1]


def linear_map_at(model: nn.Module, name: str) -> LinearMap:
    """The layer of that name, which the caller knows to be linear or a convolution."""
    return as_linear_map(model.get_submodule(name))


def is_normalised(model: nn.Module, name: str) -> bool:
    """Whether a batch normalisation is right after the layer, so that the means of its outputs have no effect."""
    return normalisation_behind(model, name) is not None


def output_width(layer: LinearMap) -> int:
    """Output channels or features."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def shape_of(layer: LinearMap) -> tuple[int, int, int]:
    """(groups, d, o): the shape of the layer's matrix."""
    extra = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return 1, layer.in_features + extra, layer.out_features
    taps = layer.weight[0, 0].numel()
    return layer.groups, layer.in_channels // layer.groups * taps + extra, layer.out_channels // layer.groups


def matrix_of(layer: LinearMap) -> Tensor:
    """The matrix [groups, d, o] by which the layer multiplies its rows; a copy, in `solvable` precision."""
    groups, _, width = shape_of(layer)
    weight = solvable(layer.weight.detach())
    if isinstance(layer, TRANSPOSED):
        taps = weight.flip(tuple(range(2, weight.dim()))).reshape(groups, -1, width, weight[0, 0].numel())
        matrix = taps.transpose(2, 3).reshape(groups, -1, width)
    else:
        matrix = weight.reshape(groups, width, -1).transpose(1, 2)
    if layer.bias is None:
        return matrix.clone()
    return torch.cat([matrix, solvable(layer.bias.detach()).reshape(groups, 1, width)], 1)


def solvable(tensor: Tensor) -> Tensor:
    """The tensor in a precision in which systems can be solved: float32 in the place of half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def set_matrix(layer: LinearMap, matrix: Tensor) -> None:
    """Writes a matrix [groups, d, o] into the layer's parameters, in place: tied layers change with it."""
    weight, width = layer.weight, matrix.shape[2]
    if layer.bias is not None:
        layer.bias.copy_(matrix[:, -1].reshape(-1))
        matrix = matrix[:, :-1]
    if isinstance(layer, TRANSPOSED):
        inputs = weight.shape[0] // len(matrix)
        taps = matrix.reshape(len(matrix), inputs, -1, width).transpose(2, 3).reshape(weight.shape)
        weight.copy_(taps.flip(tuple(range(2, weight.dim()))))
    else:
        weight.copy_(matrix.transpose(1, 2).reshape(weight.shape))


def row_itemsize(layer: LinearMap) -> int:
    """Bytes of one value of the layer's rows."""
    return torch.promote_types(layer.weight.dtype, torch.float32).itemsize


def input_rows(layer: LinearMap, inputs: Tensor, shape: Sequence[int], picked: Tensor) -> Tensor:
    """[groups, n, d]: the windows of the input for the picked positions of an output of that shape, `solvable`."""
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, layer.in_features)[picked].unsqueeze(0)
    else:
        rows = _windows(layer, _batched(layer, inputs), shape[-len(layer.kernel_size) :], picked)
    rows = solvable(rows)
    return rows if layer.bias is None else torch.cat([rows, torch.ones_like(rows[..., :1])], 2)


def output_rows(layer: LinearMap, outputs: Tensor, picked: Tensor | slice = slice(None)) -> Tensor:
    """[groups, n, o]: the layer's outputs at the picked positions, or at all of them, `solvable`."""
    groups, _, width = shape_of(layer)
    if not isinstance(layer, nn.Linear):
        outputs = _batched(layer, outputs).movedim(1, -1)
    return solvable(outputs.reshape(-1, groups, width)[picked].transpose(0, 1))


class Positions(Protocol):
    """Sampled positions of one call of a layer, and the shapes that it had."""

    @property
    def picked(self) -> Tensor: ...
    @property
    def input_shape(self) -> torch.Size: ...
    @property
    def output_shape(self) -> torch.Size: ...


class Sample(NamedTuple):
    """Sampled positions of one call of a layer, and its outputs there."""

    picked: Tensor  # positions in the flattened output
    input_shape: torch.Size
    output_shape: torch.Size
    y: Tensor  # [groups, n, o]
    x: Tensor | None = None  # [groups, n, d], where it was asked for


Samples = dict[str, list[Sample]]  # layer -> one sample of each call


Generators = torch.Generator | Mapping[str, torch.Generator]  # one for all layers, or one for each


def sample_outputs(
    model: nn.Module,
    quotas: Mapping[str, int],
    images: Batch,
    generator: Generators,
    takes_inputs: Callable[[int, Tensor], bool] = lambda call, inputs: False,
) -> Samples:
    """Runs the model once and samples about quotas[layer] output positions per layer, over all its calls together.

    takes_inputs: whether the inputs at these positions are taken as well, by the number of the call and its input. A
    layer whose forward is never called (attention reads the parameters of its layers) is left out.
    """
    samples: Samples = {}

    def record(name: str, layer: LinearMap, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        total, quota = outputs.numel() // output_width(layer), quotas[name]
        source = generator if isinstance(generator, torch.Generator) else generator[name]
        drawn = torch.randint(total, (quota,), generator=source) if total > quota else torch.arange(total)
        picked = drawn.to(outputs.device)
        calls = samples.setdefault(name, [])
        has_inputs = takes_inputs(len(calls), inputs[0])
        x = input_rows(layer, inputs[0], outputs.shape, picked) if has_inputs else None
        calls.append(Sample(picked, inputs[0].shape, outputs.shape, output_rows(layer, outputs, picked), x))

    with hooked(model, quotas, record):
        run(model, images)
    return {name: _thinned(calls, quotas[name]) for name, calls in samples.items()}


def sample_inputs(
    model: nn.Module, samples: Mapping[str, Sequence[Positions]], images: Batch, *, ends_early: bool = False
) -> dict[str, Tensor]:
    """Runs the model once and returns x [groups, n, d] of each layer at the positions of its samples.

    A layer whose calls have other shapes here than when the samples were taken is left out. ends_early: the pass ends
    where the last call that was sampled begins; for the model and the images that the samples were taken of.
    """
    found: dict[str, list[Tensor | None]] = {name: [] for name in samples}

    def record(name: str, layer: LinearMap, inputs: tuple[Tensor, ...]) -> None:
        calls = found[name]
        sample = samples[name][len(calls)] if len(calls) < len(samples[name]) else None
        if sample is not None and sample.input_shape == inputs[0].shape:
            calls.append(input_rows(layer, inputs[0], sample.output_shape, sample.picked))
        else:
            calls.append(None)
        if ends_early and all(len(found[other]) == len(samples[other]) for other in samples):
            raise EndForward

    with hooked(model, samples, record, before=True):
        run_until_end(run, model, images)
    usable = {name: [part for part in parts if part is not None] for name, parts in found.items()}
    return {n: torch.cat(x, 1) for n, x in usable.items() if len(x) == len(found[n]) == len(samples[n])}


def of_regions(calls: Sequence[Positions], images: Batch) -> bool:
    """Whether the layer's inputs are not one per image but regions, which a two-stage detector's weights select."""
    return any(sample.input_shape[0] != len(images) for sample in calls)


def collect_rows(
    teacher: nn.Module,
    quotas: Mapping[str, int],
    batches: Sequence[Batch],
    generator: torch.Generator,
    student: nn.Module | None = None,
) -> dict[str, Rows]:
    """Rows of several layers over all batches: y of the teacher, x of the student (without one, of the teacher).

    quotas: layer -> about how many rows; all positions where there are fewer. Where the student's rows may come from
    other positions than the teacher's (regions, other shapes), x is of the teacher as well. Layers that are never
    called are left out.
    """
    total = sum(len(batch) for batch in batches)
    parts: dict[str, list[Rows]] = {name: [] for name in quotas}
    for batch in batches:
        shares = {name: -(-quota * len(batch) // total) for name, quota in quotas.items()}
        if student is None:
            samples = sample_outputs(teacher, shares, batch, generator, lambda call, inputs: True)
            x = {name: torch.cat([s.x for s in calls if s.x is not None], 1) for name, calls in samples.items()}
        else:
            samples = sample_outputs(teacher, shares, batch, generator)
            common = {n: calls for n, calls in samples.items() if not of_regions(calls, batch)}
            x = sample_inputs(student, common, batch)
            if missing := {name: calls for name, calls in samples.items() if name not in x}:
                x |= sample_inputs(teacher, missing, batch)
        for name, calls in samples.items():
            parts[name].append(Rows(x[name], torch.cat([sample.y for sample in calls], 1)))
    return {
        name: Rows(*(torch.cat(part, 1) for part in zip(*rows, strict=True))) for name, rows in parts.items() if rows
    }


def _thinned(calls: list[Sample], quota: int) -> list[Sample]:
    """Of the positions sampled in each call only its share of the quota, by its number of output positions."""
    if len(calls) == 1:
        return calls
    totals = [sample.output_shape.numel() for sample in calls]
    keep = [-(-quota * total // sum(totals)) for total in totals]
    return [
        s._replace(picked=s.picked[:n], y=s.y[:, :n], x=None if s.x is None else s.x[:, :n])
        for s, n in zip(calls, keep, strict=True)
    ]


def _batched(layer: _ConvNd, tensor: Tensor) -> Tensor:
    """The tensor with a batch dimension, which convolutions take without as well."""
    return tensor.unsqueeze(0) if tensor.dim() == len(layer.kernel_size) + 1 else tensor


def _windows(layer: _ConvNd, inputs: Tensor, size: Sequence[int], picked: Tensor) -> Tensor:
    """[groups, n, d]: windows of the padded input at the picked positions."""
    stride: Sequence[int] = layer.stride
    if isinstance(layer, TRANSPOSED):
        padded, stride = _spread(layer, inputs, size), (1,) * len(size)
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padding = layer._reversed_padding_repeated_twice
        padded = F.pad(inputs, padding, mode=mode) if any(padding) else inputs  # which pad would copy
    image = picked
    position: list[Tensor] = []
    for length in reversed(size):  # not torch.unravel_index, which waits for the device
        position.insert(0, image % length)
        image = image // length
    index: list[Any] = [image.reshape(-1, *[1] * len(size)), slice(None)]
    for i, (start, kernel) in enumerate(zip(position, layer.kernel_size, strict=True)):
        taps = torch.arange(kernel, device=picked.device) * layer.dilation[i]
        shape = [1] * len(size)
        shape[i] = kernel
        index.append((start * stride[i]).reshape(-1, *[1] * len(size)) + taps.reshape(1, *shape))
    windows = padded[tuple(index)].movedim(-1, 1)  # [n, channels, *kernel]
    return windows.reshape(len(picked), layer.groups, -1).transpose(0, 1)


def _spread(layer: _ConvNd, inputs: Tensor, size: Sequence[int]) -> Tensor:
    """The input, with zeros between and around its pixels, of the convolution that equals a transposed convolution."""
    lengths = [(n - 1) * stride + 1 for n, stride in zip(inputs.shape[2:], layer.stride, strict=True)]
    spread = inputs.new_zeros(*inputs.shape[:2], *lengths)
    steps: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in layer.stride))
    spread[steps] = inputs
    padding = layer.padding
    assert not isinstance(padding, str), "of a transposed convolution it is numbers"
    pads: list[int] = []
    for i in reversed(range(len(size))):
        reach = layer.dilation[i] * (layer.kernel_size[i] - 1)
        left = reach - padding[i]
        pads += [left, size[i] + reach - left - lengths[i]]
    return F.pad(spread, pads)
