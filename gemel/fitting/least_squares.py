"""Weights of tied layers in closed form: least squares on each task's own inputs, against its unmerged model.

A layer can be fitted on the inputs that it has in the unmerged model, or on those that it has in the tied model, block
after block of layers (here), or each layer behind all those before it, in one pass (sharing/lockstep_fit.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemel.fitting.ridge import solve_ridge, solve_weighted
from gemel.fitting.rows import Rows, collect_rows, is_linear_map, matrix_of, normalisation_behind, set_matrix, shape_of
from gemel.forward.batches import Batch
from gemel.sharing.adapters import Adapter, adapter_of
from gemel.sharing.groups import Configuration, Group
from gemel.sharing.signatures import find_layers

RIDGE = 0.1  # measured with benchmarks/initial_weights.py; less of it where rows abound (benchmarks/LOG.md)
LEAST_RIDGE = 0.1  # of that
WIDE, ROWS_PER_IMAGE = 1024, 16  # in layers with so many inputs, more rows of one image say little of their own
MAX_SYSTEM = 5000  # unknowns of the largest system that is solved
MAX_ROWS_BYTES = 1 << 30  # of the rows that are held at a time
ROWS_PER_INPUT = (
    4  # of a grouped convolution, where rows are large: more than this per input (and than MIN_ROWS) add nothing
)
MIN_ROWS = 512


@dataclass(frozen=True)
class Fit:
    """How one group was fitted. `reason` says why it kept the values that it had; empty if it was fitted."""

    reason: str = ""
    ridge: float = 0.0  # the one that was needed
    before: Mapping[str, float] | None = None  # task -> ||X W0 - Y||^2 / ||Y||^2 over the sampled rows
    after: Mapping[str, float] | None = None  # the same with the fitted weights

    @property
    def fitted(self) -> bool:
        return not self.reason


@torch.no_grad()
def fit_least_squares(
    models: nn.ModuleDict,
    teachers: Mapping[str, nn.Module],
    groups: Configuration,
    images: Mapping[str, Sequence[Batch]],
    *,
    generator: torch.Generator,
    task_weights: Mapping[str, float] | None = None,
    num_stages: int = 1,
    own_inputs: bool = False,
    ridge: float = RIDGE,
    positions: int = 2048,
    after_stage: Callable[[int], None] | None = None,
) -> dict[Group, Fit]:
    """Writes into every tied linear or convolutional layer the weights W that minimise, over its tasks t,

        sum_t task_weights_t ||X_t W - Y_t||^2 / ||Y_t||^2 + ridge ||W - W0||^2

    where Y_t is what the layer puts out in the teacher (the unmerged model), X_t what goes into it in the tied model,
    W0 the values it has now, and ridge counts in units of the mean squared input (less where rows abound).
    Where each task normalises the layer's outputs itself, their means and scales are free: X_t and Y_t are centred,
    every channel of Y_t is brought to the same scale in all tasks and counts by the square of its gain in the task's
    normalisation; then that gain is lowered where the fit is bad. Low-rank residuals (sharing/low_rank.py) are fitted
    to what is then left over.

    models: tied already. images: batches per task, without labels. own_inputs: X_t is what goes into the layer in the
    teacher instead. num_stages: the layers are fitted in blocks by depth; each sees inputs collected behind the blocks
    before it (1: all from one pass). More blocks are made where the rows would not fit MAX_ROWS_BYTES. positions: rows
    sampled per layer and task. after_stage(stage): called behind each block; batch normalisation statistics are the
    caller's business. Returns what became of each group; one that is not fitted keeps its values.
    Sources: Jin et al., "Dataless Knowledge Fusion" (RegMean), ICLR 2023, section 3; inputs of the merged model:
    Nguyen et al., "RegMean++", 2025; against the outputs of the unmerged models: Nasery et al., "PLeaS", CVPR 2025.
    """
    fits = {group: Fit(reason) for group in groups if (reason := why_unfit(models, group))}
    order = by_depth(models, [group for group in groups if group not in fits])
    for stage in range(num_stages):
        block = order[stage * len(order) // num_stages : (stage + 1) * len(order) // num_stages]
        for part in _parts(models, block, positions):
            rows = _collect(models, teachers, part, images, positions, generator, own_inputs)
            for group in part:
                num_images = sum(len(batch) for task in group.tasks for batch in images[task])
                fits[group] = fit_group(models, group, rows, task_weights, ridge, num_images)
        if after_stage is not None:
            after_stage(stage)
    return fits


def by_depth(models: Mapping[str, nn.Module], groups: Sequence[Group]) -> list[Group]:
    """Groups from input to output, by the mean relative depth of their occurrences."""
    depths = {}
    for task, model in models.items():
        names = [layer.name for layer in find_layers(model)]
        depths |= {(task, name): i / len(names) for i, name in enumerate(names)}
    return sorted(groups, key=lambda g: (sum(depths[o] for o in g.occurrences) / len(g.occurrences), g.occurrences))


def row_quota(layer: nn.Module, positions: int, num_tasks: int) -> int:
    """Rows to sample per task: no more than help, and so few that the system to solve stays small."""
    groups, inputs, _ = shape_of(layer)
    quota = positions if groups == 1 else min(positions, max(MIN_ROWS, ROWS_PER_INPUT * inputs))
    return quota if inputs <= MAX_SYSTEM else min(quota, MAX_SYSTEM // num_tasks)


def why_unfit(models: nn.ModuleDict, group: Group) -> str:
    """Why a group cannot be fitted; empty if it can."""
    layers = [models[o.task].get_submodule(o.layer) for o in group.occurrences]
    if not is_linear_map(layers[0]):
        return f"{type(layers[0]).__name__} is no linear map"
    if any(layer.weight is not layers[0].weight or layer.bias is not layers[0].bias for layer in layers):
        return "not tied"
    return ""


def _parts(models: nn.ModuleDict, block: Sequence[Group], positions: int) -> list[list[Group]]:
    """The block, cut so that the rows of each part fit MAX_ROWS_BYTES."""
    parts: list[list[Group]] = []
    held = MAX_ROWS_BYTES
    for group in block:
        layer = models[group.occurrences[0].task].get_submodule(group.occurrences[0].layer)
        num_groups, inputs, outputs = shape_of(layer)
        rows = row_quota(layer, positions, len(group.tasks)) * len(group.tasks)
        needed = 2 * rows * num_groups * (inputs + outputs) * layer.weight.element_size()
        if held + needed > MAX_ROWS_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(group)
        held += needed
    return parts


def _collect(models, teachers, block, images, positions, generator, own_inputs) -> dict[tuple[str, str], Rows]:
    rows: dict[tuple[str, str], Rows] = {}
    for task in dict.fromkeys(task for group in block for task in group.tasks):
        layers = quotas(models, block, task, positions)
        found = collect_rows(teachers[task], layers, images[task], generator, None if own_inputs else models[task])
        rows |= {(task, name): sampled for name, sampled in found.items()}
    return rows


def quotas(models: nn.ModuleDict, groups: Sequence[Group], task: str, positions: int) -> dict[str, int]:
    """The task's layers among the groups -> rows to sample of each."""
    occurrences = [(o, group) for group in groups for o in group.occurrences if o.task == task]
    return {
        o.layer: row_quota(models[task].get_submodule(o.layer), positions, len(group.tasks)) for o, group in occurrences
    }


