"""Group normalization (Wu & He, 2018)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from bnbench.norms.base import add_affine, check_eps, divisors, match, norm, show_options
from bnbench.registry import BadInput


def group_norm(
    x: Tensor, *, num_groups: int | None = None, eps: float = 1e-5, gamma_init: float = 1.0
) -> Tensor:
    grouped = x.reshape(len(x), num_groups or default_num_groups(x.shape[1]), -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    return (gamma_init * centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)


def default_num_groups(num_features: int) -> int:
    """gcd(32, C/4): 32 groups where the channels allow it, and at least 4 channels a group.

    Where 4 does not divide C, the part of this that divides C (18 channels: 2 groups).
    """
    return math.gcd(32, max(num_features // 4, 1), num_features)


@norm(
    "group",
    paper="arXiv:1803.08494",
    reference=group_norm,
    batch_dependent=False,
    examples=({}, {"num_groups": 4}, {"gamma_init": 0.5}),
)
class GroupNorm(nn.Module):
    """Standardize each group of channels of each sample, with γ and β a channel.

    y = γ (x − μ) / √(σ² + eps) + β, with μ and the biased σ² of a sample over C / num_groups successive
    channels and all positions; x (N, C, *). The paper's 32 groups do not suit the 16 channels of a CIFAR
    ResNet, so num_groups=None means gcd(32, C/4).
    gamma_init: where γ starts.
    Raises BadInput where num_groups does not divide num_features.
    Source: Wu & He 2018, equation 7.
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
        gamma_init: float = 1.0,
    ) -> None:
        super().__init__()
        if num_groups is None:
            num_groups = default_num_groups(num_features)
        if num_groups < 1 or num_features % num_groups:
            known = ", ".join(str(divisor) for divisor in divisors(num_features))
            raise BadInput(
                f"num_groups={num_groups} does not divide {num_features} channels; what would do: {known}"
            )
        self.num_features = num_features
        self.num_groups = num_groups
        self.eps = check_eps(eps)
        self.affine = affine
        self.gamma_init = gamma_init
        add_affine(self, num_features, gamma=affine, beta=affine, gamma_init=gamma_init)

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(match(x, self.weight), self.num_groups, self.weight, self.bias, self.eps).to(
            x.dtype
        )
