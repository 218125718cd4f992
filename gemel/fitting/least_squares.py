"""Weights of tied layers in closed form: least squares on each task's own inputs, against its unmerged model.

A layer can be fitted on the inputs that it has in the unmerged model, or on those that it has in the tied model: in
stages, one block of layers after another (here), or each layer behind all those before it (sequential_fit.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from gemel.fitting.batch_norm import is_frozen
from gemel.fitting.moments import Moments, moments_of
from gemel.fitting.ridge import (
    factor_of,
    floored,
    shares_of,
    solve_in_metrics,
    solve_weighted,
    solve_with_scales,
)
from gemel.fitting.rows import (
    Rows,
    collect_rows,
    is_linear_map,
    linear_map_at,
    matrix_of,
    module_behind,
    normalisation_behind,
    row_itemsize,
    set_matrix,
    shape_of,
)
from gemel.forward.batches import Batch
from gemel.forward.modes import Models
from gemel.sharing.adapters import Adapter, LinearMap, adapter_of, as_linear_map, can_have_affine
from gemel.sharing.affine import Affine, affine_bytes, affine_of
from gemel.sharing.groups import Configuration, Group
from gemel.sharing.signatures import find_layers

# Where a comment names a date and a title, the value follows from that entry of benchmarks/LOG.md.
RIDGE = 0.1  # 2026-11-24 Initial weights, everything tied, nothing trained
# Of layers with many rows for their inputs the ridge is lowered, to this share of it at most, and in layers with at
# least WIDE inputs only so many rows of an image count for that: 2026-11-26 The last thousandth of models trained apart
LEAST_RIDGE = 0.1
WIDE, ROWS_PER_IMAGE = 1024, 16
# Rows of a grouped convolution, per input and at least; there rows are large, and more of them do not improve the fit:
# 2026-11-25 What a fit matches
ROWS_PER_INPUT, MIN_ROWS = 4, 512
# Of the errors of a layer, what counts by where they go: 2026-11-28 Errors count by what arrives at the outputs
METRIC_SHARE = 0.9
AFFINE_SHARE = 0.125  # of a layer's bytes, what the scale and bias of a task may take
# Limits of memory
MAX_SYSTEM = 5000  # unknowns of the largest system that is solved
MAX_ROWS_BYTES = 2 << 30  # of the rows that are held at a time, were there as many as are asked for


@dataclass(frozen=True)
class Fit:
    """The result for one group. `reason`: why it kept its values; empty if it was fitted."""

    reason: str = ""
    ridge: float = 0.0  # the one that was used
    before: Mapping[str, float] | None = None  # task -> ||X W0 - Y||^2 / ||Y||^2 over the sampled rows, if asked for
    after: Mapping[str, float] | None = None  # the same with the fitted weights

    @property
    def fitted(self) -> bool:
        return not self.reason


class FitSettings(NamedTuple):
    """How `fit_least_squares` fits."""

    task_weights: Mapping[str, float] | None = None  # of each task in the sum of errors; 1 where none is given
    ridge: float = RIDGE
    positions: int = 2048  # rows sampled per layer and task
    num_stages: int = 1  # blocks of layers, by depth, each on inputs collected behind the blocks before it
    teacher_inputs: bool = False  # X_t: the inputs of the layer in the teacher, not in the tied model


DEFAULT_SETTINGS = FitSettings()


@torch.no_grad()
def fit_least_squares(
    models: Models,
    teachers: Models,
    groups: Configuration,
    images: Mapping[str, Sequence[Batch]],
    *,
    generator: torch.Generator,
    settings: FitSettings = DEFAULT_SETTINGS,
    after_stage: Callable[[int], None] | None = None,
) -> dict[Group, Fit]:
    """Writes into every tied linear or convolutional layer the weights W that minimise, over its tasks t,

        sum_t task_weights_t ||X_t W - Y_t||^2 / ||Y_t||^2 + ridge ||W - W0||^2

    where Y_t are the layer's outputs in the teacher (the unmerged model), X_t its inputs in the tied model, W0 its
    present weights, and ridge is in units of the mean squared input (less of it where there are many rows).
    Where each task normalises the layer's outputs itself, their means and scales are free: X_t and Y_t are centred,
    every channel of Y_t is brought to the same scale in all tasks and weighted by the square of its gain in the task's
    normalisation; then the gains of channels with a large error are lowered. Where each task has a private scale and
    bias, these are fitted with the shared weights; the errors are then those of centred rows. Adapters are fitted to
    what the shared weights leave over.

    models: tied already. images: batches per task, without labels. There are more stages than settings.num_stages where
    the rows would exceed MAX_ROWS_BYTES. after_stage(stage) is called after each stage; the statistics of batch
    normalisation are left to the caller. Returns the result of each group; one that is not fitted keeps its values.
    Sources: Jin et al., "Dataless Knowledge Fusion" (RegMean), ICLR 2023, section 3; inputs of the merged model:
    Nguyen et al., "RegMean++", 2025; against the outputs of the unmerged models: Nasery et al., "PLeaS", CVPR 2025.
    """
    fits = {group: Fit(reason) for group in groups if (reason := why_unfit(models, group))}
    order = by_depth(models, [group for group in groups if group not in fits])
    for stage in range(settings.num_stages):
        block = order[stage * len(order) // settings.num_stages : (stage + 1) * len(order) // settings.num_stages]
        for part in parts_of(models, block, settings.positions):
            rows = _collect(models, teachers, part, images, settings, generator)
            for group in part:
                num_images = sum(len(batch) for task in group.tasks for batch in images[task])
                found = [(o.task, o.layer) for o in group.occurrences if o in rows]
                sums = {o: sums_of(models, group, rows.pop(o)) for o in found}
                how = (settings.task_weights, settings.ridge, num_images)
                fits[group] = fit_group(models, group, sums, *how, reports_errors=True)
        if after_stage is not None:
            after_stage(stage)
    return fits


def by_depth(models: Models, groups: Sequence[Group]) -> list[Group]:
    """Groups from input to output, by the mean relative depth of their occurrences."""
    depths: dict[tuple[str, str], float] = {}
    for task, model in models.items():
        names = [layer.name for layer in find_layers(model)]
        depths |= {(task, name): i / len(names) for i, name in enumerate(names)}
    return sorted(groups, key=lambda g: (sum(depths[o] for o in g.occurrences) / len(g.occurrences), g.occurrences))


def row_quota(layer: LinearMap, positions: int, num_tasks: int, max_bytes: float = math.inf) -> int:
    """Rows to sample per task: no more than improve the fit, and so few that the system to solve stays small.

    max_bytes: of the sums that are kept of the rows of all tasks (moments.py).
    """
    groups, inputs, _ = shape_of(layer)
    quota = positions if groups == 1 else min(positions, max(MIN_ROWS, ROWS_PER_INPUT * inputs))
    quota = quota if inputs <= MAX_SYSTEM else min(quota, MAX_SYSTEM // num_tasks)
    row_bytes = num_tasks * groups * inputs * row_itemsize(layer)
    return quota if min(quota, inputs) * row_bytes <= max_bytes else max(1, int(max_bytes // row_bytes))


def why_unfit(models: Models, group: Group) -> str:
    """Why a group cannot be fitted; empty if it can."""
    layers = [models[o.task].get_submodule(o.layer) for o in group.occurrences]
    if not is_linear_map(layers[0]):
        return f"{type(layers[0]).__name__} is no linear map"
    if any(layer.weight is not layers[0].weight or layer.bias is not layers[0].bias for layer in layers):
        return "not tied"
    return ""


def parts_of(models: Models, block: Sequence[Group], positions: int) -> list[list[Group]]:
    """The block, of layers that are linear maps, in parts whose rows take at most MAX_ROWS_BYTES each."""
    parts: list[list[Group]] = []
    held = MAX_ROWS_BYTES
    for group in block:
        layer = linear_map_at(models[group.occurrences[0].task], group.occurrences[0].layer)
        num_groups, inputs, outputs = shape_of(layer)
        rows = row_quota(layer, positions, len(group.tasks)) * len(group.tasks)
        needed = 2 * rows * num_groups * (inputs + outputs) * row_itemsize(layer)
        if held + needed > MAX_ROWS_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(group)
        held += needed
    return parts


def _collect(
    models: Models,
    teachers: Models,
    block: Sequence[Group],
    images: Mapping[str, Sequence[Batch]],
    settings: FitSettings,
    generator: torch.Generator,
) -> dict[tuple[str, str], Rows]:
    rows: dict[tuple[str, str], Rows] = {}
    for task in dict.fromkeys(task for group in block for task in group.tasks):
        layers = quotas(models, block, task, settings.positions)
        student = None if settings.teacher_inputs else models[task]
        found = collect_rows(teachers[task], layers, images[task], generator, student)
        rows |= {(task, name): sampled for name, sampled in found.items()}
    return rows


def quotas(
    models: Models, groups: Sequence[Group], task: str, positions: int, max_bytes: float = math.inf
) -> dict[str, int]:
    """The task's layers among the groups -> rows to sample of each."""
    occurrences = [(o, group) for group in groups for o in group.occurrences if o.task == task]
    return {
        o.layer: row_quota(linear_map_at(models[task], o.layer), positions, len(group.tasks), max_bytes)
        for o, group in occurrences
    }