def fit_group(
    models: nn.ModuleDict,
    group: Group,
    rows: dict[tuple[str, str], Rows],
    task_weights: Mapping[str, float] | None,
    ridge: float,
    num_images: int,
) -> Fit:
    """Solves for one group, writes the result into its layer, and takes its rows out of `rows` to free them.

    num_images: that the rows of all its tasks come from.
    """
    unseen = [o for o in group.occurrences if o not in rows]
    sampled = {o.task: rows.pop(o) for o in group.occurrences if o in rows}
    if unseen:
        return Fit(f"{unseen[0].task}: {unseen[0].layer} is never called as a module")
    if not all(torch.isfinite(part).all() for r in sampled.values() for part in r):
        return Fit("inputs or outputs are not finite")
    layer = models[group.occurrences[0].task].get_submodule(group.occurrences[0].layer)
    norms = {o.task: normalisation_behind(models[o.task], o.layer) for o in group.occurrences}
    counts = {task: (task_weights or {}).get(task, 1.0) for task in sampled}
    is_scale_free = all(norm is not None for norm in norms.values())
    if is_scale_free:
        sampled = {task: r.centred() for task, r in sampled.items()}
        sampled, weights = _in_equal_units(sampled, norms, counts)
    else:
        weights = torch.stack([counts[task] * _relative_to(r) for task, r in sampled.items()])
    start = matrix_of(layer)
    residuals = {task: r.y - r.x @ start for task, r in sampled.items()}
    inputs = [r.x for r in sampled.values()]
    num_inputs, num_rows = inputs[0].shape[2], sum(x.shape[1] for x in inputs)
    if num_inputs >= WIDE:
        num_rows = min(num_rows, ROWS_PER_IMAGE * num_images)
    ridge *= min(1.0, max(LEAST_RIDGE, 2 * num_inputs / num_rows))
    change, ridge = solve_weighted(inputs, list(residuals.values()), _shares(weights), ridge)
    set_matrix(layer, start + change)
    left = {task: r - sampled[task].x @ change for task, r in residuals.items()}
    for o in group.occurrences:
        own = adapter_of(models[o.task].get_submodule(o.layer))
        if own is not None:
            left[o.task] = _fit_adapter(own, sampled[o.task].x, left[o.task], ridge)
    for task, norm in norms.items():
        if is_scale_free and norm.affine:
            _damp(norm, sampled[task].y - left[task], sampled[task].y)
    energy = {task: r.y.square().sum().clamp_min(1e-12) for task, r in sampled.items()}
    before = {task: float(r.square().sum() / energy[task]) for task, r in residuals.items()}
    after = {task: float(r.square().sum() / energy[task]) for task, r in left.items()}
    return Fit("", ridge, before, after)


