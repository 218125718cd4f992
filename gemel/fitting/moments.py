"""What a fit needs of the rows of one task: sums of products, smaller than the rows and quicker to compute with."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gemel.fitting.rows import Rows


class Moments(NamedTuple):
    """Sums over the rows of one task. Where there are fewer rows than inputs, the rows themselves are kept instead."""

    num_rows: int
    xy: Tensor  # [groups, d, o]: x'y
    yy: Tensor  # [groups, o]: sums of squares of y
    xx: Tensor | None  # [groups, d, d]: x'x; None: the rows are kept
    rows: Rows | None  # None: x'x is kept
    means: Rows | None = None  # single rows; of what the rows were before they were centred, where that matters
    metric: Tensor | None = None  # [groups, o, o]: how much errors of y count (importance.OutputMetric), if known

    def gram(self) -> Tensor:
        """x'x [groups, d, d]."""
        if self.xx is not None:
            return self.xx
        assert self.rows is not None
        return self.rows.x.mT @ self.rows.x

    def product(self, matrix: Tensor) -> Tensor:
        """x'x @ matrix, for a matrix [groups, d, o]."""
        if self.xx is not None:
            return self.xx @ matrix
        assert self.rows is not None
        return self.rows.x.mT @ (self.rows.x @ matrix)

    def errors(self, matrix: Tensor) -> Tensor:
        """||y - x @ matrix||^2 of every output [groups, o]."""
        if self.rows is not None:
            return (self.rows.y - self.rows.x @ matrix).square().sum(1)
        return (self.yy + (matrix * (self.product(matrix) - 2 * self.xy)).sum(1)).clamp_min(0)

    def scaled(self, factors: Tensor) -> "Moments":
        """The moments with every output multiplied by a factor [groups, o]."""
        metric = None if self.metric is None else self.metric / (factors.unsqueeze(2) * factors.unsqueeze(1))
        factors = factors.unsqueeze(1)
        rows = self.rows and Rows(self.rows.x, self.rows.y * factors)
        means = self.means and Rows(self.means.x, self.means.y * factors)
        squares = self.yy * factors.squeeze(1).square()
        return self._replace(xy=self.xy * factors, yy=squares, rows=rows, means=means, metric=metric)

    @property
    def is_finite(self) -> bool:
        """Whether the rows are; a sum of squares of what is not finite is not finite."""
        squares = self.xx.diagonal(dim1=1, dim2=2) if self.rows is None else self.rows.x.square().sum(1)  # type: ignore[union-attr]
        return bool(torch.isfinite(squares).all() and torch.isfinite(self.yy).all())

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, for other processes."""
        found = {"num_rows": torch.tensor(self.num_rows), "xy": self.xy, "yy": self.yy}
        for name, rows in (("rows", self.rows), ("means", self.means)):
            if rows is not None:
                found |= {f"{name}.x": rows.x, f"{name}.y": rows.y}
        others = {"xx": self.xx, "metric": self.metric}
        return found | {name: tensor for name, tensor in others.items() if tensor is not None}

    @classmethod
    def of_tensors(cls, found: Mapping[str, Tensor]) -> "Moments":
        """The moments that `tensors` was asked of."""
        rows, means = (
            Rows(found[f"{name}.x"], found[f"{name}.y"]) if f"{name}.x" in found else None for name in ("rows", "means")
        )
        return cls(int(found["num_rows"]), found["xy"], found["yy"], found.get("xx"), rows, means, found.get("metric"))


def moments_of(rows: Rows, metric: Tensor | None = None) -> Moments:
    """The sums over the rows of one task, with the metric of its outputs."""
    x, y = rows
    has_few = x.shape[1] < x.shape[2]
    return Moments(
        num_rows=x.shape[1],
        xy=x.mT @ y,
        yy=y.square().sum(1),
        xx=None if has_few else x.mT @ x,
        rows=rows if has_few else None,
        metric=metric,
    )
