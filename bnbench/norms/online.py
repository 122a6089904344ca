"""Online normalization (Chiley et al., 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bnbench.norms.base import (
    add_affine,
    channel_moments,
    check_eps,
    check_share,
    norm,
    set_mean_and_variance,
    show_options,
    widen,
)
from bnbench.norms.own_backward import affine_or_identity, run_function, run_replicas, spread


def online_norm(
    x: Tensor, *, momentum: float = 0.001, layer_scaling: bool = True, eps: float = 1e-5
) -> Tensor:
    mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    samples = []
    for sample in x:
        values = sample.reshape(len(sample), -1)
        y = (values - mean[:, None]) / (var[:, None] + eps).sqrt()
        away = values.mean(1) - mean
        var = (1 - momentum) * (var + momentum * away.square()) + momentum * values.var(1, correction=0)
        mean = mean + momentum * away
        samples.append(y / (y.square().mean() + eps).sqrt() if layer_scaling else y)
    return torch.stack(samples).reshape(x.shape)


def run_recurrence(decay: Tensor, drive: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """s_{n+1} = decay_n s_n + drive_n over the samples of (…, N, C), from start (…, C): all s_n, the last.

    In log₂ N rounds, in each of which the maps of twice as many neighbours become one.
    """
    reach = 1
    while reach < drive.shape[-2]:
        # The maps before the first sample change nothing.
        earlier_drive = F.pad(drive[..., :-reach, :], (0, 0, reach, 0))
        earlier_decay = F.pad(decay[..., :-reach, :], (0, 0, reach, 0), value=1.0)
        decay, drive = decay * earlier_decay, drive + decay * earlier_drive
        reach *= 2
    before = start[..., None, :]
    after = decay * before + drive
    return torch.cat([before, after[..., :-1, :]], -2), after[..., -1, :]


class OnlineScaling(torch.autograd.Function):
    """y = γ x̂ + β, x̂ = inverse · (x − mean), with the control process as its backward pass.

    Replicas come first: mean, inverse, and the means over positions of x̂ and x̂² (first, second) are
    (R, N, C); the states of the control process, of x̂ and of 1, are (R, C) and move in the backward pass.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        inverse: Tensor,
        first: Tensor,
        second: Tensor,
        scale_state: Tensor,
        mean_state: Tensor,
        momentum: float,
    ) -> Tensor:
        return torch.addcmul(
            spread(bias, x), widen(x) - spread(mean, x), spread(weight[:, None] * inverse, x)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, mean, inverse, first, second, ctx.scale_state, ctx.mean_state, ctx.momentum = inputs
        ctx.save_for_backward(x, weight, mean, inverse, first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, first, second = ctx.saved_tensors
        g, share, positions = gradients[0], ctx.momentum, [*range(3, x.ndim)]
        centred = widen(x) - spread(mean, x)
        products, sums = (g * centred, g) if x.ndim == 3 else ((g * centred).sum(positions), g.sum(positions))
        products = products * inverse
        with torch.no_grad():
            scale = weight[:, None] / x[0, 0, 0].numel()
            v, last_v = run_recurrence(1 - share * second, scale * products, widen(ctx.scale_state))
            drive = (scale * sums - share * v * first) * inverse
            u, last_u = run_recurrence(torch.full_like(drive, 1 - share), drive, widen(ctx.mean_state))
            ctx.scale_state.copy_(last_v)
            ctx.mean_state.copy_(last_u)
        removed = centred * spread(share * v * inverse.square(), x) + spread(share * u, x)
        x_gradient = g * spread(weight[:, None] * inverse, x) - removed
        return (x_gradient.to(x.dtype), products.sum(1), sums.sum(1), *(None,) * 7)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return run_replicas(OnlineScaling, info, in_dims, inputs)


@norm(
    "online",
    paper="arXiv:1905.05894",
    reference=online_norm,
    batch_dependent=True,
    running_stats=True,
    scale_invariant=False,
    permutation_equivariant=False,
    exact_gradient=False,
    examples=({}, {"momentum": 0.1}, {"layer_scaling": False}),
)
class OnlineNorm(nn.Module):
    """Standardize each sample by averages over the samples before it, with no batch in either pass.

    The samples n of x (N, C, *) come one after the other, those of a batch in their order. With m and s², of
    shape C, the mean and biased variance of sample n over its positions, and a = momentum (1 − α_f),

        x̂_n = (x_n − μ) / √(σ² + eps);   σ² ← (1 − a) σ² + a s² + a (1 − a) (m − μ)²,   μ ← μ + a (m − μ),

    and y_n = γ x̂_n + β, which layer scaling divides by √(mean(y_n²) + eps) over the channels and positions of
    the sample. The backward pass keeps the gradient orthogonal to x̂ and to 1, not in a batch but in the long
    run: with g = γ ∂L/∂y_n, b = backward_momentum (1 − α_b), and means over positions,

        g' = g − b v x̂_n,                  v ← v + mean(g' x̂_n)
        ∂L/∂x_n = g' / √(σ² + eps) − b u,   u ← u + mean(∂L/∂x_n).

    Evaluation takes μ and σ² as they are, for all samples.

    layer_scaling: whether samples are divided by their root mean square.

    running_mean and running_var are μ and σ², from 0 and 1; control_scale and control_mean are v and u, from
    0, and move in the backward pass.

    Pitfalls: outputs depend on the order of the samples, and a sample on those before it in its batch. The
    gradient is no derivative of anything. μ and σ² forget their start after some 1 / momentum samples, here
    thousands. The control process diverges while mean(x̂²) is above 2 / backward_momentum.

    Raises BadInput for momenta outside 0 to 1.

    Source: Chiley et al. 2019; the recurrences are those of the authors' public code, too, which by default
    clamps the outputs to ±5 in place of layer scaling.
    """

    running_mean: Tensor
    running_var: Tensor
    control_scale: Tensor
    control_mean: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        momentum: float = 0.001,
        backward_momentum: float = 0.01,
        affine: bool = True,
        layer_scaling: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.momentum = check_share("momentum", momentum)
        self.backward_momentum = check_share("backward_momentum", backward_momentum)
        self.affine = affine
        self.layer_scaling = layer_scaling
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("control_scale", torch.zeros(num_features))
        self.register_buffer("control_mean", torch.zeros(num_features))

    extra_repr = show_options

    @staticmethod
    def normalization_batch_size(batch_size: int, **others: object) -> int | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = self._normalize_in_turn(x)
        else:
            weight, bias = (None if values is None else widen(values) for values in (self.weight, self.bias))
            mean, var = widen(self.running_mean), widen(self.running_var)
            y = F.batch_norm(widen(x), mean, var, weight, bias, False, 0.0, self.eps)
        if self.layer_scaling:
            y = y * (y.square().mean([*range(1, x.ndim)], keepdim=True) + self.eps).rsqrt()
        return y.to(x.dtype)

    def _normalize_in_turn(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wide = widen(x)
            own_mean, own_var = wide, torch.zeros_like(wide)
            if x.ndim > 2:
                positions = [*range(2, x.ndim)]
                rough = wide.mean(positions, keepdim=True)
                own_mean, own_var = rough.flatten(1), (wide - rough).square().mean(positions)
            share = self.momentum
            kept = torch.full_like(own_mean, 1 - share)
            mean, last_mean = run_recurrence(kept, share * own_mean, widen(self.running_mean))
            away = own_mean - mean
            drive = share * (own_var + (1 - share) * away.square())
            var, last_var = run_recurrence(kept, drive, widen(self.running_var))
            self.running_mean.copy_(last_mean)
            self.running_var.copy_(last_var)
            inverse = (var + self.eps).rsqrt()
            second = (own_var + away.square()) * inverse.square()
        weight, bias = affine_or_identity(self, last_mean)
        constants = mean, inverse, away * inverse, second
        buffers = self.control_scale, self.control_mean
        return run_function(OnlineScaling, (x, weight, bias), constants, buffers, self.backward_momentum)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        return channel_moments(x)

    def set_moments(self, *means: Tensor) -> None:
        set_mean_and_variance(self, *means)
