"""Dynamic tanh, a point-wise function in the place of a normalization (Zhu et al., 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnbench.norms.base import add_affine, apply_affine, norm, show_options, widen


def dynamic_tanh(x: Tensor, *, alpha_init: float = 0.5) -> Tensor:
    return 1 - 2 / (1 + (2 * alpha_init * x).exp())


@norm(
    "dynamic_tanh",
    paper="arXiv:2503.10622",
    reference=dynamic_tanh,
    batch_dependent=False,
    scale_invariant=False,
    examples=({}, {"alpha_init": 1.0}),
)
class DynamicTanh(nn.Module):
    """Squash every value by itself: a layer that takes the place of a normalization and has no statistics.

    y = γ tanh(α x) + β for x (N, C, *), with γ and β a channel and α one learned number of the layer, which
    starts at alpha_init. The same in training and evaluation.

    Pitfalls: it normalizes nothing, so that the scale of the weights before it matters, and so does their
    initialization. It was tuned for Transformers, in the place of layer and RMS normalization; alpha_init
    is the paper's for all but language models, whose best α falls with their width. Where |α x| is large its
    gradient vanishes.

    Source: Zhu et al. 2025, section 4.
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

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        y = (widen(x) * widen(self.alpha)).tanh()
        return apply_affine(y, self.weight, self.bias).to(x.dtype)