def fit_group(
    models: Models,
    group: Group,
    sums: Mapping[tuple[str, str], Moments],
    task_weights: Mapping[str, float] | None,
    ridge: float,
    num_images: int,
    reports_errors: bool = False,
) -> Fit:
    """Solves for one group and writes the result into its layer.

    sums: what `sums_of` returned for each occurrence. num_images: from which the rows of all its tasks were sampled.
    reports_errors: whether errors before and after are computed, which takes as long as half of the solution.
    """
    for o in group.occurrences:
        if o not in sums:
            return Fit(f"{o.task}: {o.layer} is never called as a module")
    sampled = {o.task: sums[o] for o in group.occurrences}
    if not all(s.is_finite for s in sampled.values()):
        return Fit("inputs or outputs are not finite")
    norms = normalisations(models, group)
    counts = {task: (task_weights or {}).get(task, 1.0) for task in sampled}
    if norms:
        sampled, weights = _on_common_scale(sampled, norms, counts)
    else:
        weights = torch.stack([counts[task] * _relative_to(s) for task, s in sampled.items()])
    layer = linear_map_at(models[group.occurrences[0].task], group.occurrences[0].layer)
    start = matrix_of(layer)
    ridge = ridge * _share_of_ridge(list(sampled.values()), num_images)
    affines = {} if norms else affines_of(models, group)
    metrics = _metrics(list(sampled.values()), weights)
    if affines:
        of_errors = weights if metrics is None else metrics
        shared, scales, ridge = solve_with_scales(list(sampled.values()), start, of_errors, ridge)
        fitted = {task: shared * scale.unsqueeze(1) for task, scale in zip(sampled, scales, strict=True)}
    else:
        if metrics is None:
            change, ridge = solve_weighted(list(sampled.values()), start, shares_of(weights), ridge)
        else:
            change, ridge = solve_in_metrics(list(sampled.values()), start, metrics, ridge)
        shared = start + change
        fitted = dict.fromkeys(sampled, shared)
    set_matrix(layer, shared)
    for i, o in enumerate(group.occurrences):
        adapter = adapter_of(models[o.task].get_submodule(o.layer))
        if adapter is not None:
            metric = None if metrics is None else metrics[i]
            fitted[o.task] = fitted[o.task] + _fit_adapter(adapter, sampled[o.task], fitted[o.task], metric, ridge)
    for (task, affine), scale in zip(affines.items(), scales if affines else (), strict=True):
        _set_affine(affine, scale, sampled[task], fitted[task])
    for task, norm in norms.items():
        if norm.affine:
            _lower_gains(norm, sampled[task], fitted[task])
    if not reports_errors:
        return Fit("", ridge)
    return Fit("", ridge, _relative_errors(dict.fromkeys(sampled, start), sampled), _relative_errors(fitted, sampled))


