"""Batch normalization by the mean absolute deviation (Hoffer, Banner, Golan & Soudry, 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnbench.norms.base import add_affine, check_eps, norm, per_channel, show_options, widen
from bnbench.registry import BadInput

# The standard deviation of a Gaussian over its mean absolute deviation.
GAUSSIAN = math.sqrt(math.pi / 2)


def l1_batch_norm(x: Tensor, *, eps: float = 1e-5, **others: object) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    centred = x - x.mean(dims, keepdim=True)
    return centred / (math.sqrt(math.pi / 2) * centred.abs().mean(dims, keepdim=True) + eps)


@norm(
    "l1_batch",
    paper="arXiv:1803.01814",
    reference=l1_batch_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    examples=({}, {"momentum": None}),
)
class L1BatchNorm(nn.Module):
    """Batch normalization whose scale is the mean absolute deviation in place of the standard deviation.

    y = γ (x − μ) / (σ₁ + eps) + β,   σ₁ = √(π/2) mean|x − μ|; x and y are (N, C, *), μ is the mean of a
    channel over N and *, and so is the mean in σ₁; γ and β are learned, a number a channel. For a Gaussian
    channel √(π/2) makes σ₁ the standard deviation. Evaluation puts running_mean and running_scale (C) in the
    place of μ and σ₁. A training step moves both to (1 − momentum) old + momentum batch.

    momentum: None averages all steps alike. affine=False leaves out γ and β.

    Pitfalls: eps stands beside σ₁, not inside a root: 1e-5 is a far smaller floor than the √1e-5 = 0.003 of
    "batch", so that the gradient of a channel that hardly varies is up to 300 times as large. |x − μ| has no
    derivative at 0; 0 is taken there. σ₁ is no moment: recalibration averages it over batches, each around
    its own mean, where variances would add up exactly.

    Raises BadInput for an eps or a momentum that cannot be; ValueError in training on one value a channel.

    Source: Hoffer et al. 2018, section 4, L1 batch norm. Wu et al. 2018 (arXiv:1802.09769) leave out
    √(π/2), which γ then has to learn.
    """

    running_mean: Tensor
    running_scale: Tensor
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
        if momentum is not None and not 0 <= momentum <= 1:
            raise BadInput(f"momentum must be a number from 0 to 1, or None, not {momentum!r}")
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.momentum = momentum
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_scale", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        if self.training:
            if x.numel() <= self.num_features:
                raise ValueError(
                    f"a training batch needs more than one value a channel, not {tuple(x.shape)}"
                )
            mean, centred, scale = _measure(wide)
            self._move_averages(mean, scale)
        else:
            centred = wide - per_channel(widen(self.running_mean), x)
            scale = widen(self.running_scale)
        if self.weight is None or self.bias is None:
            return (centred / per_channel(scale + self.eps, x)).to(x.dtype)
        slope = widen(self.weight) / (scale + self.eps)
        bias = per_channel(widen(self.bias), x)
        return torch.addcmul(bias, centred, per_channel(slope, x)).to(x.dtype)

    @torch.no_grad()
    def _move_averages(self, mean: Tensor, scale: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        count = self.num_batches_tracked.to(mean.dtype)
        rate = 1 / count if self.momentum is None else self.momentum
        for average, batch in ((self.running_mean, mean), (self.running_scale, scale)):
            average.add_((batch - average) * rate)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        mean, _, scale = _measure(x.detach().double())
        return mean, scale

    def set_moments(self, *means: Tensor) -> None:
        self.running_mean.copy_(means[0])
        self.running_scale.copy_(means[1])


def _measure(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel's mean, x without it, and σ₁."""
    dims = [0, *range(2, x.ndim)]
    mean = x.mean(dims)
    centred = x - per_channel(mean, x)
    return mean, centred, GAUSSIAN * centred.abs().mean(dims)
