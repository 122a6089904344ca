"""Switchable normalization (Luo et al., 2019)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from bnbench.norms.averages import BatchStatistics, count_values
from bnbench.norms.base import norm, per_channel, widen


def switchable_norm(x: Tensor, *, eps: float = 1e-5, **others: object) -> Tensor:
    positions = list(range(2, x.ndim))
    scopes = [[1, *positions], [0, *positions]] + ([positions] if positions else [])
    means = [x.mean(scope, keepdim=True) for scope in scopes]
    variances = [
        (x - mean).square().mean(scope, keepdim=True) for mean, scope in zip(means, scopes, strict=True)
    ]
    return (x - _average(means)) / (_average(variances) + eps).sqrt()


def _average(values: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values) / len(values)


@norm(
    "switchable",
    paper="arXiv:1806.10779",
    reference=switchable_norm,
    batch_dependent=True,
    running_stats=True,
    examples=({}, {"momentum": None}),
)
class SwitchableNorm(BatchStatistics):
    """Normalize by a learned mixture of the statistics of instance, layer and batch normalization.

    y = γ (x − Σ_k w_k μ_k) / √(Σ_k u_k σ_k² + eps) + β for x (N, C, *), with μ_k and the biased σ_k² of k = a
    channel of a sample (instance), a sample (layer), a channel over the batch (batch), in this order; w and u
    are the softmax of mean_weight and var_weight, three learned numbers each, all equal at first, and γ and β
    are a channel. Without spatial axes a channel of a sample is one value, and k is layer and batch alone.
    Evaluation has running_mean and running_var, the averages of the batch's μ and biased σ², for the batch.

    Pitfalls: evaluation still reads the sample itself, so the layer cannot be folded into the weights before
    it. An average over steps mixes statistics of earlier weights; recalibration gives those of the final
    weights, which the authors take too. A softmax never reaches 0: some weight stays on the batch, and with
    it the dependence on batch size.

    Raises ValueError in training on one value a channel.
    Source: Luo et al. 2019, section 3. Biased variances throughout, and running_var starts at 1; the authors'
    code has unbiased ones for instances, and running averages that start at 0.
    """

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        scopes = 3 if dim else 2
        self.mean_weight = nn.Parameter(torch.ones(scopes))
        self.var_weight = nn.Parameter(torch.ones(scopes))

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        means, variances = self._measure(wide)
        mean, var = self._mix(means, self.mean_weight), self._mix(variances, self.var_weight)
        scale = (var + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return ((wide - mean) * scale).to(x.dtype)
        weight, bias = per_channel(widen(self.weight), x), per_channel(widen(self.bias), x)
        return torch.addcmul(bias, wide - mean, weight * scale).to(x.dtype)

    def _measure(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Means and biased variances over an instance (with spatial axes), a layer and the batch.

        Those of larger scopes follow from the smallest by the law of total variance, so x is read once.
        """
        if x.ndim == 2:
            mean, var = x, torch.zeros_like(x)
        else:
            var, mean = torch.var_mean(x, [*range(2, x.ndim)], correction=0, keepdim=True)
        means, variances = ([mean], [var]) if len(self.mean_weight) == 3 else ([], [])
        means.append(mean.mean(1, keepdim=True))
        variances.append(var.mean(1, keepdim=True) + mean.var(1, correction=0, keepdim=True))
        if not self.training:
            means.append(per_channel(widen(self.running_mean), x))
            variances.append(per_channel(widen(self.running_var), x))
            return means, variances
        count_values(x)
        means.append(mean.mean(0))
        variances.append(var.mean(0) + mean.var(0, correction=0))
        self.update_averages(means[-1].flatten(), variances[-1].flatten())
        return means, variances

    @staticmethod
    def _mix(values: list[Tensor], weights: Tensor) -> Tensor:
        shares = widen(weights).softmax(0)
        mixed = shares[0] * values[0]
        for share, value in zip(shares[1:], values[1:], strict=True):
            mixed = mixed + share * value
        return mixed
