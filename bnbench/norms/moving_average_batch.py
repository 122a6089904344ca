"""Moving average batch normalization (Yan et al., 2020)."""

from __future__ import annotations

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

# The paper keeps the renormalization r between these.
LEAST_RATIO, LARGEST_RATIO = 1 / 5, 5.0


def moving_average_batch_norm(
    x: Tensor, *, buffer_size: int = 16, warmup: int = 100, eps: float = 1e-5
) -> Tensor:
    # A fresh layer's buffer is not full and its warm-up not over.
    return x / (x.square().mean([0, *range(2, x.ndim)], keepdim=True) + eps).sqrt()


def take_in(buffer: Tensor, steps: Tensor, batch: Tensor) -> Tensor:
    """Write a step's values (…, C) into a ring buffer (…, C, size), after so many steps (…) before it.

    Returns the mean over the buffer once it is full, until then the values themselves.
    """
    size = buffer.shape[-1]
    places = torch.arange(size, device=buffer.device) == (steps % size)[..., None]
    buffer.copy_(torch.where(places[..., None, :], batch[..., None].to(buffer.dtype), buffer))
    return torch.where((steps + 1 >= size)[..., None], widen(buffer).mean(-1), batch)


class BufferedScaling(torch.autograd.Function):
    """y = γ r z + β, z = inverse · x, with MABN's backward pass, which fills the buffer products.

    Replicas come first: products is (R, C, m), steps is (R).
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        inverse: Tensor,
        ratio: Tensor,
        products: Tensor,
        steps: Tensor,
    ) -> Tensor:
        return scale_and_shift(x, weight * ratio * inverse, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, inverse, ratio, ctx.products, ctx.steps = inputs
        ctx.save_for_backward(x, weight, inverse, ratio)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, ratio = ctx.saved_tensors
        g, wide = widen(gradients[0]), widen(x)
        weight_gradient = sum_channels(g * wide) * inverse * ratio
        product = weight * weight_gradient / (x.numel() // inverse.numel())
        with torch.no_grad():
            removed = take_in(ctx.products, ctx.steps, product)
            ctx.steps.add_(1)
        x_gradient = g * spread(weight * ratio * inverse, x) - wide * spread(removed * inverse.square(), x)
        return (x_gradient.to(x.dtype), weight_gradient, sum_channels(g), *(None,) * 4)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return run_replicas(BufferedScaling, info, in_dims, inputs)


@norm(
    "moving_average_batch",
    paper="arXiv:2001.06838",
    reference=moving_average_batch_norm,
    batch_dependent=True,
    running_stats=True,
    exact_gradient=False,
    examples=({}, {"buffer_size": 2, "warmup": 1}),
)
class MovingAverageBatchNorm(SquareAverage):
    """Divide each channel by a root mean square over the last batches, so that batches may be tiny.

    In training, x (N, C, *), with means over samples and positions, and all statistics of shape C:

        χ² = mean(x²) averaged over the last m batches, this one with them;   z = x / √(χ² + eps)
        r = √(χ² + eps) / √(σ² + eps) clipped to [1/5, 5], a constant;        y = γ r z + β
        σ² ← (1 − momentum) σ² + momentum χ²,

    and the backward pass, with g = γ r ∂L/∂y, is

        ∂L/∂x = (g − ψ z) / √(χ² + eps),   ψ = mean(g z) averaged over the last m backward passes.

    Evaluation is y = γ x / √(σ² + eps) + β.

    buffer_size: m. Each of the two buffers counts from the step that fills it; until then the batch's own
    χ² and ψ stand.
    warmup: in so many steps at the start r is 1.

    running_square is σ², which starts at 1; squares and products are the buffers, (C, m).

    Pitfalls: there is no centring; the layer is meant for linear maps before it that have the
    reparametrization "centred_weight", and without that a large mean makes it insensitive. The gradient is
    not the derivative of the forward pass. σ² follows slowly: with momentum 0.02 it takes 150 steps to forget
    95 % of its start, so that evaluation in very short trainings is off. The buffers are averages over past
    weights, and lag where these change fast.

    Raises BadInput for a momentum outside 0 to 1, a buffer_size below 1 and a negative warmup.

    Source: Yan et al. 2020, section 4. The public code lets the buffers count one step later and not during
    the warm-up, keeps r at 1 for at least 1000 steps, and has one counter for both buffers.
    """

    squares: Tensor
    products: Tensor
    num_gradients_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        momentum: float = 0.02,
        affine: bool = True,
        buffer_size: int = 16,
        warmup: int = 100,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        if buffer_size < 1:
            raise BadInput(f"buffer_size must be a number of batches of at least 1, not {buffer_size!r}")
        if warmup < 0:
            raise BadInput(f"warmup must be a number of steps of at least 0, not {warmup!r}")
        self.buffer_size = buffer_size
        self.warmup = warmup
        self.register_buffer("squares", torch.zeros(num_features, buffer_size))
        self.register_buffer("products", torch.zeros(num_features, buffer_size))
        self.register_buffer("num_gradients_tracked", torch.tensor(0))

    @staticmethod
    def normalization_batch_size(batch_size: int, *, buffer_size: int = 16, **others: object) -> int:
        return batch_size * buffer_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.normalize_by_average(x)
        average = widen(self.running_square)
        with torch.no_grad():
            own_square = widen(x).square().mean([0, *range(2, x.ndim)])
            square = take_in(self.squares, self.num_batches_tracked, own_square)
            self.num_batches_tracked.add_(1)
            inverse = (square + self.eps).rsqrt()
            ratio = ((square + self.eps) / (average + self.eps)).sqrt().clamp(LEAST_RATIO, LARGEST_RATIO)
            ratio = torch.where(self.num_batches_tracked > self.warmup, ratio, 1.0)
            self.running_square.copy_(torch.lerp(average, square, self.momentum))
        weight, bias = affine_or_identity(self, inverse)
        buffers = self.products, self.num_gradients_tracked
        return run_function(BufferedScaling, (x, weight, bias), (inverse, ratio), buffers)
