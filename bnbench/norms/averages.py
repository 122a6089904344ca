"""Running averages of statistics: how a training step moves them, and what the norms that keep them share."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbench.norms.base import (
    add_affine,
    channel_moments,
    check_eps,
    check_share,
    per_channel,
    per_sample,
    set_mean_and_variance,
    show_options,
    widen,
)
from bnbench.registry import BadInput


def check_momentum(momentum: float | None) -> float | None:
    """Return momentum. Raises BadInput unless it is from 0 to 1, or None."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise BadInput(f"momentum must be a number from 0 to 1, or None, not {momentum!r}")
    return momentum


def count_values(x: Tensor) -> int:
    """How many values a channel of a training batch x (N, C, *) has. Raises ValueError for one or none."""
    count = x.numel() // x.shape[1]
    if count < 2:
        raise ValueError(f"training needs more than one value a channel, and the input is {tuple(x.shape)}")
    return count


@torch.no_grad()
def move_averages(momentum: float | None, steps: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """Count a training step, and move the average of each pair (average, batch) towards its batch, in place.

    It becomes (1 − momentum) average + momentum batch; momentum None averages all steps alike.
    """
    steps.add_(1)
    for average, batch in pairs:
        if momentum is None:
            average.add_((batch - average) / steps)
        else:
            average.mul_(1 - momentum).add_(batch, alpha=momentum)


def hold(values: Tensor) -> Tensor:
    """Return values that a compiled backward pass keeps, and does not compute anew.

    torch.compile may compute small tensors again in the backward pass, and then reads buffers that the
    forward pass has moved meanwhile (torch 2.13). It takes no operation again that it does not know.
    """
    held: Tensor = _copy_unknown(values) if torch.compiler.is_compiling() else values
    return held


@torch.library.custom_op("bnbench::hold", mutates_args=())
def _copy_unknown(values: Tensor) -> Tensor:
    return values.clone()


_copy_unknown.register_fake(torch.empty_like)
_copy_unknown.register_vmap(lambda info, in_dims, values: (_copy_unknown(values), in_dims[0]))


class BatchStatistics(nn.Module):
    """What the layers with batch statistics share: γ, β, running averages and evaluation by them.

    y = γ (x − running_mean) / √(running_var + eps) + β in evaluation, x (N, C, *). A training step moves
    an average by new = (1 − momentum) old + momentum batch; momentum None averages all steps alike.
    running_var holds the unbiased variance. State and names are those of torch.nn.BatchNorm.
    """

    num_features: int
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, num_features: int, *, eps: float, momentum: float | None, affine: bool) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.momentum = check_momentum(momentum)
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    extra_repr = show_options

    def normalize_by_batch(self, x: Tensor) -> Tensor:
        """Normalize by the statistics of x, and move the running averages towards them."""
        if self.momentum is not None and widen(self.running_mean) is self.running_mean:
            self.num_batches_tracked.add_(1)
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
            )
        # The kernel wants its rate as a number from the host, and 1 / num_batches_tracked is on the device;
        # it also keeps statistics in the type of the averages, and bfloat16 is too short for them.
        y, mean, var = self.normalize_chunks(x)
        self.update_averages(mean, var)
        return y

    def normalize_chunks(self, x: Tensor, chunks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize each channel of x (N, chunks · C, *) by itself, without touching the running averages.

        x holds chunks of a batch side by side. Returns the output, and the means and unbiased variances.
        """
        mean = torch.zeros_like(widen(self.running_mean)).repeat(chunks)
        var = torch.zeros_like(widen(self.running_var)).repeat(chunks)
        weight = None if self.weight is None else widen(self.weight).repeat(chunks)
        bias = None if self.bias is None else widen(self.bias).repeat(chunks)
        return F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps), mean, var

    def normalize_by_averages(self, x: Tensor) -> Tensor:
        """Normalize by the running averages."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def update_averages(self, mean: Tensor, var: Tensor) -> None:
        """Take one step's mean and unbiased variance into the running averages."""
        moved = (self.running_mean, mean), (self.running_var, var)
        move_averages(self.momentum, self.num_batches_tracked, *moved)

    def variance_over_batch(
        self, x: Tensor, mean: Tensor, var: Tensor, origin: Tensor | float = 0.0
    ) -> Tensor:
        """The biased variance of each channel over the batch, of which the running averages take their share.

        mean and var are the biased moments (N, C, 1, ...) of each channel of each sample of x (N, C, *), the
        means measured from an origin that the samples share. In evaluation it is running_var. The shape is
        that of var. Raises ValueError in training on one value a channel.
        """
        if not self.training:
            return per_sample(widen(self.running_var), x)
        count = count_values(x)
        variance = var.mean(0) + mean.var(0, correction=0)
        self.update_averages((origin + mean.mean(0)).flatten(), variance.flatten() * (count / (count - 1)))
        return variance.expand_as(var)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        return channel_moments(x)

    def set_moments(self, *means: Tensor) -> None:
        set_mean_and_variance(self, *means)


class ScaleAverages(nn.Module):
    """What norms share that divide by a scale other than the root of a variance.

    y = γ (x − μ) / (scale + eps) + β for x (N, C, *), with μ the mean of a channel over N and *, and the
    scale that `measure_scale` of the heir gives. A training step moves running_mean, from 0, and
    running_scale, from 1; evaluation is by these.
    """

    num_features: int
    running_mean: Tensor
    running_scale: Tensor
    num_batches_tracked: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.momentum = check_momentum(momentum)
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_scale", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    extra_repr = show_options

    @abstractmethod
    def measure_scale(self, centred: Tensor) -> Tensor:
        """The scale of each channel, from its values (N, C, *) less their mean."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        if self.training:
            count_values(x)
            mean, centred, scale = self._measure(wide)
            moved = (self.running_mean, mean), (self.running_scale, scale)
            move_averages(self.momentum, self.num_batches_tracked, *moved)
        else:
            centred = wide - per_channel(widen(self.running_mean), x)
            scale = widen(self.running_scale)
        if self.weight is None or self.bias is None:
            return (centred / per_channel(scale + self.eps, x)).to(x.dtype)
        slope = widen(self.weight) / (scale + self.eps)
        bias = per_channel(widen(self.bias), x)
        return torch.addcmul(bias, centred, per_channel(slope, x)).to(x.dtype)

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each channel's mean, x without it, and its scale."""
        mean = x.mean([0, *range(2, x.ndim)])
        centred = x - per_channel(mean, x)
        return mean, centred, self.measure_scale(centred)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        mean, _, scale = self._measure(x.detach().double())
        return mean, scale

    def set_moments(self, *means: Tensor) -> None:
        self.running_mean.copy_(means[0])
        self.running_scale.copy_(means[1])


class SquareAverage(nn.Module):
    """What norms share that evaluate by a running mean square: y = γ x / √(running_square + eps) + β.

    x is (N, C, *); running_square starts at 1. How training moves it is the heir's.
    """

    num_features: int
    running_square: Tensor
    num_batches_tracked: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, num_features: int, *, eps: float, momentum: float, affine: bool) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.momentum = check_share("momentum", momentum)
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.register_buffer("running_square", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    extra_repr = show_options

    def normalize_by_average(self, x: Tensor) -> Tensor:
        mean = torch.zeros_like(self.running_square)
        return F.batch_norm(x, mean, self.running_square, self.weight, self.bias, False, 0.0, self.eps)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        return channel_moments(x)[1:]

    def set_moments(self, *means: Tensor) -> None:
        self.running_square.copy_(means[0])
