"""Batch normalisation over whole batches of which several ranks compute parts each.

torch.nn.SyncBatchNorm does the same on CUDA only, and would take the place of the layers that others look for.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gemel.environment import ranks


@contextlib.contextmanager
def whole_batch_norm(model: nn.Module, task: str) -> Iterator[None]:
    """Within, batch normalisation in train mode takes mean and variance over the parts of all ranks of the task.

    These ranks run forward and backward passes of the same layers in the same order. Layers with a forward pass of
    their own that only derive from torch's batch normalisation stay as they are.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and type(layer).forward is _BatchNorm.forward and layer.training
    ]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer, task)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: _BatchNorm, task: str, values: Tensor) -> Tensor:
    """As layer.forward in train mode; values [N, channels, ...], those of this rank's part."""
    layer._check_input_dim(values)
    count, mean, var = _moments_of_all(values.detach(), task)
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        with torch.no_grad():
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.add_(1)
            momentum = layer.momentum
            factor = 1.0 / float(layer.num_batches_tracked) if momentum is None else momentum
            layer.running_mean.lerp_(mean.to(layer.running_mean), factor)
            layer.running_var.lerp_((var * (count / (count - 1).clamp(min=1))).to(layer.running_var), factor)
    weight = mean.new_ones(mean.shape) if layer.weight is None else layer.weight
    bias = mean.new_zeros(mean.shape) if layer.bias is None else layer.bias
    found = _WholeBatchNorm.apply(values, weight, bias, mean, var, count, (layer.eps, task))
    assert isinstance(found, Tensor)
    return found


def _moments_of_all(values: Tensor, task: str) -> tuple[Tensor, Tensor, Tensor]:
    """How many values a channel has in the parts of all ranks, their mean and (biased) variance, in float32."""
    mean, var = torch.batch_norm_update_stats(values.float(), None, None, 0.0)  # as batch normalisation computes them
    num_values = values.numel() // values.shape[1]
    own = torch.cat([mean.new_tensor([num_values]), mean, var])
    parts = ranks.gathered_tensors(own, ranks.parts_of(task))
    counts, means, variances = parts[:, :1], *parts[:, 1:].chunk(2, 1)
    total = counts.sum()
    shares = counts / total
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return total, mean, var


class _WholeBatchNorm(torch.autograd.Function):
    """Normalisation by given moments, which themselves depend on the values of all ranks.

    Source of the gradient: Ioffe and Szegedy, "Batch Normalization", ICML 2015, section 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        settings: tuple[float, str],
    ) -> Tensor:
        ctx.save_for_backward(values, weight, mean, var, count)
        ctx.eps, ctx.task = settings
        return F.batch_norm(values, mean, var, weight, bias, training=False, eps=ctx.eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, var, count = ctx.saved_tensors
        moments = (mean, var, mean, var)
        in_values, in_weight, in_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, values, weight, *moments, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([in_bias, in_weight]).float()
        ranks.sum_in_place(sums, ranks.parts_of(ctx.task))
        # the part of the gradient that goes through mean and variance: of every channel a shift, and a slope
        shape = [1, -1] + [1] * (values.dim() - 2)
        inverse = (var + ctx.eps).rsqrt()
        scale = weight.float() * inverse / count
        slope = scale * sums[1] * inverse
        shift = scale * sums[0] - slope * mean
        through_moments = torch.addcmul(shift.view(shape), values.float(), slope.view(shape))
        return in_values.sub_(through_moments), in_weight, in_bias, None, None, None, None
