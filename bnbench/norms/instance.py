"""Instance normalization (Ulyanov, Vedaldi & Lempitsky, 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bnbench.norms.base import (
    add_affine,
    check_eps,
    match,
    norm,
    require_axes,
    require_positions,
    show_options,
)


def instance_norm(x: Tensor, *, eps: float = 1e-5) -> Tensor:
    dims = list(range(2, x.ndim))
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


@norm(
    "instance",
    paper="arXiv:1607.08022",
    reference=instance_norm,
    batch_dependent=False,
    centres=True,
    min_dim=1,
)
class InstanceNorm(nn.Module):
    """Standardize each channel of each sample over its positions, with γ and β a channel.

    y = γ (x − μ) / √(σ² + eps) + β, with μ and the biased σ² over * alone; x (N, C, *). The same in
    training and evaluation. Affine by default, which torch.nn.InstanceNorm2d is not.

    Pitfalls: One position a channel has no variance: it suits neither MLPs nor 1 × 1 maps, and is coarse on
    small ones. How strong a channel is in a sample as a whole is lost.

    Raises BadInput without spatial axes, and ValueError for inputs of one position.

    Source: Ulyanov et al. 2016.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, num_features: int, dim: int = 2, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        require_axes(dim)
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        require_positions(x)
        # One channel a group is the same; torch's instance_norm loses channels_last and bfloat16's precision.
        y = F.group_norm(match(x, self.weight), self.num_features, self.weight, self.bias, self.eps)
        return y.to(x.dtype)
