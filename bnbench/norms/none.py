"""No normalization: the identity."""

from __future__ import annotations

from torch import Tensor, nn

from bnbench.norms.base import norm


def identity(x: Tensor) -> Tensor:
    return x


@norm("none", paper="none", reference=identity, batch_dependent=False, scale_invariant=False)
class NoNorm(nn.Identity):
    """No normalization: the layer that leaves its input as it is.

    y = x for x (N, C, *), in training and evaluation.

    Pitfalls: Nothing holds the scale of the signal, so that depth needs an initialization that does (He's for
    ReLU) and smaller learning rates. A linear map before it keeps its bias.

    Source: no paper; it is the control of every comparison.
    """

    def __init__(self, num_features: int, dim: int = 2) -> None:
        super().__init__()