def sums_of(models: Models, group: Group, rows: Rows, metric: Tensor | None = None) -> Moments:
    """The sums that `fit_group` needs of the rows of one task: centred where the means of the outputs are free, since
    every task normalises them or has a private bias. metric: of the task's outputs, if it is known."""
    if normalisations(models, group):
        return moments_of(rows.centred(), metric)
    affines = affines_of(models, group).values()
    if affines and all(affine.bias is not None for affine in affines):
        return moments_of(rows.centred(), metric)._replace(means=rows.means())
    return moments_of(rows, metric)


def affines_of(models: Models, group: Group) -> dict[str, Affine]:
    """Task -> the private scale and bias of its layer; empty unless every task has them."""
    found = {o.task: affine_of(models[o.task].get_submodule(o.layer)) for o in group.occurrences}
    affines = {task: affine for task, affine in found.items() if affine is not None}
    return affines if len(affines) == len(found) else {}


def with_affine(models: Models, group: Group) -> Group:
    """The group with a private scale and bias for each task; as it is, where that is of no use.

    Of use for linear layers and convolutions, unless every task has batch normalisation right behind them, which has a
    scale and a bias of the task already, or the two vectors take more than AFFINE_SHARE of the layer's bytes.
    """
    layers = [models[o.task].get_submodule(o.layer) for o in group.occurrences]
    if not all(map(can_have_affine, layers)):
        return group
    behind = [module_behind(models[o.task], o.layer) for o in group.occurrences]
    if normalisations(models, group) or all(module is not None and is_frozen(module) for module in behind):
        return group
    size = group.as_counted(layers[0], affine_bytes(as_linear_map(layers[0])))
    return replace(group, affine_bytes=size) if size <= AFFINE_SHARE * group.bytes else group


