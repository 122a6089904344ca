"""Weights: their norms, and the learning rate that their norms leave effective behind a norm layer."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import leaving_no_trace, run_and_watch, train_mode
from bnbench.probes.trace import Reading


@leaving_no_trace
def measure_weights(model: nn.Module, x: Tensor, y: Tensor, *, lr: float = math.nan) -> Reading:
    """The norm ‖W_l‖_F of each linear map and convolution, and the effective learning rate lr / ‖W_l‖_F².

    Where the output does not depend on the length of W_l, a step of size lr turns its direction by as much as
    a step of lr / ‖W_l‖² would at unit length. That holds for layers whose output goes straight into a norm
    with the trait `scale_invariant` (batch, layer, group norm and their kin; the smaller its eps, the
    better); elsewhere the number means nothing. Momentum μ makes both 1 / (1 − μ) times as large. A
    reparametrized weight is taken as it is computed.

    `norm` is that of all these weights together, `effective_lr` the geometric mean over all layers but the
    output layer, which no norm follows; NaN without a learning rate or where a weight is zero or not finite.
    The series have both for every layer, in the order in which they run.
    Sources: van Laarhoven 2017 (arXiv:1706.05350); Hoffer et al. 2018 (arXiv:1803.01814).
    """
    train_mode(model)
    with torch.no_grad():
        _, layers = run_and_watch(model, x)
        weights = [cast(Tensor, layer.module.weight) for layer in layers]
        sizes = torch.stack([torch.linalg.vector_norm(weight.double()) for weight in weights]).tolist()
    effective = [lr / size**2 if size > 0 else math.nan for size in sizes]
    hidden = [math.log(size) if size > 0 else math.nan for size in sizes[:-1] or sizes]
    return Reading(
        {"norm": math.hypot(*sizes), "effective_lr": lr * math.exp(-2 * math.fsum(hidden) / len(hidden))},
        {"norm": tuple(sizes), "effective_lr": tuple(effective)},
        "layer",
        tuple(layer.name for layer in layers),
    )


@probe("weights", passes=2, paper="arXiv:1706.05350")
class Weights(Probe):
    """Weight norms and effective learning rates; see :func:`measure_weights`."""

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_weights(model, x, y, lr=moment.lr)
