"""Iterative normalization (Huang et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbench.norms.base import norm
from bnbench.norms.whitening import GroupWhitening, choose_group_size, covariances, ungroup
from bnbench.registry import BadInput

LARGEST_GROUP = 64


def iterative_whitening(
    x: Tensor, *, group_size: int | None = None, iterations: int = 5, eps: float = 1e-5
) -> Tensor:
    rows, covariance = covariances(x, choose_group_size(x.shape[1], group_size, LARGEST_GROUP), eps)
    trace = torch.einsum("gii->g", covariance)[:, None, None]
    root = torch.eye(rows.shape[1], dtype=x.dtype, device=x.device).expand_as(covariance)
    for _ in range(iterations):
        root = (3 * root - torch.linalg.matrix_power(root, 3) @ covariance / trace) / 2
    return ungroup(root / trace.sqrt() @ rows, x)


@norm(
    "iterative_whitening",
    paper="arXiv:1904.03441",
    reference=iterative_whitening,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    examples=({}, {"group_size": 4}, {"iterations": 2}),
)
class IterativeWhitening(GroupWhitening):
    """Whiten each group of channels by its batch, as far as a few steps of Newton's method get.

    y = γ W (x − μ) + β for each group of D = group_size successive channels of x (N, C, *), with W from

        P_0 = I,   P_k = (3 P_{k−1} − P_{k−1}³ Σ_N) / 2,   Σ_N = S / tr S,   S = Σ + eps I,
        W = P_T / √tr S, which tends to S^(−1/2) as T = iterations grows;

    μ, of shape D, and the biased covariance Σ (D, D) are those over samples and positions, γ and β are a
    channel. A training step moves running_mean and running_whitening, (C / D, D, D), towards μ and W by the
    share momentum; evaluation uses these.

    group_size: None is the largest divisor of C up to 64.

    Pitfalls: directions whose variance is a small part of the group's trace stay short of 1: their scale is
    about 1.5^T √(variance / trace) at first. More steps whiten them, and with them the noise of small
    batches. The average of W is not the W of an average covariance.

    Raises BadInput for a group_size that does not divide C, iterations below 1 and a momentum outside 0 to 1,
    and ValueError in training on one value a channel.

    Source: Huang et al. 2019, algorithm 1. Here P_k and P_k Σ_N are iterated together, which gives the same
    P_k; as written, the iteration multiplies rounding errors, and diverges after some ten steps in float32.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        group_size: int | None = None,
        iterations: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
    ) -> None:
        if iterations < 1:
            raise BadInput(f"iterations must be a number of steps of at least 1, not {iterations!r}")
        size = choose_group_size(num_features, group_size, LARGEST_GROUP)
        super().__init__(num_features, group_size=size, eps=eps, momentum=momentum, affine=affine)
        self.iterations = iterations

    def invert_root(self, covariance: Tensor) -> Tensor:
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        identity = torch.eye(self.group_size, dtype=trace.dtype, device=trace.device)
        # The product P Σ_N is carried along. P³ Σ_N itself would multiply rounding errors at every step.
        product = covariance / trace
        root = factor = 1.5 * identity - 0.5 * product
        for _ in range(self.iterations - 1):
            product = product @ factor
            factor = 1.5 * identity - 0.5 * (root @ product)
            root = factor @ root
        return root * trace.rsqrt()
