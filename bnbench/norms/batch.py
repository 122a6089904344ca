"""Batch normalization (Ioffe & Szegedy, 2015)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbench.norms.averages import BatchStatistics
from bnbench.norms.base import norm
from bnbench.registry import BadInput


def batch_norm(
    x: Tensor, *, eps: float = 1e-5, gamma: float | None = None, gamma_init: float = 1.0, **others: object
) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    centred = x - x.mean(dims, keepdim=True)
    scale = gamma_init if gamma is None else gamma
    return scale * centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


@norm(
    "batch",
    paper="arXiv:1502.03167",
    reference=batch_norm,
    batch_dependent=True,
    running_stats=True,
    centres=True,
    examples=({}, {"momentum": None}, {"gamma": 0.5, "learn_gamma": False}, {"gamma_init": 0.5}),
)
class BatchNorm(BatchStatistics):
    """Standardize each channel over the batch and all positions, by torch's own kernel.

    y = γ (x − μ) / √(σ² + eps) + β, with μ and the biased σ² of a channel over N and *; x (N, C, *).
    Evaluation uses the running averages; running_var holds the unbiased variance, as torch's does.

    gamma_init: where a learned γ starts. gamma: a fixed γ (with learn_gamma=False; γ is then a buffer).
    learn_beta=False leaves β out. affine=False leaves out both.

    Pitfalls: The output of a sample depends on the samples beside it, so small batches add noise, and
    evaluation is another function than training. With affine=False a ReLU behind it passes about half of
    every channel, whatever is learned. A bias before it is dead.

    Raises BadInput for options that contradict each other, and ValueError in training on one value a channel.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        gamma_init: float = 1.0,
        learn_gamma: bool = True,
        gamma: float | None = None,
        learn_beta: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        if gamma is not None and learn_gamma:
            raise BadInput(
                f"gamma={gamma!r} fixes the scale: add learn_gamma=False, or give gamma_init to a learned one"
            )
        if not affine and (gamma is not None or gamma_init != 1.0):
            raise BadInput("affine=False leaves no scale to set; leave out gamma and gamma_init")
        self.gamma_init = gamma_init
        self.learn_gamma = learn_gamma
        self.gamma = gamma
        self.learn_beta = learn_beta
        scale = torch.full((num_features,), float(gamma_init if gamma is None else gamma))
        if affine and learn_gamma:
            self.weight = torch.nn.Parameter(scale)
        elif affine:
            del self.weight
            self.register_buffer("weight", scale)
        if not learn_beta:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize_by_batch(x) if self.training else self.normalize_by_averages(x)
