"""Evaluation of a model in training: loss, accuracy and calibration on arrays in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from bnbench.data import Arrays, eval_batches

EVAL_BATCH = 1024


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def logits_of(model: nn.Module, arrays: Arrays) -> Tensor:
    """Logits of all samples in eval mode, in float32 or wider."""
    with evaluating(model):
        parts = [model(x) for x, _ in eval_batches(arrays, EVAL_BATCH)]
    logits = torch.cat(parts)
    return logits if logits.dtype == torch.float64 else logits.float()


def scores(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Mean cross-entropy in nats (`loss`) and accuracy (`acc`)."""
    return {
        "loss": F.cross_entropy(logits, y).item(),
        "acc": (logits.argmax(1) == y).double().mean().item(),
    }


def calibration_error(logits: Tensor, y: Tensor) -> float:
    """Expected calibration error over 15 bins (Guo et al., 2017, eq. 3)."""
    # Probabilities, since torchmetrics takes logits that happen to lie within [0, 1] for such.
    return float(multiclass_calibration_error(logits.softmax(1), y, logits.shape[1], n_bins=15))


def finite_or_worst(values: dict[str, float], num_classes: int, last_loss: float) -> dict[str, float]:
    """The scores, or what a diverged run is given: accuracy 1/K, NLL max(log K, the last finite one)."""
    if all(math.isfinite(value) for value in values.values()):
        return values
    return worst_scores(num_classes, last_loss)


def worst_scores(num_classes: int, last_loss: float) -> dict[str, float]:
    """What a diverged run scores: accuracy 1/K and NLL max(log K, the last finite training loss)."""
    floor = math.log(num_classes)
    return {"loss": max(floor, last_loss) if math.isfinite(last_loss) else floor, "acc": 1 / num_classes}
