"""Root mean square normalization (Zhang & Sennrich, 2019)."""

from __future__ import annotations

from typing import Literal

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


def rms_norm(x: Tensor, *, over: str = "channels", eps: float = 1e-6) -> Tensor:
    dims = [1] if over == "channels" else list(range(1, x.ndim))
    return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()


@norm(
    "rms",
    paper="arXiv:1910.07467",
    reference=rms_norm,
    batch_dependent=False,
    examples=({}, {"over": "sample"}),
)
class RMSNorm(nn.Module):
    """Divide by the root mean square; no mean is subtracted and there is no β.

    y = γ x / √(mean x² + eps), γ a channel; x (N, C, *). over="channels": the mean is that of each position
    over C. over="sample": that of a sample over C and all positions.

    Pitfalls: Means stay: where a large one is common to all values, it uses up the root mean square, and what
    differs becomes small. Without β a bias before the layer is not dead.

    Source: Zhang & Sennrich 2019, equation 4; eps inside the root as in torch.nn.RMSNorm.
    """

    weight: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        over: Literal["channels", "sample"] = "channels",
        eps: float = 1e-6,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.over = check_choice("over", over, ("channels", "sample"))
        self.eps = check_eps(eps)
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=False)

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        if channels_adjacent(x) and (self.over == "channels" or x.ndim == 2):
            last = match(x, self.weight).movedim(1, -1)
            y = F.rms_norm(last, (self.num_features,), self.weight, self.eps)
            return y.movedim(-1, 1).to(x.dtype)
        dims = [1] if self.over == "channels" else list(range(1, x.ndim))
        wide = widen(x)
        y = wide * (wide.square().mean(dims, keepdim=True) + self.eps).rsqrt()
        return (y if self.weight is None else y * per_channel(self.weight, x)).to(x.dtype)
