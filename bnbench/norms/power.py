"""Power normalization (Shen et al., 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnbench.norms.averages import SquareAverage
from bnbench.norms.base import norm, widen
from bnbench.norms.own_backward import (
    affine_or_identity,
    run_function,
    run_replicas,
    scale_and_shift,
    spread,
    sum_channels,
)
from bnbench.registry import BadInput


def power_norm(x: Tensor, *, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    # The average that a fresh layer divides by is 1.
    return x / math.sqrt(1 + eps)


class PowerScaling(torch.autograd.Function):
    """y = γ x / ψ + β with PowerNorm's backward pass, which moves ν; replicas first, warm is (R, 1)."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        inverse: Tensor,
        square: Tensor,
        warm: Tensor,
        average: Tensor,
        momentum: float,
    ) -> Tensor:
        return scale_and_shift(x, weight * inverse, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, inverse, square, warm, ctx.average, ctx.momentum = inputs
        ctx.save_for_backward(x, weight, inverse, square, warm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, square, warm = ctx.saved_tensors
        g, wide = widen(gradients[0]), widen(x)
        weight_gradient = sum_channels(g * wide) * inverse
        product = weight * weight_gradient / (x.numel() // inverse.numel())  # Λ, the mean of g x̂
        removed = torch.where(warm, product, ctx.average)
        x_gradient = g * spread(weight * inverse, x) - wide * spread(removed * inverse.square(), x)
        with torch.no_grad():
            kept = 1 - ctx.momentum * square
            ctx.average.copy_(kept * ctx.average + ctx.momentum * product)
        return (x_gradient.to(x.dtype), weight_gradient, sum_channels(g), *(None,) * 5)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return run_replicas(PowerScaling, info, in_dims, inputs)


@norm(
    "power",
    paper="arXiv:2003.07845",
    reference=power_norm,
    batch_dependent=False,
    running_stats=True,
    scale_invariant=False,
    exact_gradient=False,
    examples=({}, {"momentum": 0.5}),
)
class PowerNorm(SquareAverage):
    """Divide each channel by a running root mean square, with a running average in the backward pass too.

    x̂ = x / √(ψ² + eps), y = γ x̂ + β; x (N, C, *). ψ², of shape C, is the running average from before this
    batch. In training the backward pass, with g = γ ∂L/∂y, means over samples and positions, and μ = momentum
    (1 − α in the paper), is

        ∂L/∂x = (g − ν x̂) / √(ψ² + eps),
        ν ← ν (1 − μ mean(x̂²)) + μ mean(g x̂),   ψ² ← (1 − μ) ψ² + μ mean(x²);

    ν, of shape C, is the one from before this backward pass. No sample thus sees another of its batch, in
    either pass. Evaluation divides by ψ too.

    warmup: so many steps at the start, 0 by default, divide by the batch's own root mean square, with the
    exact gradient (PN-V in the paper); in these steps samples see each other.

    running_square is ψ², which starts at 1, and running_gradient is ν, which starts at 0 and moves in the
    backward pass.

    Pitfalls: the gradient is no derivative of anything, so line searches and numeric checks do not apply. The
    first steps divide by what ψ² starts at: where inputs are far from a root mean square of 1, begin with a
    low learning rate or a warm-up. A jump of the mean square by more than 2 / momentum turns ν over. There is
    no centring.

    Raises BadInput for a momentum outside 0 to 1 and a negative warmup.

    Source: Shen et al. 2020, algorithm 2. The public code differs: in the backward pass it divides by the
    batch's root mean square and removes (1 − α) ν x̂, and in its warm-up it moves ψ² twice a step. The group
    scaling that it applies first is no part of this layer.
    """

    running_gradient: Tensor

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        warmup: int = 0,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        if warmup < 0:
            raise BadInput(f"warmup must be a number of steps of at least 0, not {warmup!r}")
        self.warmup = warmup
        self.register_buffer("running_gradient", torch.zeros(num_features))

    @staticmethod
    def normalization_batch_size(batch_size: int, *, warmup: int = 0, **others: object) -> int | None:
        return batch_size if warmup else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.normalize_by_average(x)
        average = widen(self.running_square)
        with torch.no_grad():
            square = widen(x).square().mean([0, *range(2, x.ndim)])
            warm = self.num_batches_tracked < self.warmup
            inverse = (torch.where(warm, square, average) + self.eps).rsqrt()
            self.running_square.copy_(torch.lerp(average, square, self.momentum))
            self.num_batches_tracked.add_(1)
        weight, bias = affine_or_identity(self, inverse)
        constants = inverse, square * inverse.square(), warm[None]
        buffers = (self.running_gradient,)
        return run_function(PowerScaling, (x, weight, bias), constants, buffers, self.momentum)
