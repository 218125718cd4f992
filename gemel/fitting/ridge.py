"""Ridge regression for several tasks at once, with a weight for each task and output channel, or a matrix of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from gemel.fitting.moments import Moments

# Of conjugate gradients; 8 gave the same accuracies: benchmarks/LOG.md, 2026-11-25 What a fit matches, and with metrics
# 2026-11-28 Errors count by what arrives at the outputs
ITERATIONS = 3
LEAST_WEIGHT = 1e-6  # of the mean weight, that matrices get in all directions, so that they can be factored
# Of alternating least squares, and the limits of a scale: benchmarks/LOG.md, 2026-11-26 Private scale and bias
ROUNDS = 3
LEAST_SCALE, LARGEST_SCALE = 0.1, 10.0


def solve_ridge(x: Tensor, residual: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(D, ridge used): D [groups, d, o] minimises ||x D - residual||^2 + ridge * mean(diagonal of x'x) ||D||^2.

    x [groups, n, d], residual [groups, n, o]. Solves the normal equations, or their dual where n < d, by Cholesky
    factorisation. Where rounding leaves the matrix not positive definite, the ridge is raised tenfold, repeatedly.
    """
    dual = x.shape[1] < x.shape[2]
    system = x @ x.mT if dual else x.mT @ x
    factor, ridge = _factor(system, _scale(x.square().sum((1, 2), keepdim=True), x.shape[2]), ridge)
    solution = torch.cholesky_solve(residual if dual else x.mT @ residual, factor)
    return (x.mT @ solution if dual else solution), ridge


def solve_weighted(sums: list[Moments], start: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(D, ridge used): every column D_c minimises sum_t weights[t, c] ||x_t (start + D)_c - y_tc||^2 / n_t + the ridge.

    sums: of the rows of each task; start [groups, d, o]; weights [tasks, groups, o], at least 0, whose sum over the
    tasks is 1. The ridge is in units of the mean squared input. To factor one matrix a column would be too slow: the
    one for mean weights is factored and preconditions a few conjugate gradient steps for all columns. Where there are
    fewer rows than inputs, each task has its mean weight in all columns instead.
    """
    means = weights.mean((1, 2))
    if sum(s.num_rows for s in sums) < start.shape[1]:
        parts = [(s.rows, (m / s.num_rows).sqrt()) for s, m in zip(sums, means, strict=True) if s.rows is not None]
        stacked = torch.cat([scale * rows.x for rows, scale in parts], 1)
        return solve_ridge(stacked, torch.cat([scale * (r.y - r.x @ start) for r, scale in parts], 1), ridge)
    shares = [w.unsqueeze(1) / s.num_rows for w, s in zip(weights, sums, strict=True)]
    target = sum((w * (s.xy - s.product(start)) for w, s in zip(shares, sums, strict=True)), torch.zeros_like(start))
    system = _mean_system(sums, means)
    scale = _scale(system.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1), system.shape[1])
    factor, ridge = _factor(system, scale, ridge)
    del system
    if torch.allclose(weights, means.view(-1, 1, 1).expand_as(weights)):
        return torch.cholesky_solve(target, factor), ridge

    def apply(change: Tensor) -> Tensor:
        parts = (w * s.product(change) for w, s in zip(shares, sums, strict=True))
        return sum(parts, ridge * scale * change)

    return _conjugate_gradients(apply, target, lambda left: torch.cholesky_solve(left, factor)), ridge


def solve_in_metrics(sums: list[Moments], start: Tensor, metrics: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(D, ridge used): D minimises sum_t trace(e_t metrics[t] e_t') / n_t + the ridge, e_t = x_t (start + D) - y_t.

    As `solve_weighted`, with a symmetric matrix [groups, o, o] of each task in the place of its weights of single
    columns; metrics [tasks, groups, o, o], in any unit. The ridge measures D in the sum of the matrices.
    """
    diagonals = floored(metrics.diagonal(dim1=2, dim2=3))
    means = (diagonals / diagonals.sum(0)).mean(2)  # [tasks, groups]
    if sum(s.num_rows for s in sums) < start.shape[1]:
        return solve_weighted(sums, start, means.unsqueeze(2).expand_as(diagonals), ridge)
    total, of_outputs = _with_least_weight(metrics.sum(0))
    parts = [matrix / s.num_rows for s, matrix in zip(sums, metrics, strict=True)]
    errors = (s.xy - s.product(start) for s in sums)
    target = sum((e @ part for e, part in zip(errors, parts, strict=True)), torch.zeros_like(start))
    system = _mean_system(sums, means)
    scale = _scale(system.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1), system.shape[1])
    of_inputs, ridge = _factor(system, scale, ridge)
    del system

    def apply(change: Tensor) -> Tensor:
        products = (s.product(change) @ part for s, part in zip(sums, parts, strict=True))
        return sum(products, ridge * scale * (change @ total))

    def condition(left: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(left, of_inputs).mT, of_outputs).mT

    return _conjugate_gradients(apply, target, condition, dims=(1, 2)), ridge


