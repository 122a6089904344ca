"""No normalization: the identity."""

from __future__ import annotations

from torch import Tensor, nn

from bnbench.norms.base import norm


def identity(x: Tensor) -> Tensor:
    return x


@norm("none", paper="none", reference=identity, batch_dependent=False, scale_invariant=False)
class NoNorm(nn.Identity):
    """y = x; a linear map before it keeps its bias."""

    def __init__(self, num_features: int, dim: int = 2) -> None:
        super().__init__()
