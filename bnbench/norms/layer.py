"""Layer normalization (Ba, Kiros & Hinton, 2016), over a sample or over the channels of a position."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbench.norms.base import (
    add_affine,
    channels_adjacent,
    check_eps,
    match,
    norm,
    per_channel,
    show_options,
    widen,
)
from bnbench.registry import check_choice


def layer_norm(x: Tensor, *, over: str = "sample", eps: float = 1e-5, gamma_init: float = 1.0) -> Tensor:
    dims = [1] if over == "channels" else list(range(1, x.ndim))
    centred = x - x.mean(dims, keepdim=True)
    return gamma_init * centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


@norm(
    "layer",
    paper="arXiv:1607.06450",
    reference=layer_norm,
    batch_dependent=False,
    examples=({}, {"over": "channels"}, {"gamma_init": 0.5}),
)
class LayerNorm(nn.Module):
    """Standardize each sample by itself, with γ and β a channel.

    y = γ (x − μ) / √(σ² + eps) + β; x (N, C, *). over="sample": μ and the biased σ² of a sample over C and
    all positions (group normalization with one group). over="channels": of each position over C (as in
    ConvNeXt, Liu et al. 2022). Without spatial axes the two are one. torch.nn.LayerNorm has γ and β for
    each element of the normalized shape, which differs from ours in over="sample" with spatial axes.
    gamma_init: where γ starts.

    Pitfalls: Two different functions of a feature map go by this name; say which one was used. Neither of
    them centres each channel, so a channel may stay far from 0, and a ReLU behind it dead.

    Source: Ba et al. 2016, equation 3.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        over: Literal["sample", "channels"] = "sample",
        eps: float = 1e-5,
        affine: bool = True,
        gamma_init: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.over = check_choice("over", over, ("sample", "channels"))
        self.eps = check_eps(eps)
        self.affine = affine
        self.gamma_init = gamma_init
        add_affine(self, num_features, gamma=affine, beta=affine, gamma_init=gamma_init)

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        if self.over == "sample":
            return F.group_norm(match(x, self.weight), 1, self.weight, self.bias, self.eps).to(x.dtype)
        if channels_adjacent(x):
            last = match(x, self.weight).movedim(1, -1)
            y = F.layer_norm(last, (self.num_features,), self.weight, self.bias, self.eps)
            return y.movedim(-1, 1).to(x.dtype)
        # torch's kernel would copy x to channels-last and give back another memory format.
        wide = widen(x)
        var, mean = torch.var_mean(wide, 1, correction=0, keepdim=True)
        y = (wide - mean) * (var + self.eps).rsqrt()
        if self.weight is not None and self.bias is not None:
            y = y * per_channel(self.weight, x) + per_channel(self.bias, x)
        return y.to(x.dtype)
