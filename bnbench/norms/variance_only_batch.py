"""Variance-only batch normalization: batch normalization that leaves the mean where it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbench.norms.averages import check_momentum, count_values, move_averages
from bnbench.norms.base import (
    add_affine,
    channel_moments,
    check_eps,
    norm,
    per_channel,
    show_options,
    widen,
)


def variance_only_batch_norm(x: Tensor, *, eps: float = 1e-5, **others: object) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    return x / (x.var(dims, correction=0, keepdim=True) + eps).sqrt()


@norm(
    "variance_only_batch",
    paper="arXiv:1502.03167",
    reference=variance_only_batch_norm,
    batch_dependent=True,
    running_stats=True,
    examples=({}, {"momentum": None}),
)
class VarianceOnlyBatchNorm(nn.Module):
    """Divide each channel by its standard deviation over the batch and all positions; keep its mean.

    y = γ x / √(σ² + eps) + β; x and y are (N, C, *), σ² is the biased variance of a channel over N and *
    (around its mean, which is not subtracted from x), and γ and β are learned, a number a channel.
    Evaluation puts running_var in the place of σ². A training step moves running_var (C) to
    (1 − momentum) running_var + momentum σ² n / (n − 1), with n values a channel: it holds the unbiased
    variance, as that of the norm "batch" does.

    momentum: None averages all steps alike. affine=False leaves out γ and β.

    Pitfalls: means grow with depth, above all behind ReLU, whose output is positive; a channel whose mean is
    large beside its deviation stays so, and its unit is then always on or always off. A bias before the layer
    is not dead here, only rescaled. With the mean of squares in place of σ² it would be another norm.

    Raises BadInput for an eps or a momentum that cannot be; ValueError in training on one value a channel.

    Source: Ioffe & Szegedy 2015, algorithm 1 without its mean. As a layer of its own it has no paper that
    defines it; it is the control that tells what of batch normalization is due to the scale alone.
    """

    running_var: Tensor
    num_batches_tracked: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.momentum = check_momentum(momentum)
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            centre = torch.zeros_like(self.running_var)
            return F.batch_norm(x, centre, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        count = count_values(x)
        wide, dims = widen(x), [0, *range(2, x.ndim)]
        mean = wide.mean(dims)
        centred = wide - per_channel(mean, x)
        var = centred.square().mean(dims)
        unbiased = var * (count / (count - 1))
        move_averages(self.momentum, self.num_batches_tracked, (self.running_var, unbiased))
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * widen(self.weight)
        # Not x times the scale, for which autograd would keep x beside the centred values.
        shift = mean * scale if self.bias is None else mean * scale + widen(self.bias)
        return torch.addcmul(per_channel(shift, x), centred, per_channel(scale, x)).to(x.dtype)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        return channel_moments(x)

    def set_moments(self, *means: Tensor) -> None:
        mean, mean_square = means
        self.running_var.copy_((mean_square - mean.square()).clamp_min(0.0))