def _fit_adapter(residual: Adapter, x: Tensor, left: Tensor, ridge: float) -> Tensor:
    """Fits a task's residual to what the shared weights leave over; returns what it leaves over in turn.

    Reduced-rank regression: the ridge regression R of left on x, cut to the directions in which x R is largest.
    Source: Izenman, "Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 5, 1975.
    """
    matrix, _ = solve_ridge(x, left, ridge)
    found = x @ matrix
    directions = torch.linalg.eigh(found.mT @ found).eigenvectors[:, :, -residual.rank :]
    set_matrix(residual.down, matrix @ directions)
    set_matrix(residual.up, directions.mT)
    return left - found @ directions @ directions.mT


def _in_equal_units(sampled, norms, counts) -> tuple[dict[str, Rows], Tensor]:
    """Outputs of all tasks on one scale per channel, since each task normalises them itself, and weights
    [tasks, groups, o] by what a channel contributes behind the normalisation: the square of its gain there.
    """
    deviations = torch.stack([r.y.square().mean(1).sqrt() for r in sampled.values()])
    deviations = deviations.clamp_min(1e-12).clamp_min(1e-3 * deviations.mean((1, 2), keepdim=True))
    gains = [
        torch.ones_like(d) if norms[t].weight is None else norms[t].weight.detach().view_as(d)
        for t, d in zip(sampled, deviations, strict=True)
    ]
    weights = torch.stack(gains).square()
    weights = weights / weights.sum((1, 2), keepdim=True).clamp_min(1e-12)
    weights = weights * weights.new_tensor([counts[task] for task in sampled]).view(-1, 1, 1)
    common = (_shares(weights) * deviations).sum(0)
    units = (common / deviations).unsqueeze(2)
    return {task: Rows(r.x, r.y * unit) for (task, r), unit in zip(sampled.items(), units, strict=True)}, weights


def _relative_to(rows: Rows) -> Tensor:
    """A weight [groups, o] that makes the squared error one of all outputs' mean square."""
    groups, _, width = rows.y.shape
    return (1 / rows.y.square().mean().clamp_min(1e-12)).expand(groups, width)


def _shares(weights: Tensor) -> Tensor:
    """Of each task in a channel; [tasks, groups, o], the sum over the tasks is 1."""
    weights = weights.clamp_min(1e-9 * weights.amax())
    return weights / weights.sum(0, keepdim=True)


@torch.no_grad()
def _damp(norm: nn.Module, found: Tensor, wanted: Tensor) -> None:
    """Lowers the gain of channels that a fit hits badly.

    The gain at which the error is least is the correlation between what is found and what is wanted, that which keeps
    the variance is 1; it becomes their geometric mean (measured: benchmarks/LOG.md).
    """
    products = (found * wanted).sum(1), found.square().sum(1) * wanted.square().sum(1)
    correlation = (products[0] / products[1].sqrt().clamp_min(1e-12)).clamp(0, 1)
    norm.weight.mul_(correlation.sqrt().reshape(-1))
