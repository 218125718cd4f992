import pytest
import torch

from gemel.fitting.moments import Moments, moments_of
from gemel.fitting.rows import Rows


@pytest.mark.parametrize("num_rows", [40, 5])
def test_sums_give_what_the_rows_give(num_rows):
    torch.manual_seed(0)
    x, y, matrix = torch.randn(2, num_rows, 8), torch.randn(2, num_rows, 3), torch.randn(2, 8, 3)
    sums = moments_of(Rows(x, y))
    assert (sums.rows is None) == (num_rows == 40), "rows are kept where they are fewer than inputs"
    assert torch.allclose(sums.gram(), x.mT @ x, atol=1e-4)
    assert torch.allclose(sums.product(matrix), x.mT @ x @ matrix, atol=1e-3)
    assert torch.allclose(sums.errors(matrix), (y - x @ matrix).square().sum(1), rtol=1e-4)
    factors = torch.rand(2, 3) + 0.5
    expected = (y * factors.unsqueeze(1) - x @ matrix).square().sum(1)
    assert torch.allclose(sums.scaled(factors).errors(matrix), expected, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [40, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_noticed(num_rows, value):
    for part in range(2):
        rows = torch.rand(1, num_rows, 8), torch.rand(1, num_rows, 3)
        assert moments_of(Rows(*rows)).is_finite
        rows[part][0, 1, 2] = value
        assert not moments_of(Rows(*rows)).is_finite


def test_a_metric_measures_the_same_errors_after_scaling_and_in_another_process():
    torch.manual_seed(0)
    rows = Rows(torch.randn(1, 9, 8), torch.randn(1, 9, 3))
    factors, error = torch.rand(1, 3) + 0.5, torch.randn(1, 1, 3)
    metric = torch.randn(1, 3, 3)
    metric = metric @ metric.mT
    scaled = Moments.of_tensors(moments_of(rows, metric).scaled(factors).tensors())
    of_scaled = error * factors.unsqueeze(1)
    assert torch.allclose(of_scaled @ scaled.metric @ of_scaled.mT, error @ metric @ error.mT, rtol=1e-4)
    assert Moments.of_tensors(moments_of(rows).tensors()).metric is None
