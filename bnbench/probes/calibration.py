"""Calibration: whether a classifier is right as often as it says it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import leaving_no_trace, run
from bnbench.probes.trace import Reading
from bnbench.registry import BadInput

BINS = 15


@leaving_no_trace
def measure_calibration(model: nn.Module, x: Tensor, y: Tensor) -> Reading:
    """Expected calibration error, NLL, confidence and accuracy of a classifier on a batch, in eval mode.

    With the confidence c_i = max_k softmax(z_i)_k of the logits z (N, K), for classes y (N), and the examples
    in 15 bins of equal width by their confidence,

        ece = Σ_b (n_b / N) |accuracy_b − mean confidence_b|,   nll = −mean log softmax(z_i)_{y_i} in nats;

    `confidence` and `accuracy` are means over all. NaN where the logits are not finite. A few hundred
    examples at least: the error of a small batch is biased upwards. Raises BadInput where the outputs and
    targets are not such.
    Source: Guo et al. 2017 (arXiv:1706.04599), equation 3.
    """
    model.eval()
    with torch.no_grad():
        logits = run(model, x).double()
    if logits.ndim != 2 or logits.shape[1] < 2 or y.shape != logits.shape[:1] or y.is_floating_point():
        raise BadInput(
            "probe 'calibration' needs logits (N, K) of 2 or more classes and a class for each (N), not"
            f" outputs {tuple(logits.shape)} and targets {tuple(y.shape)} of {y.dtype}"
        )
    if not logits.isfinite().all():
        return Reading(dict.fromkeys(("ece", "nll", "confidence", "accuracy"), math.nan))
    # Probabilities, since torchmetrics takes logits that happen to lie within [0, 1] for such.
    probabilities = logits.softmax(1)
    confidence, guess = probabilities.max(1)
    return Reading(
        {
            "ece": multiclass_calibration_error(probabilities, y, logits.shape[1], n_bins=BINS).item(),
            "nll": F.cross_entropy(logits, y).item(),
            "confidence": confidence.mean().item(),
            "accuracy": (guess == y).double().mean().item(),
        }
    )


@probe("calibration", passes=2.5, paper="arXiv:1706.04599")
class Calibration(Probe):
    """Calibration on the held-out batch, or the sample where there is none; :func:`measure_calibration`."""

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_calibration(model, *(moment.held_out or (x, y)))
