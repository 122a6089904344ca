"""Batch-instance normalization (Nam & Kim, 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import check_share, norm, per_channel, require_axes, require_positions, widen


def batch_instance_norm(x: Tensor, *, gate_init: float = 1.0, eps: float = 1e-5, **others: object) -> Tensor:
    y = torch.zeros_like(x)
    for share, first in ((gate_init, 0), (1 - gate_init, 2)):
        dims = [axis for axis in range(first, x.ndim) if axis != 1]
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        y += share * (x - mean) / (var + eps).sqrt()
    return y


@norm(
    "batch_instance",
    paper="arXiv:1805.07925",
    reference=batch_instance_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    min_dim=1,
    # Inside the gate's interval, where the gradient is that of the forward pass.
    examples=({"gate_init": 0.5}, {"gate_init": 0.25, "momentum": None}),
)
class BatchInstanceNorm(BatchStatistics):
    """A mixture of batch and instance normalization, with a learned share a channel.

    y = γ (ρ x̂_B + (1 − ρ) x̂_I) + β,   x̂_B = (x − μ_B) / √(σ_B² + eps),   x̂_I = (x − μ_I) / √(σ_I² + eps);
    x and y are (N, C, *), μ_B and the biased σ_B² are those of a channel over N and *, μ_I and σ_I² those
    over * in one example, and ρ, γ and β are learned, a number a channel. Evaluation puts running_mean and
    running_var in the place of μ_B and σ_B²; these move as those of the norm "batch" do. x̂_I is the same in
    training and evaluation.

    The parameter `gate` is ρ, held in [0, 1]: the paper clips it after each update; here the next forward
    pass in training does so, in place, and evaluation reads it clipped, which comes to the same.

    gate_init: where ρ starts, 0 to 1; 1 is batch normalization. momentum: None averages all steps alike.
    affine=False leaves out γ and β; the gate stays.

    Pitfalls: where the gate is near 0, what an example's mean and contrast tell is lost. Weight decay on the
    gate pulls towards instance normalization. A learning rate that suits the weights may hardly move it.
    Clipping inside the formula alone would not do: a gate that had left the interval would get no gradient
    any more, and stay out.

    Raises BadInput without spatial axes and for a gate_init outside [0, 1]; ValueError for inputs of one
    position; otherwise what "batch" raises.

    Source: Nam & Kim 2018, section 3, equations 2 to 4.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        gate_init: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        require_axes(dim, "'batch' does")
        self.gate_init = check_share("gate_init", gate_init)
        self.gate = nn.Parameter(torch.full((num_features,), float(gate_init)))

    def forward(self, x: Tensor) -> Tensor:
        positions = [*range(2, x.ndim)]
        require_positions(x)
        wide = widen(x)
        own_mean = wide.mean(positions, keepdim=True)
        centred = wide - own_mean
        own_var = centred.square().mean(positions, keepdim=True)
        var = self.variance_over_batch(x, own_mean, own_var)
        if self.training:
            mean = own_mean.mean(0, keepdim=True)
            with torch.no_grad():
                self.gate.copy_(self.gate.clamp(0, 1))
        else:
            mean = per_channel(widen(self.running_mean), x)
        # Of a copy, since a backward pass may still need the gate when the next forward pass clips it.
        gate = per_channel(widen(self.gate.clone()).clamp(0, 1), x)
        batch_scale = gate * (var + self.eps).rsqrt()
        scale = batch_scale + (1 - gate) * (own_var + self.eps).rsqrt()
        shift = (own_mean - mean) * batch_scale
        if self.weight is not None and self.bias is not None:
            weight, bias = per_channel(widen(self.weight), x), per_channel(widen(self.bias), x)
            scale, shift = scale * weight, torch.addcmul(bias, shift, weight)
        return torch.addcmul(shift, centred, scale).to(x.dtype)
