"""Batch normalization that weighs the example itself in evaluation (Summers & Dinneen, 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import norm, per_channel, widen
from bnbench.registry import BadInput


def batch_norm(x: Tensor, *, eps: float = 1e-5, **others: object) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    return (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + eps).sqrt()


@norm(
    "example_weighted_batch",
    paper="arXiv:1906.03548",
    reference=batch_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    examples=({}, {"alpha": 0.5, "momentum": None}),
)
class ExampleWeightedBatchNorm(BatchStatistics):
    """Batch normalization whose evaluation gives the example itself a share of the statistics.

    Training: y = γ (x − μ) / √(σ² + eps) + β; x and y are (N, C, *), μ and the biased σ² are those of a
    channel over N and *, and γ and β are learned, a number a channel.

    Evaluation of an example, with α = alpha, with m and q the running averages of μ and of the mean of x²,
    and with m_x and q_x the means of x and x² over the positions of the channel in this example alone (x and
    x² where there are none):

        y = γ (x − a) / √(b − a² + eps) + β,   a = (1 − α) m + α m_x,   b = (1 − α) q + α q_x.

    The mean of squares is kept as running_var = q − m² (C), beside running_mean = m: a training step moves
    them to (1 − momentum) m + momentum μ and to the variance of that mixture,
    (1 − momentum) running_var + momentum σ² + momentum (1 − momentum) (μ − m)². That is q to the letter, and
    nothing cancels where the mean is large; it is neither the average of variances nor unbiased, as that of
    "batch" is.

    alpha: the share of the example, 0 to below 1; 0 is evaluation by running averages alone. Nothing in
    training depends on it: it may be set on a trained layer. momentum: None averages all steps alike.
    affine=False leaves out γ and β.

    Pitfalls: alpha is to be chosen on validation data, once the network is trained; the default is only a
    start. It helps because training has an example in its own statistics, with a share of 1 / N, and
    evaluation has not. Without positions (dim=0) the example's own variance is 0, and large values are drawn
    in. A layer with alpha above 0 is no affine map in evaluation, and cannot be folded into the layer before
    it. EvalNorm (Singh & Shrivastava 2019) is something else: it learns the statistics of evaluation.

    Raises BadInput for an alpha outside [0, 1), and what "batch" raises.

    Source: Summers & Dinneen 2020, section 3.1, inference example weighing; as in the authors' public code,
    second moments are mixed, and the variance is theirs.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        alpha: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        if not 0 <= alpha < 1:
            raise BadInput(f"alpha must be at least 0 and below 1, not {alpha!r}")
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.normalize_by_averages(x) if self.alpha == 0 else self._normalize_by_mixture(x)
        y, mean, var = self.normalize_chunks(x)
        count = x.numel() // self.num_features
        self.update_averages(mean, var * ((count - 1) / count))
        return y

    def _normalize_by_mixture(self, x: Tensor) -> Tensor:
        """From b − a² = (1 − α) running_var + α var_x + α (1 − α) (m_x − m)²."""
        wide = widen(x)
        if x.ndim == 2:
            own_mean, centred, own_var = wide, torch.zeros_like(wide), torch.zeros_like(wide)
        else:
            positions = [*range(2, x.ndim)]
            own_mean = wide.mean(positions, keepdim=True)
            centred = wide - own_mean
            own_var = centred.square().mean(positions, keepdim=True)
        mean, var = per_channel(widen(self.running_mean), x), per_channel(widen(self.running_var), x)
        between = (1 - self.alpha) * (own_mean - mean)  # m_x − a
        mixed = (1 - self.alpha) * var + self.alpha * (own_var + between * (own_mean - mean))
        scale = (mixed + self.eps).rsqrt()
        shift = between * scale
        if self.weight is not None and self.bias is not None:
            weight, bias = per_channel(widen(self.weight), x), per_channel(widen(self.bias), x)
            scale, shift = scale * weight, torch.addcmul(bias, shift, weight)
        return torch.addcmul(shift, centred, scale).to(x.dtype)

    @torch.no_grad()
    def update_averages(self, mean: Tensor, var: Tensor) -> None:
        """Take one step's mean and biased variance into the running mixture."""
        self.num_batches_tracked.add_(1)
        count = self.num_batches_tracked.to(mean.dtype)
        rate = 1 / count if self.momentum is None else self.momentum
        change = mean - self.running_mean
        self.running_var.add_((var - self.running_var + (1 - rate) * change.square()) * rate)
        self.running_mean.add_(change * rate)
