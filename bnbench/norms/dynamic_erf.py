"""Dynamic erf, a point-wise function in the place of a normalization (Chen et al., 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnbench.norms.base import add_affine, apply_affine, norm, show_options, widen


def dynamic_erf(x: Tensor, *, alpha_init: float = 0.5) -> Tensor:
    return 1 - (alpha_init * x).erfc()


@norm(
    "dynamic_erf",
    paper="arXiv:2512.10938",
    reference=dynamic_erf,
    batch_dependent=False,
    scale_invariant=False,
    examples=({}, {"alpha_init": 1.0}),
)
class DynamicErf(nn.Module):
    """Squash every value by itself: a layer that takes the place of a normalization and has no statistics.

    y = γ erf(α x + s) + β for x (N, C, *), with γ and β a channel, and α and s (shift) one learned number
    each of the layer; α starts at alpha_init, s at 0. The same in training and evaluation.

    Pitfalls: it normalizes nothing, so that the scale of the weights before it matters, and so does their
    initialization. It was chosen on Transformers, in the place of layer and RMS normalization. Its gradient
    vanishes faster than that of dynamic tanh where |α x| is large.

    Source: Chen et al. 2025 (Derf), equation 10; where α and s start is that of its public code.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self, num_features: int, dim: int = 2, *, alpha_init: float = 0.5, affine: bool = True
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.alpha_init = alpha_init
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.alpha = nn.Parameter(torch.full((1,), float(alpha_init)))
        self.shift = nn.Parameter(torch.zeros(1))

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addcmul(widen(self.shift), widen(x), widen(self.alpha)).erf()
        return apply_affine(y, self.weight, self.bias).to(x.dtype)