def solve_with_scales(
    sums: list[Moments], start: Tensor, weights: Tensor, ridge: float
) -> tuple[Tensor, Tensor, float]:
    """(W, scales, ridge used) of alternating least squares: W [groups, d, o] and a scale of every task and column,
    scales [tasks, groups, o], minimise sum_t weights[t, c] ||scales[t, c] x_t W_c - y_tc||^2 / n_t + the ridge on
    W - start.

    As `solve_weighted`, or as `solve_in_metrics` if the weights are matrices [tasks, groups, o, o], in ROUNDS rounds
    from scales of 1; weights: in any unit.
    """
    scales = torch.ones_like(torch.stack([s.yy for s in sums]))
    shared = start
    for _ in range(ROUNDS):
        scaled = [s.scaled(1 / scale) for s, scale in zip(sums, scales, strict=True)]
        if weights.dim() == 4:
            of_scaled = weights * scales.unsqueeze(3) * scales.unsqueeze(2)
            change, ridge = solve_in_metrics(scaled, start, of_scaled, ridge)
        else:
            change, ridge = solve_weighted(scaled, start, shares_of(weights * scales.square()), ridge)
        shared = start + change
        scales = torch.stack([_best_scale(s, shared) for s in sums])
    return shared, scales, ridge


def _best_scale(sums: Moments, matrix: Tensor) -> Tensor:
    """[groups, o]: the scale of each output of x @ matrix, within the limits, with which it is nearest to y."""
    squares = (matrix * sums.product(matrix)).sum(1)
    return ((matrix * sums.xy).sum(1) / squares.clamp_min(1e-12)).clamp(LEAST_SCALE, LARGEST_SCALE)


def shares_of(weights: Tensor) -> Tensor:
    """The weights [tasks, groups, o] scaled so that the sum over the tasks is 1 in every channel.

    Equal where all are 0, as of a layer before normalisation with a gain of 0 (a residual branch before its training).
    """
    weights = floored(weights)
    return weights / weights.sum(0, keepdim=True)


def floored(weights: Tensor) -> Tensor:
    """The weights without zeros."""
    return weights.clamp_min((1e-9 * weights.amax()).clamp_min(1e-30))


def factor_of(metric: Tensor) -> Tensor:
    """Lower triangular L [groups, o, o] with L L' = metric [groups, o, o], plus LEAST_WEIGHT in all directions."""
    return _with_least_weight(metric)[1]


def _with_least_weight(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix plus LEAST_WEIGHT, or what it takes for a Cholesky factor, in all directions; and that factor."""
    mean = metric.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    factor, least = _factor(metric, mean, LEAST_WEIGHT)
    return metric + torch.diag_embed((least * mean).expand(-1, 1, metric.shape[2]).squeeze(1)), factor


def _mean_system(sums: list[Moments], means: Tensor) -> Tensor:
    """The sum of x'x / n over the tasks, each with its mean weight, or that of each of its groups [tasks, groups]."""
    means = means.view(len(sums), -1, 1, 1)
    system = sums[0].gram() * (means[0] / sums[0].num_rows)
    for s, mean in zip(sums[1:], means[1:], strict=True):
        system += s.gram() * (mean / s.num_rows)
    return system


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    target: Tensor,
    condition: Callable[[Tensor], Tensor],
    dims: int | tuple[int, int] = 1,
) -> Tensor:
    """Solves apply(D) = target from 0, column by column, or of a group at once with dims (1, 2).

    condition: solves a system that is near to it.
    """
    solution, left = torch.zeros_like(target), target
    step, before = torch.zeros_like(target), torch.ones_like(target.sum(dims, keepdim=True))
    for _ in range(ITERATIONS):
        conditioned = condition(left)
        size = (left * conditioned).sum(dims, keepdim=True)
        step = conditioned + size / before.clamp_min(1e-30) * step
        applied = apply(step)
        length = size / (step * applied).sum(dims, keepdim=True).clamp_min(1e-30)
        solution, left, before = solution + length * step, left - length * applied, size
    return solution


def _scale(trace: Tensor, inputs: int) -> Tensor:
    return (trace / inputs).clamp_min(torch.finfo(trace.dtype).tiny ** 0.5)


def _factor(system: Tensor, scale: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Cholesky factor of system + ridge * scale, and the ridge, raised until there is one."""
    while True:
        shifted = system.clone()
        shifted.diagonal(dim1=1, dim2=2).add_(ridge * scale.squeeze(2))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed.any():
            return factor, ridge
        ridge = max(10 * ridge, 1e-6)
        assert ridge < 1e6, "rows that are not finite"
