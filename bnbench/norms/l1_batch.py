"""Batch normalization by the mean absolute deviation (Hoffer, Banner, Golan & Soudry, 2018)."""

from __future__ import annotations

import math

from torch import Tensor

from bnbench.norms.averages import ScaleAverages
from bnbench.norms.base import norm

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
class L1BatchNorm(ScaleAverages):
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

    def measure_scale(self, centred: Tensor) -> Tensor:
        return GAUSSIAN * centred.abs().mean([0, *range(2, centred.ndim)])
