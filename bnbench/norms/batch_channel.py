"""Batch-channel normalization (Qiao et al., 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import choose_num_groups, match, norm, per_channel, widen
from bnbench.registry import BadInput

# The share of the training over which the rate of the estimates rises from 0.
RISE = 0.05


def batch_channel_norm(
    x: Tensor, *, num_groups: int | None = None, eps: float = 1e-5, **others: object
) -> Tensor:
    batch = [0, *range(2, x.ndim)]
    z = x - x.mean(batch, keepdim=True)
    z = z / (z.square().mean(batch, keepdim=True) + eps).sqrt()
    grouped = z.reshape(len(x), choose_num_groups(x.shape[1], num_groups), -1)
    grouped = grouped - grouped.mean(2, keepdim=True)
    return (grouped / (grouped.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)


class EstimateRate(nn.Module):
    """The rate by which estimates of the statistics move in a training step.

    A buffer (value), at `rate` where nobody says how far the training is; else it starts at 0 and rises
    linearly to `rate` over the first 5 % of the training.
    """

    value: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("value", torch.tensor(float(rate)))

    def set_progress(self, fraction: float) -> None:
        self.value.fill_(self.rate * min(1.0, fraction / RISE))

    def extra_repr(self) -> str:
        return f"{self.rate!r}"


@norm(
    "batch_channel",
    paper="arXiv:1903.10520",
    reference=batch_channel_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    examples=({}, {"num_groups": 4, "momentum": None}),
)
class BatchChannelNorm(BatchStatistics):
    """Batch normalization, and then group normalization of its output, each with an affine map of its own.

    z = γ (x − μ) / √(σ² + eps) + β and y = a (z − m) / √(s² + eps) + b for x (N, C, *), with μ and the biased
    σ² of a channel over N and *, m and the biased s² of a sample over C / num_groups successive channels and
    *, with γ and β a channel, and a and b (group_weight, group_bias) a group. Evaluation has the running
    averages for μ and σ². num_groups=None means gcd(32, C/4), as in "group".

    estimate=True is the form for micro-batches: training too normalizes by running_mean and running_var, as
    constants, after it has moved them by the share r towards the mean of the batch and its mean squared
    distance from the new running_mean. r is the buffer rate.value: `momentum` for a layer that nobody tells
    of the progress; bnbench's trainers let it rise from 0 to that over the first 5 % of the training. This
    form takes a batch of one sample. The traits listed for the norm are those of estimate=False: constants
    neither follow the scale and shift of the input, nor is their part in the gradient there.

    Pitfalls: the authors train it with standardized weights (reparam weight_standardization). The estimates
    lag behind weights that move fast. The affine map of a group is a number a group, not a channel.

    Raises BadInput where num_groups does not divide num_features, and for estimate=True with momentum=None;
    ValueError in training on one value a channel, but for estimate=True.
    Source: Qiao et al. 2019, the section on batch-channel normalization, and the authors' code. There r is a
    buffer that starts at 0 and that the training script sets; its rise is our choice.
    """

    group_weight: Tensor | None
    group_bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        num_groups: int | None = None,
        estimate: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.num_groups = choose_num_groups(num_features, num_groups)
        self.estimate = estimate
        if estimate:
            if momentum is None:
                raise BadInput("estimate=True needs a momentum from 0 to 1, and it is None")
            # A module of its own, so that the layer has a ramp only where it estimates.
            self.rate = EstimateRate(momentum)
        for name, start in (("group_weight", torch.ones), ("group_bias", torch.zeros)):
            self.register_parameter(name, nn.Parameter(start(self.num_groups)) if affine else None)

    @staticmethod
    def normalization_batch_size(batch_size: int, *, estimate: bool = False, **others: object) -> int:
        if batch_size < 2 and not estimate:
            raise BadInput(
                "norm 'batch_channel' cannot train on a batch of 1 sample; it needs 2, or estimate=True"
            )
        return batch_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            z = self.normalize_by_averages(x)
        elif self.estimate:
            z = self._normalize_by_estimates(x)
        else:
            z = self.normalize_by_batch(x)
        weight, bias = self._spread(self.group_weight), self._spread(self.group_bias)
        return F.group_norm(match(z, weight), self.num_groups, weight, bias, self.eps).to(x.dtype)

    def _normalize_by_estimates(self, x: Tensor) -> Tensor:
        self._update_estimates(widen(x))
        # Copies, since a layer may be called again before the backward pass, which reads them.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    @torch.no_grad()
    def _update_estimates(self, x: Tensor) -> None:
        dims = [0, *range(2, x.ndim)]
        self.num_batches_tracked.add_(1)
        self.running_mean.add_(self.rate.value * (x.mean(dims) - self.running_mean))
        distance = (x - per_channel(self.running_mean, x)).square().mean(dims)
        self.running_var.add_(self.rate.value * (distance - self.running_var))

    def _spread(self, values: Tensor | None) -> Tensor | None:
        """A number a group as a number a channel."""
        if values is None:
            return None
        return widen(values).unsqueeze(1).expand(-1, self.num_features // self.num_groups).flatten()
