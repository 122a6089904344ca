"""Group normalization (Wu & He, 2018)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bnbench.norms.base import add_affine, check_eps, choose_num_groups, match, norm, show_options


def group_norm(
    x: Tensor, *, num_groups: int | None = None, eps: float = 1e-5, gamma_init: float = 1.0
) -> Tensor:
    grouped = x.reshape(len(x), choose_num_groups(x.shape[1], num_groups), -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    return (gamma_init * centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)


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

    Pitfalls: num_groups has to divide the channels. One channel a group is instance normalization, one group
    layer normalization. The variance is biased, torch's too. A channel may stay far from 0, as only its
    group is centred.

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
        self.num_features = num_features
        self.num_groups = choose_num_groups(num_features, num_groups)
        self.eps = check_eps(eps)
        self.affine = affine
        self.gamma_init = gamma_init
        add_affine(self, num_features, gamma=affine, beta=affine, gamma_init=gamma_init)

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(match(x, self.weight), self.num_groups, self.weight, self.bias, self.eps).to(
            x.dtype
        )
