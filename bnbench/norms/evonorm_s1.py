"""EvoNorm-S1, a normalization with its activation in it (Liu et al., 2020)."""

from __future__ import annotations

import torch.nn.functional as F
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


def evonorm_s1(x: Tensor, *, num_groups: int | None = None, eps: float = 1e-5) -> Tensor:
    grouped = x.reshape(len(x), choose_num_groups(x.shape[1], num_groups), -1)
    var = (grouped - grouped.mean(2, keepdim=True)).square().mean(2, keepdim=True)
    return (grouped / (1 + (-grouped).exp()) / (var + eps).sqrt()).reshape(x.shape)


@norm(
    "evonorm_s1",
    paper="arXiv:2004.02967",
    reference=evonorm_s1,
    batch_dependent=False,
    replaces_activation=True,
    scale_invariant=False,
    min_dim=1,
    examples=({}, {"num_groups": 4}),
)
class EvoNormS1(nn.Module):
    """SiLU, divided by the deviation of a group of channels of the sample.

    y = γ x sigmoid(x) / √(σ² + eps) + β for x (N, C, *), with the biased variance σ² of a sample over
    C / num_groups successive channels and all positions, and γ and β a channel. The same in training and
    evaluation. It is EvoNorm-S0 with its v fixed at 1. num_groups=None means gcd(32, C/4), as in "group".

    Pitfalls: it is nonlinear by itself, so no activation belongs after it. The scale of the input chooses
    between a line (small values) and a rectifier (large ones), and here no v can make up for it.

    Raises BadInput without spatial axes, and where num_groups does not divide num_features.
    Source: Liu et al. 2020, EvoNorm-S1, by timm's code.
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

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        grouped = widen(x).view(-1, self.num_groups, self.num_features // self.num_groups, *x.shape[2:])
        var = grouped.var([*range(2, grouped.ndim)], correction=0, keepdim=True)
        y = (F.silu(grouped) * (var + self.eps).rsqrt()).flatten(1, 2)
        return apply_affine(y, self.weight, self.bias, per_sample).to(x.dtype)
