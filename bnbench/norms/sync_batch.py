"""Synchronized batch normalization: the statistics of a batch that is spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnbench.norms.base import BatchStatistics, norm, per_channel, widen


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
    total: Tensor = SumOverProcesses.apply(values)  # type: ignore[no-untyped-call]
    return total


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

    y = γ (x − μ) / √(σ² + eps) + β, with μ = Σx / n and σ² = Σ(x − μ)² / n, the sums and the number of
    values n taken over all processes, so that uneven shares weigh what they hold, and an empty one nothing.
    Two passes, since Σx² − (Σx)² / n cancels where the mean is large. Gradients are those of one process
    on the joined batch, for a loss that is the sum of the processes' losses. Without a process group, or
    in a group of one, it is batch normalization.
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
        count = wide.new_full((1,), x.numel() // self.num_features)
        sums = sum_over_processes(torch.cat([wide.sum(dims), count]))
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        centred = wide - per_channel(mean, x)
        var = sum_over_processes(centred.square().sum(dims)) / total
        y = centred * per_channel((var + self.eps).rsqrt(), x)
        if self.weight is not None and self.bias is not None:
            y = y * per_channel(self.weight, x) + per_channel(self.bias, x)
        self.update_averages(mean, var * (total / (total - 1).clamp_min(1)))
        return y.to(x.dtype)
