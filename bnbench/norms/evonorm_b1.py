"""EvoNorm-B1, a normalization with its activation in it (Liu et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import apply_affine, norm, per_sample, require_axes, widen


def evonorm_b1(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    positions, batch = list(range(2, x.ndim)), [0, *range(2, x.ndim)]
    rms = (x.square().mean(positions, keepdim=True) + eps).sqrt()
    batch_var = (x - x.mean(batch, keepdim=True)).square().mean(batch, keepdim=True)
    return x / torch.maximum((batch_var + eps).sqrt(), (x + 1) * rms)


@norm(
    "evonorm_b1",
    paper="arXiv:2004.02967",
    reference=evonorm_b1,
    batch_dependent=True,
    running_stats=True,
    replaces_activation=True,
    scale_invariant=False,
    min_dim=1,
)
class EvoNormB1(BatchStatistics):
    """Divide by the larger of the batch's deviation and (x + 1) times the sample's root mean square.

    y = γ x / max(√(σ² + eps), (x + 1) √(mean x² + eps)) + β for x (N, C, *), with the biased variance σ² of
    a channel over N and *, and the mean of x² in a channel of one sample over * alone. Evaluation has
    running_var, the average of unbiased variances, in place of σ², and the same mean of x². running_mean is
    kept beside it, as torch.nn.BatchNorm does, though the formula has no mean. EvoNorm-B0 has v x and a
    deviation where this has products with x and a root mean square, and so no v to learn.

    Pitfalls: it is nonlinear by itself, so no activation belongs after it. The 1 beside x makes the output
    depend on the scale of the input, so that the weights before it are not free of theirs.

    Raises BadInput without spatial axes, and ValueError in training on one value a channel.
    Source: Liu et al. 2020, EvoNorm-B1, by timm's code; eps is added in both roots, as there.
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
        var, mean = torch.var_mean(wide, [*range(2, x.ndim)], correction=0, keepdim=True)
        batch_std = (self.variance_over_batch(x, mean, var) + self.eps).sqrt()
        rms = (var + mean.square() + self.eps).sqrt()
        y = wide / torch.addcmul(rms, wide, rms).clamp_min(batch_std)
        return apply_affine(y, self.weight, self.bias, per_sample).to(x.dtype)
