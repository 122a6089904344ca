"""Generalization gap: how much worse a model is on data that it has not seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import Loss, leaving_no_trace, loss_of, run
from bnbench.probes.trace import Reading


@leaving_no_trace
def measure_generalization_gap(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    loss: Loss | None = None,
) -> Reading:
    """Loss and accuracy on held-out data minus those on training data (x, y), all in evaluation mode.

        loss_gap = loss(held out) − loss(x, y),   accuracy_gap = accuracy(held out) − accuracy(x, y);

    the first is positive and the second negative where the model does worse on what it has not seen. Norms
    use their running statistics, dropout is off. NaN without held-out data; the accuracy's also where the
    outputs are not scores (N, K) for classes (N). Both batches are samples: with n examples an accuracy has a
    standard error of up to 1 / (2√n).
    """
    model.eval()
    found = []
    with torch.no_grad():
        for inputs, targets in ((x, y), held_out) if held_out is not None else ():
            output = run(model, inputs)
            found.append((loss_of(model, loss)(output, targets).item(), _accuracy(output, targets)))
    if not found:
        return Reading({"loss_gap": math.nan, "accuracy_gap": math.nan})
    (seen_loss, seen_accuracy), (new_loss, new_accuracy) = found
    return Reading({"loss_gap": new_loss - seen_loss, "accuracy_gap": new_accuracy - seen_accuracy})


def _accuracy(output: Tensor, y: Tensor) -> float:
    if output.ndim != 2 or y.shape != output.shape[:1] or y.is_floating_point():
        return math.nan
    return (output.argmax(1) == y).double().mean().item()


@probe("generalization_gap", passes=2.5)
class GeneralizationGap(Probe):
    """Held-out minus training loss and accuracy; see :func:`measure_generalization_gap`."""

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_generalization_gap(model, x, y, held_out=moment.held_out, loss=self.given_loss)
