"""Least squares in which errors count by a metric of the outputs of each task."""

import pytest
import torch

from gemel.fitting import least_squares, ridge
from gemel.fitting.least_squares import METRIC_SHARE
from gemel.fitting.moments import moments_of
from gemel.fitting.ridge import solve_in_metrics, solve_weighted, solve_with_scales
from gemel.fitting.rows import Rows
from gemel.sharing.adapters import adapter_of, set_rank

RIDGE = 0.1


def drawn_metrics(num_tasks: int, width: int, groups: int = 1):
    roots = torch.randn(num_tasks, groups, width, width)
    return roots @ roots.mT


def drawn_rows(num_tasks: int, count: int, inputs: int, outputs: int, groups: int = 1):
    return [Rows(torch.randn(groups, count, inputs), torch.randn(groups, count, outputs)) for _ in range(num_tasks)]


def error(rows, matrices, metrics):
    """The sum over tasks of the mean squared error in the task's metric, of each group."""
    found = torch.zeros(len(metrics[0]))
    for (x, y), matrix, metric in zip(rows, matrices, metrics, strict=True):
        e = y - x @ matrix
        found += torch.einsum("gno,gop,gnp->g", e, metric, e) / x.shape[1]
    return found


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_the_minimum_in_the_metrics(monkeypatch, groups):
    monkeypatch.setattr(ridge, "ITERATIONS", 40)
    torch.manual_seed(0)
    rows, metrics = drawn_rows(3, 50, 6, 4, groups), drawn_metrics(3, 4, groups)
    start = torch.randn(groups, 6, 4)
    change, used = solve_in_metrics([moments_of(r) for r in rows], start, metrics, RIDGE)
    assert used == RIDGE
    diagonals = metrics.diagonal(dim1=2, dim2=3)
    means = (diagonals / diagonals.sum(0)).mean(2)
    for g in range(groups):
        scale = sum(means[t, g] * rows[t].x[g].square().sum() / 50 for t in range(3)) / 6
        total = metrics[:, g].sum(0)
        system = torch.kron(RIDGE * scale * torch.eye(6), total)  # of the change, row by row
        target = torch.zeros(6, 4)
        for (x, y), metric in zip(rows, metrics, strict=True):
            system = system + torch.kron(x[g].T @ x[g] / 50, metric[g])
            target = target + x[g].T @ (y[g] - x[g] @ start[g]) / 50 @ metric[g]
        expected = torch.linalg.solve(system, target.reshape(-1)).view(6, 4)
        assert torch.allclose(change[g], expected, atol=1e-3)


def test_few_steps_come_near_to_the_minimum():
    torch.manual_seed(0)
    rows, metrics, start = drawn_rows(2, 80, 10, 6), drawn_metrics(2, 6), torch.zeros(1, 10, 6)
    sums = [moments_of(r) for r in rows]
    found = error(rows, [solve_in_metrics(sums, start, metrics, 1e-3)[0]] * 2, metrics)
    even = error(rows, [solve_weighted(sums, start, torch.full((2, 1, 6), 0.5), 1e-3)[0]] * 2, metrics)
    assert found < even
    weights = torch.ones(2, 1, 6)
    diagonal = solve_in_metrics(sums, start, torch.diag_embed(weights), RIDGE)[0]
    assert torch.allclose(diagonal, solve_weighted(sums, start, weights / 2, RIDGE)[0], atol=1e-5), "the same problem"


