"""Batch renormalization (Ioffe, 2017)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnbench.norms.averages import check_momentum, count_values, hold, move_averages
from bnbench.norms.base import add_affine, channel_moments, check_eps, norm, per_channel, widen
from bnbench.registry import BadInput

# The shares of the training at which the limits begin to open, and are open.
RAMP = (0.05, 0.40)


def batch_renorm(
    x: Tensor, *, r_max: float = 3.0, d_max: float = 5.0, eps: float = 1e-5, **others: object
) -> Tensor:
    """The running averages of a fresh layer are 0 and 1."""
    dims = [0, *range(2, x.ndim)]
    mean = x.mean(dims, keepdim=True)
    std = ((x - mean).square().mean(dims, keepdim=True) + eps).sqrt()
    return (x - mean) / std * std.clamp(1 / r_max, r_max) + mean.clamp(-d_max, d_max)


@norm(
    "batch_renorm",
    paper="arXiv:1702.03275",
    reference=batch_renorm,
    batch_dependent=True,
    running_stats=True,
    scale_invariant=False,  # The running averages, which correct the output, do not scale with the input.
    exact_gradient=False,  # r and d are constants of the backward pass.
    # Unclipped, the output of a fresh layer is the input; these clip in every channel.
    examples=({"r_max": 1.125, "d_max": 0.125}, {"r_max": 1.0625, "d_max": 0.0625, "momentum": None}),
)
class BatchRenorm(nn.Module):
    """Batch normalization that is corrected towards the running averages, within limits.

    y = γ (x̂ r + d) + β,   x̂ = (x − μ_B) / σ_B,   σ_B = √(var_B + eps);
    r = clip(σ_B / σ, 1 / r_max, r_max),   d = clip((μ_B − μ) / σ, −d_max, d_max).

    x and y are (N, C, *); μ_B and the biased var_B are those of a channel over N and *; μ = running_mean and
    σ = running_std (C) are averages of μ_B and σ_B as they are before the step; γ and β are learned, a number
    a channel. r and d are constants of the backward pass. Where nothing is clipped, y = γ (x − μ) / σ + β,
    which is what evaluation computes. A training step moves both averages to (1 − momentum) old + momentum
    batch.

    r_max and d_max: the limits; r_max=1 with d_max=0 is batch normalization. The layer has them as buffers.
    Training by bnbench opens them: they are 1 and 0 until 5 % of the training, and from there rise linearly
    to the given values at 40 % (`set_progress`). In other loops they are the given values from the start.
    momentum: None averages all steps alike. affine=False leaves out γ and β.

    Pitfalls: without the ramp the averages of a fresh layer, 0 and 1, make the first steps those of a network
    without norms. Wide limits and a fast drift of the averages go together badly: a small momentum (the paper
    has 0.01) needs small learning rates or a long ramp. The forward pass no longer depends on the batch where
    nothing is clipped, but the gradient does. Scales of the weights before the layer are seen until the
    averages have followed.

    Raises BadInput for an r_max below 1, a d_max below 0, and an eps or a momentum that cannot be; ValueError
    in training on one value a channel, which would have no gradient.

    Source: Ioffe 2017, algorithm 1. There and here eps is in σ_B, and running_std is the average of σ_B;
    other code averages the variance and adds eps after the root, or to both. The paper's ramp (r_max from
    5,000 to 40,000 steps, d_max to 25,000) is one of fixed steps, which short trainings would never reach.
    """

    running_mean: Tensor
    running_std: Tensor
    r_max: Tensor
    d_max: Tensor
    num_batches_tracked: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= r_max < math.inf:
            raise BadInput(f"r_max must be a finite number of at least 1, not {r_max!r}")
        if not 0 <= d_max < math.inf:
            raise BadInput(f"d_max must be a finite number of at least 0, not {d_max!r}")
        self.num_features = num_features
        #: r_max and d_max at the end of the ramp.
        self.limits = (r_max, d_max)
        self.eps = check_eps(eps)
        self.momentum = check_momentum(momentum)
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("r_max", torch.tensor(float(r_max)))
        self.register_buffer("d_max", torch.tensor(float(d_max)))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def extra_repr(self) -> str:
        r_max, d_max = self.limits
        options = f"r_max={r_max!r}, d_max={d_max!r}, eps={self.eps!r}"
        return f"{self.num_features}, {options}, momentum={self.momentum!r}, affine={self.affine!r}"

    def set_progress(self, fraction: float) -> None:
        begin, end = RAMP
        share = min(max((fraction - begin) / (end - begin), 0.0), 1.0)
        r_max, d_max = self.limits
        self.r_max.fill_(1 + share * (r_max - 1))
        self.d_max.fill_(share * d_max)

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        if not self.training:
            centred = wide - per_channel(widen(self.running_mean), x)
            return self._scale(centred, 1 / widen(self.running_std), None).to(x.dtype)
        count_values(x)
        dims = [0, *range(2, x.ndim)]
        mean = wide.mean(dims)
        centred = wide - per_channel(mean, x)
        std = (centred.square().mean(dims) + self.eps).sqrt()
        with torch.no_grad():
            r_max, d_max = widen(self.r_max), widen(self.d_max)
            r = (std / self.running_std).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
            r, d = hold(r), hold(d)
            moved = (self.running_mean, mean), (self.running_std, std)
            move_averages(self.momentum, self.num_batches_tracked, *moved)
        return self._scale(centred, r / std, d).to(x.dtype)

    def _scale(self, centred: Tensor, slope: Tensor, shift: Tensor | None) -> Tensor:
        """γ (centred · slope + shift) + β."""
        if self.weight is not None and self.bias is not None:
            weight, bias = widen(self.weight), widen(self.bias)
            slope, shift = slope * weight, bias if shift is None else torch.addcmul(bias, shift, weight)
        if shift is None:
            return centred * per_channel(slope, centred)
        return torch.addcmul(per_channel(shift, centred), centred, per_channel(slope, centred))

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        return channel_moments(x)

    def set_moments(self, *means: Tensor) -> None:
        mean, mean_square = means
        self.running_mean.copy_(mean)
        self.running_std.copy_(((mean_square - mean.square()).clamp_min(0.0) + self.eps).sqrt())
