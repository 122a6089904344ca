"""EvoNorm-B0, a normalization with its activation in it (Liu et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import apply_affine, norm, per_sample, require_axes, widen


def evonorm_b0(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    positions, batch = list(range(2, x.ndim)), [0, *range(2, x.ndim)]
    own_var = (x - x.mean(positions, keepdim=True)).square().mean(positions, keepdim=True)
    batch_var = (x - x.mean(batch, keepdim=True)).square().mean(batch, keepdim=True)
    return x / torch.maximum((batch_var + eps).sqrt(), x + (own_var + eps).sqrt())


@norm(
    "evonorm_b0",
    paper="arXiv:2004.02967",
    reference=evonorm_b0,
    batch_dependent=True,
    running_stats=True,
    replaces_activation=True,
    min_dim=1,
)
class EvoNormB0(BatchStatistics):
    """Divide by the larger of the batch's deviation and v x plus the deviation of the sample.

    y = γ x / max(√(σ² + eps), v x + √(σ_x² + eps)) + β for x (N, C, *), with the biased variance σ² of a
    channel over N and *, σ_x² that of a channel of one sample over * alone, and γ, β and v a channel; v
    starts at 1. Evaluation has running_var, the average of unbiased variances, in place of σ², and the same
    σ_x². running_mean is kept beside it, as torch.nn.BatchNorm does, though the formula has no mean.
    A batch of one sample has σ² = σ_x².

    Pitfalls: it is nonlinear by itself, so no activation belongs after it. The mean is never subtracted, and
    a channel with a large mean comes out near 1 / v. In maps of one position σ_x² is 0, and every value above
    σ / v comes out as about 1 / v.

    Raises BadInput without spatial axes, and ValueError in training on one value a channel.
    Source: Liu et al. 2020, EvoNorm-B0. Its eps is 1e-5, that of timm's layer 1e-3.
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
        require_axes(dim)
        self.v = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        var, mean = torch.var_mean(wide, [*range(2, x.ndim)], correction=0, keepdim=True)
        batch_std = (self.variance_over_batch(x, mean, var) + self.eps).sqrt()
        line = torch.addcmul((var + self.eps).sqrt(), wide, per_sample(widen(self.v), x))
        y = wide / line.clamp_min(batch_std)
        return apply_affine(y, self.weight, self.bias, per_sample).to(x.dtype)
