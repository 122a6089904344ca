"""Synchronized batch normalization: the statistics of a batch that is spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import norm, per_channel, widen


def sync_batch_norm(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes. Its derivative is the sum of the gradients of all processes."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_processes(gradients[0])


def sum_over_processes(values: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        # Of a gradient that is not derived again, the function's own bookkeeping costs as much as the sum.
        return SumOverProcesses.forward(values)
    total: Tensor = SumOverProcesses.apply(values)  # type: ignore[no-untyped-call]
    return total


def tell_all(values: Tensor) -> Tensor:
    """What every process says (n), as the rows of a table (processes × n)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return sum_over_processes(F.pad(values[None], (0, 0, rank, size - 1 - rank)))


@norm(
    "sync_batch",
    paper="arXiv:1711.07240",
    reference=sync_batch_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
)
class SyncBatchNorm(BatchStatistics):
    """Batch normalization over the batches of all processes of the default group, on any back end.

    y = γ (x − μ) / √(σ² + eps) + β; x (N, C, *). A process tells the number n of its values, their mean m and
    their variance v, in one message; μ = Σ n m / Σ n and σ² = Σ n (v + (m − μ)²) / Σ n, so that uneven shares
    weigh what they hold, an empty one nothing, and nothing cancels where the mean is large. Gradients are
    those of one process on the joined batch, for a loss that is the sum of the processes' losses. Without a
    process group, or in a group of one, it is batch normalization.

    Pitfalls: Every process has to run every layer, or all wait; each layer costs a message a pass. Averaging
    the processes' means and variances alike, as is done elsewhere, is wrong for uneven shares.

    Source: Peng et al. 2018 (MegDet), cross-GPU batch normalization.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.normalize_by_averages(x)
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.normalize_by_batch(x)
        dims = [0, *range(2, x.ndim)]
        wide = widen(x)
        count = x.numel() // self.num_features
        # An empty share has no mean; its zeros weigh nothing, and keep it in the exchange of gradients too.
        var, mean = torch.var_mean(wide, dims, correction=0) if count else (wide.sum(dims), wide.sum(dims))
        told = tell_all(torch.cat([mean, var, wide.new_full((1,), count)]))
        means, variances, counts = torch.split(told, [self.num_features, self.num_features, 1], 1)
        total = counts.sum()
        weights = counts / total
        # No matrix product, which autocast would do in bfloat16.
        mean = (weights * means).sum(0)
        var = (weights * (variances + (means - mean).square())).sum(0)
        scale = (var + self.eps).rsqrt()
        y = wide - per_channel(mean, x)
        if self.weight is not None and self.bias is not None:
            y = torch.addcmul(per_channel(self.bias, x), y, per_channel(self.weight * scale, x))
        else:
            y = y * per_channel(scale, x)
        self.update_averages(mean, var * (total / (total - 1).clamp_min(1)))
        return y.to(x.dtype)
