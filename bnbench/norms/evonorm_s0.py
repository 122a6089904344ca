"""EvoNorm-S0, a normalization with its activation in it (Liu et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnbench.norms.base import (
    add_affine,
    apply_affine,
    check_eps,
    choose_num_groups,
    norm,
    per_sample,
    require_axes,
    show_options,
    widen,
)


def evonorm_s0(x: Tensor, *, num_groups: int | None = None, eps: float = 1e-5) -> Tensor:
    grouped = x.reshape(len(x), choose_num_groups(x.shape[1], num_groups), -1)
    var = (grouped - grouped.mean(2, keepdim=True)).square().mean(2, keepdim=True)
    return (grouped / (1 + (-grouped).exp()) / (var + eps).sqrt()).reshape(x.shape)


@norm(
    "evonorm_s0",
    paper="arXiv:2004.02967",
    reference=evonorm_s0,
    batch_dependent=False,
    replaces_activation=True,
    scale_invariant=False,
    min_dim=1,
    examples=({}, {"num_groups": 4}),
)
class EvoNormS0(nn.Module):
    """Swish, divided by the deviation of a group of channels of the sample.

    y = γ x sigmoid(v x) / √(σ² + eps) + β for x (N, C, *), with the biased variance σ² of a sample over
    C / num_groups successive channels and all positions, and γ, β and v a channel; v starts at 1. The same
    in training and evaluation. The paper's 32 groups do not suit the 16 channels of a CIFAR ResNet, so
    num_groups=None means gcd(32, C/4).

    Pitfalls: it is nonlinear by itself, so no activation belongs after it. The scale of the input chooses
    between a line (small values) and a rectifier (large ones), and the mean is never subtracted.

    Raises BadInput without spatial axes, and where num_groups does not divide num_features.
    Source: Liu et al. 2020, EvoNorm-S0.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        num_groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__()
        require_axes(dim)
        self.num_features = num_features
        self.num_groups = choose_num_groups(num_features, num_groups)
        self.eps = check_eps(eps)
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.v = nn.Parameter(torch.ones(num_features))

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        shape = (-1, self.num_groups, self.num_features // self.num_groups, *x.shape[2:])
        grouped = wide.view(shape)
        var = grouped.var([*range(2, grouped.ndim)], correction=0, keepdim=True)
        gate = (wide * per_sample(widen(self.v), x)).sigmoid().view(shape)
        y = (grouped * gate * (var + self.eps).rsqrt()).flatten(1, 2)
        return apply_affine(y, self.weight, self.bias, per_sample).to(x.dtype)