def normalisations(models: Models, group: Group) -> dict[str, _BatchNorm]:
    """Task -> the batch normalisation right after its layer; empty unless every task has one."""
    found = {o.task: normalisation_behind(models[o.task], o.layer) for o in group.occurrences}
    norms = {task: norm for task, norm in found.items() if norm is not None}
    return norms if len(norms) == len(found) else {}


def _share_of_ridge(sums: list[Moments], num_images: int) -> float:
    """The share of the ridge that a layer needs: less of it the more rows there are for its inputs."""
    num_inputs, num_rows = sums[0].xy.shape[1], sum(s.num_rows for s in sums)
    if num_inputs >= WIDE:
        num_rows = min(num_rows, ROWS_PER_IMAGE * num_images)
    return min(1.0, max(LEAST_RIDGE, 2 * num_inputs / num_rows))


def _relative_errors(matrices: Mapping[str, Tensor], sampled: Mapping[str, Moments]) -> dict[str, float]:
    """Task -> sum of squared errors with its matrix over the sum of squared outputs."""
    return {t: float(s.errors(matrices[t]).sum() / s.yy.sum().clamp_min(1e-12)) for t, s in sampled.items()}


def _metrics(sums: list[Moments], weights: Tensor) -> Tensor | None:
    """[tasks, groups, o, o]: METRIC_SHARE of the metric of each task, and the rest by its weights [tasks, groups, o].

    An error as large as the outputs counts as much by both. By the weights alone where no error arrives at the outputs
    of the model (behind the layer all is zero). None where a task has no metric.
    """
    found = []
    for s, own in zip(sums, floored(weights), strict=True):
        if s.metric is None:
            return None
        variance = s.yy / s.num_rows
        of_metric = (s.metric.diagonal(dim1=1, dim2=2) * variance).sum()
        factor, by_weights = (own * variance).sum() / of_metric, torch.diag_embed(own)
        blended = METRIC_SHARE * factor * s.metric + (1 - METRIC_SHARE) * by_weights
        found.append(torch.where(factor.isfinite(), blended, by_weights))
    return torch.stack(found)


