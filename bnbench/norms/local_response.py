"""Local response normalization (Krizhevsky, Sutskever & Hinton, 2012)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbench.norms.base import norm, show_options, widen
from bnbench.registry import BadInput


def local_response_norm(
    x: Tensor, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> Tensor:
    sums = [
        x[:, max(0, channel - size // 2) : channel + (size + 1) // 2].square().sum(1)
        for channel in range(x.shape[1])
    ]
    return x / (k + alpha * torch.stack(sums, 1)) ** beta


class WindowSum(torch.autograd.Function):
    """The sum of x (N, C, *) over each channel, `below` channels before it and `above` after it.

    Its gradient is a sum of the same kind, once written: that of slices would recompute what follows the sum
    for each of them. torch's own function pools over a third axis, and takes more than twice as long.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, below: int, above: int) -> Tensor:
        channels = x.shape[1]
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (below, above))
        total = padded[:, :channels]
        for first in range(1, below + above + 1):
            total = total + padded[:, first : first + channels]
        return total.clone() if below + above == 0 else total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        ctx.below, ctx.above = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        spread: Tensor = WindowSum.apply(gradient, ctx.above, ctx.below)  # type: ignore[no-untyped-call]
        return spread, None, None


@norm(
    "local_response",
    paper="doi:10.1145/3065386",
    reference=local_response_norm,
    batch_dependent=False,
    scale_invariant=False,
    examples=({}, {"size": 4, "alpha": 0.5, "beta": 0.5, "k": 1.0}),
)
class LocalResponseNorm(nn.Module):
    """Divide each value by a power of the energy of the channels beside it, at its own position.

    y_c = x_c / (k + alpha Σ_j x_j²)^beta for x (N, C, *), with j over the `size` channels around c: from
    c − size // 2 to c + (size − 1) // 2, as far as they exist. The same in training and evaluation; no
    parameters, so no scale and no shift.

    Pitfalls: with the defaults it is nearly a multiplication by k^−beta, and bounds nothing until activations
    are in the tens. The order of the channels matters. In AlexNet it follows the activation.

    Raises BadInput unless size is at least 1, k above 0, and alpha and beta at least 0.
    Source: Krizhevsky et al. 2012, section 3.3, with its numbers. torch.nn.LocalResponseNorm has alpha / size
    in the place of alpha, and k = 1 by default.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
    ) -> None:
        super().__init__()
        if size < 1:
            raise BadInput(f"size, the number of channels in a sum, must be 1 or more, not {size!r}")
        if not (k > 0 and alpha >= 0 and beta >= 0):
            raise BadInput(
                f"k must be above 0, and alpha and beta at least 0, not {k!r}, {alpha!r} and {beta!r}"
            )
        self.num_features = num_features
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        below, above = self.size // 2, (self.size - 1) // 2
        energy: Tensor = WindowSum.apply(wide.square(), below, above)  # type: ignore[no-untyped-call]
        return (wide * self._power(self.k + self.alpha * energy)).to(x.dtype)

    def _power(self, positive: Tensor) -> Tensor:
        """positive^−beta, without pow, which takes far longer than roots and logarithms."""
        if self.beta == 0.75:
            root = positive.rsqrt()
            return root * root.sqrt()
        return (-self.beta * positive.log()).exp()
