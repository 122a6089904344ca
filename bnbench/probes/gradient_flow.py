"""Gradient flow: how the gradient's norm changes from layer to layer on the way back."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import Loss, leaving_no_trace, loss_of, norm_of, run_and_watch, train_mode
from bnbench.probes.trace import Reading

#: So many layers at each end are no part of the slope, where enough are left.
DROPPED_LAYERS = 2


@leaving_no_trace
def measure_gradient_flow(model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss | None = None) -> Reading:
    """The norm of the gradient by layer, and the factor by which it grows from a layer to the one below.

    For a_l = W_l h_{l−1} + b_l, the outputs of the linear maps and convolutions in the order in which they
    run, l = 1 … L without the output layer, and the mean loss of the batch in training mode:

        g_l = ‖∂loss/∂a_l‖_F,   factor = exp(−slope),

    with the slope of the least-squares line through (l, log g_l), two layers dropped at each end where at
    least three are left. A factor above 1 explodes backwards, below 1 vanishes. `log_factor` is its
    logarithm, `ratio_range` the largest over the smallest ‖∂loss/∂W_l‖_F / ‖W_l‖_F, both NaN where a
    gradient is zero or not finite.

    Series by layer: `gradient` (g_l), `weight_gradient` (‖∂loss/∂W_l‖_F) and `ratio`.
    Source: Yang et al. 2019 (arXiv:1902.08129), whose Theorem 8 predicts the factor at initialization.
    """
    train_mode(model)
    output, layers = run_and_watch(model, x)
    hidden = layers[:-1] or layers
    # Reparametrized weights have no leaf of their own: the slope of what they compute does.
    weights = [layer.module.weight for layer in hidden]
    value = loss_of(model, loss)(output, y)
    outputs: list[Any] = [layer.output for layer in hidden]
    parameters = {id(p): p for p in model.parameters() if p.requires_grad}
    own = [w if id(w) in parameters else None for w in weights]
    wanted = [*outputs, *(w for w in own if w is not None)]
    found = torch.autograd.grad(value, wanted, materialize_grads=True)
    gradients = [norm_of([g]) for g in found[: len(hidden)]]
    rest = iter(found[len(hidden) :])
    weight_gradients = [math.nan if w is None else norm_of([next(rest)]) for w in own]
    sizes = [norm_of([w]) if isinstance(w, Tensor) else math.nan for w in weights]
    ratios = [g / s if s else math.nan for g, s in zip(weight_gradients, sizes, strict=True)]
    slope = _slope(gradients)
    usable = [r for r in ratios if math.isfinite(r) and r > 0]
    return Reading(
        {
            "factor": math.exp(-slope),
            "log_factor": -slope,
            "ratio_range": max(usable) / min(usable) if len(usable) == len(ratios) else math.nan,
        },
        {"gradient": tuple(gradients), "weight_gradient": tuple(weight_gradients), "ratio": tuple(ratios)},
        "layer",
        tuple(layer.name for layer in hidden),
    )


def _slope(gradients: list[float]) -> float:
    """The least-squares slope of log g_l on l; NaN where a g_l has no logarithm or there is one layer."""
    dropped = DROPPED_LAYERS if len(gradients) >= 2 * DROPPED_LAYERS + 3 else 0
    inner = gradients[dropped : len(gradients) - dropped]
    if len(inner) < 2 or not all(math.isfinite(g) and g > 0 for g in inner):
        return math.nan
    return statistics.linear_regression(range(len(inner)), [math.log(g) for g in inner]).slope


@probe("gradient_flow", passes=3, paper="arXiv:1902.08129")
class GradientFlow(Probe):
    """Gradient norms by layer and their growth factor; see :func:`measure_gradient_flow`."""

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_gradient_flow(model, x, y, loss=self.given_loss)
