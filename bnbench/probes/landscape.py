"""Landscape: how the loss and its gradient change along the step that gradient descent takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import (
    Loss,
    check_relative_step,
    gradients_at,
    leaving_no_trace,
    loss_of,
    norm_of,
    train_mode,
    untouched,
    weights_of,
)
from bnbench.probes.trace import Reading

#: The points looked at, in steps of gradient descent.
MULTIPLES = (0.5, 1.0, 2.0, 4.0)


@leaving_no_trace
def measure_landscape(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float = math.nan,
    relative_step: float = 0.01,
    loss: Loss | None = None,
) -> Reading:
    """The variation of the loss, the predictiveness of the gradient and the effective β-smoothness.

    For the mean loss L of the batch in training mode, θ all learned parameters, g = ∇L(θ), the step size η
    and k ∈ {½, 1, 2, 4}:

        loss_range     = max_k L(θ − kηg) − min_k L(θ − kηg)
        predictiveness = max_k ‖∇L(θ − kηg) − g‖ / ‖g‖      (0: the gradient does not change)
        beta           = max_k ‖∇L(θ − kηg) − g‖ / (kη‖g‖)

    with η = lr, and with the suffix `_common` at η = relative_step · ‖θ‖ / ‖g‖, so that a step is the same
    share of ‖θ‖ in networks with different learning rates. Every point has the same random draws (dropout)
    and starts from the same buffers. NaN are ratios to a zero gradient, values at a step that is 0 or not
    given, and values over a loss or a gradient that is not finite.

    Series by k: `loss` (L(θ − kηg), nats for cross-entropy), `distance` (‖∇L(θ − kηg) − g‖), and both with
    `_common`. Raises BadInput unless relative_step is positive and finite.
    Source: Santurkar et al. 2018 (arXiv:1805.11604), section 3.2; the common step is ours.
    """
    check_relative_step("landscape", relative_step)
    train_mode(model)
    loss = loss_of(model, loss)
    with untouched(model):
        _, gradients = gradients_at(model, x, y, loss)
    # Ratios to a zero gradient are NaN.
    slope = norm_of(gradients) or math.nan
    common = relative_step * norm_of(weights_of(model)) / slope
    values: dict[str, float] = {}
    series: dict[str, tuple[float, ...]] = {}
    for suffix, size in (("", lr), ("_common", common)):
        step = size if 0 < size < math.inf else math.nan
        points = [_look_at(model, x, y, loss, gradients, k * step) for k in MULTIPLES]
        losses, distances = zip(*points, strict=True)
        values[f"loss_range{suffix}"] = _largest(losses) - min(losses)
        values[f"predictiveness{suffix}"] = _largest([d / slope for d in distances])
        ways = [k * step * slope for k in MULTIPLES]
        values[f"beta{suffix}"] = _largest([d / way for d, way in zip(distances, ways, strict=True)])
        series[f"loss{suffix}"], series[f"distance{suffix}"] = losses, distances
    return Reading(values, series, "step size", MULTIPLES)


def _look_at(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, gradients: list[Tensor], step: float
) -> tuple[float, float]:
    """The loss at θ − step·g, and how far the gradient there is from g."""
    if math.isnan(step):
        return math.nan, math.nan
    # Each point by itself, so that what a forward pass leaves in buffers does not meet the next one.
    with untouched(model):
        with torch.no_grad():
            for weight, gradient in zip(weights_of(model), gradients, strict=True):
                weight.sub_(gradient, alpha=step)
        value, there = gradients_at(model, x, y, loss)
        return value.item(), norm_of([a - b for a, b in zip(there, gradients, strict=True)])


def _largest(numbers: Sequence[float]) -> float:
    return max(numbers) if all(map(math.isfinite, numbers)) else math.nan


@probe("landscape", passes=20, paper="arXiv:1805.11604")
class Landscape(Probe):
    """Loss range, gradient predictiveness and β-smoothness along a step; see :func:`measure_landscape`."""

    def __init__(self, *, relative_step: float = 0.01, **schedule: Any) -> None:
        check_relative_step("landscape", relative_step)
        super().__init__(**schedule)
        self.relative_step = relative_step

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_landscape(
            model, x, y, lr=moment.lr, relative_step=self.relative_step, loss=self.given_loss
        )
