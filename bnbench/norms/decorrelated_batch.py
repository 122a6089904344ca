"""Decorrelated batch normalization (Huang et al., 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbench.norms.base import norm
from bnbench.norms.whitening import GroupWhitening, InverseRoot, choose_group_size, covariances, ungroup

LARGEST_GROUP = 16


def decorrelated_batch_norm(x: Tensor, *, group_size: int | None = None, eps: float = 1e-5) -> Tensor:
    size = choose_group_size(x.shape[1], group_size, LARGEST_GROUP)
    rows, covariance = covariances(x, size, eps)
    values, vectors = torch.linalg.eigh(covariance)
    return ungroup(vectors @ torch.diag_embed(values**-0.5) @ vectors.mT @ rows, x)


@norm(
    "decorrelated_batch",
    paper="arXiv:1804.08450",
    reference=decorrelated_batch_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    examples=({"group_size": 4}, {"group_size": 2}),
)
class DecorrelatedBatchNorm(GroupWhitening):
    """Whiten each group of channels by its batch: mean 0, variance 1 and no correlation.

    y = γ W (x − μ) + β, W = (Σ + eps I)^(−1/2) symmetric (ZCA), for each group of D = group_size successive
    channels of x (N, C, *); μ, of shape D, and the biased covariance Σ (D, D) are those over samples and
    positions, and γ and β are a channel. By an eigendecomposition Σ + eps I = U Λ Uᵀ, W = U Λ^(−1/2) Uᵀ. A
    training step moves running_mean and running_whitening, (C / D, D, D), towards μ and W by the share
    momentum; evaluation uses these.

    group_size: None is the largest divisor of C up to 16.

    Pitfalls: a batch of N values a channel whitens at most N − 1 directions; with few more than D it makes
    noise as large as the signal, so fully connected layers need batches of several D. The average of W is not
    the W of an average covariance. Eigenvalues near eps give large gradients. The decomposition costs D³ for
    each group, and on a GPU torch waits for it.

    Raises BadInput for a group_size that does not divide C and a momentum outside 0 to 1, and ValueError in
    training on one value a channel.

    Source: Huang et al. 2018, algorithms 1 and 2. The backward pass is the exact derivative, as theirs, in a
    form that is finite where eigenvalues are equal.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        group_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
    ) -> None:
        size = choose_group_size(num_features, group_size, LARGEST_GROUP)
        super().__init__(num_features, group_size=size, eps=eps, momentum=momentum, affine=affine)

    def invert_root(self, covariance: Tensor) -> Tensor:
        root: Tensor = InverseRoot.apply(covariance, self.eps)[0]  # type: ignore[no-untyped-call]
        return root
