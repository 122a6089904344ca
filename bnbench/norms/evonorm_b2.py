"""EvoNorm-B2, a normalization with its activation in it (Liu et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import apply_affine, norm, per_sample, require_axes, widen


def evonorm_b2(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    positions, batch = list(range(2, x.ndim)), [0, *range(2, x.ndim)]
    rms = (x.square().mean(positions, keepdim=True) + eps).sqrt()
    batch_var = (x - x.mean(batch, keepdim=True)).square().mean(batch, keepdim=True)
    return x / torch.maximum((batch_var + eps).sqrt(), rms - x)


@norm(
    "evonorm_b2",
    paper="arXiv:2004.02967",
    reference=evonorm_b2,
    batch_dependent=True,
    running_stats=True,
    replaces_activation=True,
    min_dim=1,
)
class EvoNormB2(BatchStatistics):
    """Divide by the larger of the batch's deviation and the sample's root mean square less x.

    y = γ x / max(√(σ² + eps), √(mean x² + eps) − x) + β for x (N, C, *), with the biased variance σ² of a
    channel over N and *, and the mean of x² in a channel of one sample over * alone. Evaluation has
    running_var, the average of unbiased variances, in place of σ², and the same mean of x². running_mean is
    kept beside it, as torch.nn.BatchNorm does, though the formula has no mean.

    Pitfalls: it is nonlinear by itself, so no activation belongs after it. Large positive values are divided
    by the batch's deviation alone, and large negative ones come out near −1. The mean is never subtracted.

    Raises BadInput without spatial axes, and ValueError in training on one value a channel.
    Source: Liu et al. 2020, EvoNorm-B2, by timm's code; eps is added in both roots, as there.
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

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        # Where the mean is large, rms is close to x, and their difference would show every rounding of the
        # mean. So all is measured from a value of the channel, in evaluation from one of the sample itself.
        corner = (slice(0, 1 if self.training else None), slice(None), *(slice(0, 1),) * (x.ndim - 2))
        near = wide.detach()[corner]
        shifted = wide - near
        var, rest = torch.var_mean(shifted, [*range(2, x.ndim)], correction=0, keepdim=True)
        batch_std = (self.variance_over_batch(x, rest, var, near) + self.eps).sqrt()
        mean = near + rest
        rms = (var + mean.square() + self.eps).sqrt()
        rms_above_mean = torch.where(mean > 0, (var + self.eps) / (rms + mean.abs()), rms - mean)
        y = wide / (rms_above_mean + rest - shifted).clamp_min(batch_std)
        return apply_affine(y, self.weight, self.bias, per_sample).to(x.dtype)