def test_a_task_has_its_way_where_the_other_does_not_mind():
    torch.manual_seed(0)
    x = torch.randn(1, 100, 5)
    wanted = [torch.randn(1, 5, 2) for _ in range(2)]
    rows = [Rows(x, x @ matrix) for matrix in wanted]
    minds = torch.diag_embed(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    found, _ = solve_in_metrics([moments_of(r) for r in rows], torch.zeros(1, 5, 2), minds, 1e-6)
    assert torch.allclose(found[0, :, 0], wanted[0][0, :, 0], atol=1e-2)
    assert torch.allclose(found[0, :, 1], wanted[1][0, :, 1], atol=1e-2)


def test_with_fewer_rows_than_inputs_tasks_count_by_their_mean():
    torch.manual_seed(0)
    rows, metrics, start = drawn_rows(2, 4, 20, 3), drawn_metrics(2, 3), torch.randn(1, 20, 3)
    sums = [moments_of(r) for r in rows]
    found, _ = solve_in_metrics(sums, start, metrics, RIDGE)
    diagonals = metrics.diagonal(dim1=2, dim2=3)
    means = (diagonals / diagonals.sum(0)).mean(2, keepdim=True).expand(-1, -1, 3)
    assert torch.equal(found, solve_weighted(sums, start, means, RIDGE)[0])


def test_scales_are_found_in_the_metrics_too():
    torch.manual_seed(0)
    x, matrix, scales = torch.randn(1, 200, 6), torch.randn(1, 6, 3), torch.tensor([[1.0, 2.0, 0.5], [1.0, 0.5, 2.0]])
    rows = [Rows(x, x @ matrix * scale) for scale in scales]
    metrics = drawn_metrics(2, 3)
    sums, start = [moments_of(r) for r in rows], torch.zeros(1, 6, 3)
    shared, found, _ = solve_with_scales(sums, start, metrics, 1e-4)
    without = error(rows, [solve_in_metrics(sums, start, metrics, 1e-4)[0]] * 2, metrics)
    assert error(rows, [shared * scale.unsqueeze(1) for scale in found], metrics) < 0.2 * without


# ---- in a fit ---------------------------------------------------------------------------------------------


def test_a_metric_counts_as_much_as_weights_and_most_of_it():
    torch.manual_seed(0)
    rows, metrics, weights = drawn_rows(2, 50, 6, 3), drawn_metrics(2, 3), torch.rand(2, 1, 3) + 0.5
    sums = [moments_of(r, m) for r, m in zip(rows, metrics, strict=True)]
    found = least_squares._metrics(sums, weights)
    for s, metric, weight, own in zip(sums, metrics, weights, found, strict=True):
        variance = s.yy / s.num_rows
        assert (own.diagonal(dim1=1, dim2=2) * variance).sum() == pytest.approx(
            float((weight * variance).sum()), rel=1e-4
        )
        off = own - torch.diag_embed(own.diagonal(dim1=1, dim2=2))
        factor = METRIC_SHARE * (weight * variance).sum() / (metric.diagonal(dim1=1, dim2=2) * variance).sum()
        expected = metric - torch.diag_embed(metric.diagonal(dim1=1, dim2=2))
        assert torch.allclose(off, factor * expected, rtol=1e-4, atol=1e-5)
    assert least_squares._metrics([sums[0], moments_of(rows[1])], weights) is None, "a task without a metric"


@pytest.mark.parametrize("rank", [1, 2])
def test_an_adapter_takes_what_matters_most(rank):
    """Nothing of the same rank is nearer in the metric, and the part that training takes steps in stays orthonormal."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5, bias=False)
    set_rank(layer, rank)
    x, wanted = torch.randn(1, 300, 6), torch.randn(1, 6, 5)
    rows, metric = Rows(x, x @ wanted), drawn_metrics(1, 5)[0]
    shared = torch.zeros(1, 6, 5)
    fitted = least_squares._fit_adapter(adapter_of(layer), moments_of(rows), shared, metric, 1e-6)
    plain = least_squares._fit_adapter(adapter_of(layer), moments_of(rows), shared, None, 1e-6)
    root = torch.linalg.cholesky(metric)
    u, s, v = torch.linalg.svd((x @ wanted @ root)[0], full_matrices=False)
    best = s[rank:].square().sum() / 300
    assert error([rows], [fitted], [metric]).item() == pytest.approx(float(best), rel=0.01)
    assert error([rows], [plain], [metric]).item() > 1.02 * float(best)
    least_squares._fit_adapter(adapter_of(layer), moments_of(rows), shared, metric, 1e-6)
    up = adapter_of(layer).up.weight.detach()
    assert torch.allclose(up.T @ up, torch.eye(rank), atol=1e-5)
    assert torch.allclose((adapter_of(layer).up.weight @ adapter_of(layer).down.weight).T, fitted[0], atol=1e-4)