def _fit_adapter(adapter: Adapter, sums: Moments, shared: Tensor, metric: Tensor | None, ridge: float) -> Tensor:
    """Fits a task's adapter to what the shared matrix leaves over; returns the matrix that the adapter adds to it.

    Reduced-rank regression: the ridge regression R of the residual on x, projected onto the directions in which x R is
    largest, measured in the metric [groups, o, o] of the outputs if there is one. Source: Izenman, "Reduced-rank
    regression for the multivariate linear model", J. Multivariate Analysis 5, 1975.
    """
    matrix, _ = solve_weighted([sums], shared, torch.ones_like(sums.yy).unsqueeze(0), ridge)
    if metric is None:
        up = _largest_directions(matrix, sums, adapter.rank)
        down = matrix @ up
    else:
        factor = factor_of(metric)
        directions = _largest_directions(matrix @ factor, sums, adapter.rank)
        # orthonormal again, as training takes steps of one size in both parts
        up, triangular = torch.linalg.qr(torch.linalg.solve_triangular(factor.mT, directions, upper=True))
        down = matrix @ factor @ directions @ triangular.mT
    set_matrix(adapter.down, down)
    set_matrix(adapter.up, up.mT)
    return down @ up.mT


def _largest_directions(matrix: Tensor, sums: Moments, rank: int) -> Tensor:
    """[groups, o, rank]: orthonormal directions in which x @ matrix is largest."""
    return torch.linalg.eigh(matrix.mT @ sums.product(matrix)).eigenvectors[:, :, -rank:]


@torch.no_grad()
def _set_affine(affine: Affine, scale: Tensor, sums: Moments, matrix: Tensor) -> None:
    """Writes a scale [groups, o], and the bias with which x @ matrix has the means of y."""
    affine.scale.copy_(scale.reshape(-1))
    if affine.bias is not None:
        assert sums.means is not None, "sums_of keeps the means where there is a bias"
        affine.bias.copy_((sums.means.y - sums.means.x @ matrix).reshape(-1))


def _on_common_scale(
    sampled: Mapping[str, Moments], norms: Mapping[str, _BatchNorm], counts: Mapping[str, float]
) -> tuple[dict[str, Moments], Tensor]:
    """The sums with each channel of the outputs on the same scale in all tasks, since each task normalises it itself,
    and weights [tasks, groups, o]: the square of the channel's gain in the task's normalisation.
    """
    deviations = torch.stack([(s.yy / s.num_rows).sqrt() for s in sampled.values()])
    deviations = deviations.clamp_min(1e-12).clamp_min(1e-3 * deviations.mean((1, 2), keepdim=True))
    gains = [
        torch.ones_like(d) if norms[t].weight is None else norms[t].weight.detach().to(d.dtype).view_as(d)
        for t, d in zip(sampled, deviations, strict=True)
    ]
    weights = torch.stack(gains).square()
    weights = weights / weights.sum((1, 2), keepdim=True).clamp_min(1e-12)
    weights = weights * weights.new_tensor([counts[task] for task in sampled]).view(-1, 1, 1)
    factors = (shares_of(weights) * deviations).sum(0) / deviations
    return {task: s.scaled(factor) for (task, s), factor in zip(sampled.items(), factors, strict=True)}, weights


def _relative_to(sums: Moments) -> Tensor:
    """The weight [groups, o] that makes the squared error relative to the mean square of all outputs."""
    mean = sums.yy.mean() / sums.num_rows
    return (1 / mean.clamp_min(1e-12)).expand_as(sums.yy)


@torch.no_grad()
def _lower_gains(norm: _BatchNorm, sums: Moments, matrix: Tensor) -> None:
    """Multiplies the gain of each channel by the root of the correlation between its fitted and its target outputs.

    Multiplying by the correlation minimises the squared error, multiplying by 1 keeps the variance; this is the
    geometric mean of both (benchmarks/LOG.md, 2026-11-25 What a fit matches).
    """
    squares = (matrix * sums.product(matrix)).sum(1).clamp_min(0) * sums.yy
    correlation = ((matrix * sums.xy).sum(1) / squares.sqrt().clamp_min(1e-12)).clamp(0, 1)
    norm.weight.mul_(correlation.sqrt().reshape(-1))
