"""Range batch normalization: batch normalization by the range of the values (Banner et al., 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnbench.norms.base import add_affine, check_eps, norm, per_channel, show_options, widen
from bnbench.registry import BadInput


def range_batch_norm(x: Tensor, *, eps: float = 1e-5, **others: object) -> Tensor:
    columns = x.movedim(1, 0).flatten(1)
    values = columns.shape[1]
    spread = (columns.max(1).values - columns.min(1).values) / math.sqrt(2 * math.log(values))
    y = (columns - columns.mean(1, keepdim=True)) / (spread + eps)[:, None]
    return y.view(-1, len(x), *x.shape[2:]).movedim(0, 1)


@norm(
    "range_batch",
    paper="arXiv:1805.11046",
    reference=range_batch_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    examples=({}, {"momentum": None}),
)
class RangeBatchNorm(nn.Module):
    """Batch normalization whose scale is the range of a channel's values, the largest less the smallest.

    y = γ (x − μ) / (C(n) range(x − μ) + eps) + β,   C(n) = 1 / √(2 ln n),   range(z) = max z − min z; x and y
    are (N, C, *), μ, max and min are those of a channel over N and *, n is the number of its values there,
    and γ and β are learned, a number a channel. Evaluation puts running_mean and running_scale (C) in the
    place of μ and C(n) range(x − μ). A training step moves both to (1 − momentum) old + momentum batch.

    momentum: None averages all steps alike. affine=False leaves out γ and β.

    Pitfalls: the range of n Gaussian values tends to 2 σ √(2 ln n), so that the scale is nearly 2 σ (1.7 σ at
    n = 1000) and the output has a deviation of little over a half; γ makes up for it. Two values decide the
    scale of a channel: an outlier shrinks all others, and the gradient through the scale reaches only these
    two (equal ones share it). C(n) takes the values for independent, which those of one image are not. The
    scale is no moment: recalibration averages it over batches.

    Raises BadInput for an eps or a momentum that cannot be; ValueError in training on one value a channel.

    Source: Banner et al. 2018, section 3. The authors' public code divides by the mean range of several
    chunks of the batch (here there are none), makes up for the factor 2 by a constant 0.54, and quantizes,
    which is no part of the norm. Hoffer et al. 2018 (arXiv:1803.01814) take max|x − μ|, the L∞ norm. Where
    eps stands is our choice: beside the range, as in "l1_batch".
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
    """Each channel's mean, x without it, and C(n) times its range."""
    dims = [0, *range(2, x.ndim)]
    mean = x.mean(dims)
    centred = x - per_channel(mean, x)
    values = x.numel() // x.shape[1]
    return mean, centred, (centred.amax(dims) - centred.amin(dims)) / math.sqrt(2 * math.log(values))
