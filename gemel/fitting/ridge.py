"""Ridge regression for several tasks at once, with a weight for each task and output channel."""

from collections.abc import Callable

import torch
from torch import Tensor

ITERATIONS = 3  # of conjugate gradients; 8 gave the same accuracies (benchmarks/LOG.md, 2026-11-25 What a fit matches)


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


def solve_weighted(x: list[Tensor], residuals: list[Tensor], weights: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(D, ridge used): every column D_c minimises sum_t weights[t, c] ||x_t D_c - residual_tc||^2 / n_t and the ridge.

    x: per task [groups, n_t, d]; residuals: per task [groups, n_t, o]; weights [tasks, groups, o], at least 0, whose
    sum over the tasks is 1. The ridge is in units of the mean squared input. To factor one matrix a column would be too
    slow: the one for mean weights is factored and preconditions a few conjugate gradient steps for all columns.
    Where there are fewer rows than inputs, each task has its mean weight in all columns instead.
    """
    x = [part / part.shape[1] ** 0.5 for part in x]
    residuals = [part / part.shape[1] ** 0.5 for part in residuals]
    means = weights.mean((1, 2))
    if sum(part.shape[1] for part in x) < x[0].shape[2]:
        stacked, targets = (
            torch.cat([m.sqrt() * part for m, part in zip(means, parts, strict=True)], 1) for parts in (x, residuals)
        )
        return solve_ridge(stacked, targets, ridge)
    systems = [part.mT @ part for part in x]
    targets = sum(w.unsqueeze(1) * (a.mT @ r) for w, a, r in zip(weights, x, residuals, strict=True))
    mean = sum(m * system for m, system in zip(means, systems, strict=True))
    scale = _scale(mean.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1), mean.shape[1])
    factor, ridge = _factor(mean, scale, ridge)
    if torch.allclose(weights, means.view(-1, 1, 1).expand_as(weights)):
        return torch.cholesky_solve(targets, factor), ridge

    def apply(change: Tensor) -> Tensor:
        parts = (w.unsqueeze(1) * (system @ change) for w, system in zip(weights, systems, strict=True))
        return ridge * scale * change + sum(parts)

    return _conjugate_gradients(apply, targets, factor), ridge


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], target: Tensor, factor: Tensor) -> Tensor:
    """Solves apply(D) = target column by column, from 0; `factor`: Cholesky factor of the preconditioner."""
    solution, left = torch.zeros_like(target), target
    step = conditioned = torch.cholesky_solve(left, factor)
    size = (left * conditioned).sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        applied = apply(step)
        length = size / (step * applied).sum(1, keepdim=True).clamp_min(1e-30)
        solution, left = solution + length * step, left - length * applied
        conditioned, before = torch.cholesky_solve(left, factor), size
        size = (left * conditioned).sum(1, keepdim=True)
        step = conditioned + size / before.clamp_min(1e-30) * step
    return solution


def _scale(trace: Tensor, inputs: int) -> Tensor:
    return (trace / inputs).clamp_min(torch.finfo(trace.dtype).tiny ** 0.5)


def _factor(system: Tensor, scale: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Cholesky factor of system + ridge * scale, and the ridge, raised until there is one."""
    identity = torch.eye(system.shape[1], dtype=system.dtype, device=system.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(system + ridge * scale * identity)
        if not failed.any():
            return factor, ridge
        ridge = max(10 * ridge, 1e-6)
        assert ridge < 1e6, "rows that are not finite"
