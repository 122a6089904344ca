"""Mean-only batch normalization (Salimans & Kingma, 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnbench.norms.averages import check_momentum, count_values, move_averages
from bnbench.norms.base import add_affine, channel_moments, norm, per_channel, show_options, widen


def mean_only_batch_norm(x: Tensor, **others: object) -> Tensor:
    return x - x.mean([0, *range(2, x.ndim)], keepdim=True)


@norm(
    "mean_only_batch",
    paper="arXiv:1602.07868",
    reference=mean_only_batch_norm,
    batch_dependent=True,
    running_stats=True,
    scale_invariant=False,
    centres=True,
    examples=({}, {"momentum": None}),
)
class MeanOnlyBatchNorm(nn.Module):
    """Subtract each channel's mean over the batch and all positions, and leave its scale as it is.

    y = x − μ + β; x and y are (N, C, *), μ is the mean of a channel over N and *, and β is learned, a number
    a channel. There is no γ: the scale is that of the weights before the layer, as in weight normalization.
    Evaluation puts running_mean in the place of μ. A training step moves running_mean (C) to
    (1 − momentum) running_mean + momentum μ.

    momentum: None averages all steps alike. affine=False leaves β out.

    Pitfalls: nothing holds the variance. Pair it with the reparametrization `weight_norm`, for which it was
    made, and with an initialization that suits the depth; alone, activations grow or fade from layer to
    layer. The gradient is centred too, but not scaled, so that learning rates are those of a network without
    norms.

    Raises BadInput for a momentum outside [0, 1], and ValueError in training on one value a channel.

    Source: Salimans & Kingma 2016, section 4.
    """

    running_mean: Tensor
    num_batches_tracked: Tensor
    bias: Tensor | None

    def __init__(
        self, num_features: int, dim: int = 2, *, momentum: float | None = 0.1, affine: bool = True
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = check_momentum(momentum)
        self.affine = affine
        add_affine(self, num_features, gamma=False, beta=affine)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    extra_repr = show_options

    def forward(self, x: Tensor) -> Tensor:
        wide, mean = widen(x), widen(self.running_mean)
        if self.training:
            count_values(x)
            mean = wide.mean([0, *range(2, x.ndim)])
            move_averages(self.momentum, self.num_batches_tracked, (self.running_mean, mean))
        y = wide - per_channel(mean, x)
        return (y if self.bias is None else y + per_channel(widen(self.bias), x)).to(x.dtype)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        return channel_moments(x)[:1]

    def set_moments(self, *means: Tensor) -> None:
        self.running_mean.copy_(means[0])
