"""Ghost batch normalization (Hoffer, Hubara & Soudry, 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import channels_adjacent, divisors, norm
from bnbench.registry import BadInput

# A loop over chunks of at least so many values is faster than one kernel over rearranged copies of them: a
# turn of it costs about 60 µs, the copies 5 ns a value (measured on one core, forward and backward).
LOOPED_VALUES = 12_000


def ghost_batch_norm(x: Tensor, *, ghost_size: int = 32, eps: float = 1e-5) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    chunks = []
    for chunk in torch.split(x, ghost_size):
        centred = chunk - chunk.mean(dims, keepdim=True)
        chunks.append(centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt())
    return torch.cat(chunks)


@norm(
    "ghost_batch",
    paper="arXiv:1705.08741",
    reference=ghost_batch_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    permutation_equivariant=False,
    examples=({"ghost_size": 4}, {"ghost_size": 2}),
)
class GhostBatchNorm(BatchStatistics):
    """Batch normalization of each run of ghost_size successive samples by itself.

    y = γ (x − μ_k) / √(σ_k² + eps) + β for the samples of chunk k; x (N, C, *), ghost_size divides N.
    A training step moves the running averages once, by the average of the chunks' means and unbiased
    variances (Hoffer et al., algorithm 1, moves them once for each chunk, in turn). Evaluation uses these
    averages for a batch of any size.

    Pitfalls: ghost_size has to divide every training batch, the last one of an epoch too. Small chunks are
    noisy and differ more from evaluation. Which samples share a chunk depends on their order.

    Raises ValueError in training on a batch that ghost_size does not divide.

    Source: Hoffer, Hubara & Soudry 2017, algorithm 1, but for the averages.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        ghost_size: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        if ghost_size < 2:
            raise BadInput(f"ghost_size must be at least 2, not {ghost_size!r}")
        self.ghost_size = ghost_size

    @staticmethod
    def normalization_batch_size(batch_size: int, *, ghost_size: int = 32, **others: object) -> int:
        if ghost_size < 2 or batch_size % ghost_size:
            known = ", ".join(str(divisor) for divisor in divisors(batch_size)[1:]) or "none, as it needs 2"
            raise BadInput(
                f"ghost_size={ghost_size} does not divide the batch of {batch_size}; what would do: {known}"
            )
        return ghost_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.normalize_by_averages(x)
        self.normalization_batch_size(x.shape[0], ghost_size=self.ghost_size)
        chunks = x.shape[0] // self.ghost_size
        looped = x.numel() >= LOOPED_VALUES * chunks
        y, means, variances = self._loop(x) if looped else self._stack(x, chunks)
        self.update_averages(means.view(chunks, -1).mean(0), variances.view(chunks, -1).mean(0))
        return y

    def _loop(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        results = [self.normalize_chunks(chunk) for chunk in torch.split(x, self.ghost_size)]
        y, means, variances = (torch.cat(parts) for parts in zip(*results, strict=True))
        return y, means, variances

    def _stack(self, x: Tensor, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make each channel of each chunk a channel of its own, so that one kernel does all chunks."""
        stacked = x.view(chunks, self.ghost_size, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        y, means, variances = self.normalize_chunks(stacked, chunks)
        y = y.view(self.ghost_size, chunks, *x.shape[1:]).transpose(0, 1).flatten(0, 1)
        if x.ndim > 2 and channels_adjacent(x):
            y = torch.empty_like(x).copy_(y)
        return y, means, variances
