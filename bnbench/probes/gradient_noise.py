"""Gradient noise scale: how large a batch must be for its gradient to be more signal than noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.batches import training_batches
from bnbench.probes.passes import Loss, gradients_at, leaving_no_trace, loss_of, train_mode
from bnbench.probes.trace import Reading


@leaving_no_trace
def measure_gradient_noise(
    model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int, loss: Loss | None = None
) -> Reading:
    """The simple noise scale of the gradient, from the gradients of whole batches in training mode.

    The samples are cut into K batches of b = batch_size, in their order. With their gradients g_k, the mean
    g of these, which is the gradient of B = K b samples, and s = mean ‖g_k‖²,

        |G|² = (B ‖g‖² − b s) / (B − b),   trace = (s − ‖g‖²) / (1/b − 1/B),   noise_scale = trace / |G|²

    in samples: the first two are unbiased estimates of the squared norm of the expected gradient and of
    tr Σ, Σ the covariance of the gradient of one sample. `gradient_norm` is |G|; it and the scale are NaN
    where the estimate of |G|² is not above 0, since the samples are too few to see the gradient. A ratio of
    noisy estimates is biased: to average over readings, average `trace` and `gradient_norm`² by themselves.

    No sample has a gradient of its own where a norm depends on the batch; with it G is the gradient that
    batches of this size have on average, and Σ is b times the covariance of theirs. Dropout draws anew for
    each batch, as in training, and is part of the noise.
    Raises BadInput where there are fewer than two batches of samples.
    Source: McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1; that all K batches have a part in s is
    ours.
    """
    batches = training_batches("gradient_noise", x, batch_size)
    train_mode(model)
    targets = training_batches("gradient_noise", y, batch_size)
    sums: list[Tensor] = []
    squares = []
    for inputs, target in zip(batches, targets, strict=True):
        _, gradients = gradients_at(model, inputs, target, loss_of(model, loss))
        squares.append(_square(gradients))
        sums = [total + g for total, g in zip(sums, gradients, strict=True)] if sums else gradients
    small = torch.stack(squares).mean().item()
    large = _square(sums).item() / len(batches) ** 2
    samples = batch_size * len(batches)
    signal = (samples * large - batch_size * small) / (samples - batch_size)
    trace = (small - large) / (1 / batch_size - 1 / samples)
    return Reading(
        {
            "noise_scale": trace / signal if signal > 0 else math.nan,
            "gradient_norm": math.sqrt(signal) if signal > 0 else math.nan,
            "trace": trace,
        }
    )


def _square(tensors: list[Tensor]) -> Tensor:
    """The squared norm of all numbers together, in float64, left on the device."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


@probe("gradient_noise", passes=12, batches=8, paper="arXiv:1812.06162")
class GradientNoise(Probe):
    """The simple noise scale and its two parts; see :func:`measure_gradient_noise`."""

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_gradient_noise(model, x, y, batch_size=moment.batch_size, loss=self.given_loss)
