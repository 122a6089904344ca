"""Evaluation of a model in training: loss, accuracy, calibration and temperature on arrays in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from bnbench.data import Arrays, eval_batches
from bnbench.models import norm_scales

EVAL_BATCH = 1024
HOTTEST = 20.0  # a fitted temperature lies between 1 / HOTTEST and HOTTEST


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode is put back."""
    in_training = [module for module in model.modules() if module.training]
    if in_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True


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


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The temperature T in [1/20, 20] that minimizes the NLL of logits / T (Guo et al., 2017, section 4.2).

    In b = 1/T the NLL is convex: its slope is the mean of E[z] − z_y and its curvature that of Var[z], both
    under softmax(b·z). Newton's steps from b = 1, and where one leaves the bracket, the middle of the bracket
    on the logarithm of b; in float64. T is 1 where the logits are not finite or the NLL does not depend on T.
    """
    z = logits.detach().cpu().double()
    if not z.isfinite().all() or bool((z == z[:, :1]).all()):
        return 1.0
    right = z.gather(1, y.cpu()[:, None]).mean()

    def slope_and_curvature(b: float) -> tuple[float, float]:
        p = (b * z).softmax(1)
        mean = (p * z).sum(1, keepdim=True)
        return (mean.mean() - right).item(), (p * (z - mean).square()).sum(1).mean().item()

    low, high = 1 / HOTTEST, HOTTEST
    if slope_and_curvature(high)[0] <= 0:
        return 1 / high
    if slope_and_curvature(low)[0] >= 0:
        return 1 / low
    b = 1.0
    for _ in range(100):
        slope, curvature = slope_and_curvature(b)
        low, high = (low, b) if slope > 0 else (b, high)
        step = b - slope / curvature if curvature > 0 else math.inf
        last, b = b, step if low <= step <= high else math.sqrt(low * high)
        if abs(b - last) <= 1e-12 * b:
            break
    return 1 / b


def calibrated_losses(
    val: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """The temperature that suits the validation data, and the NLL in training and test at it.

    Each part is its logits (N, K) and labels (N).
    """
    temperature = fit_temperature(*val)
    found = {"val/temperature": temperature}
    for part, (logits, y) in (("train", train), ("test", test)):
        found[f"{part}/loss_calibrated"] = F.cross_entropy(logits.double() / temperature, y).item()
    return found


def scale_of_norms(model: nn.Module) -> dict[str, float]:
    """The root mean square of all scales γ of the norms, as `norm/gamma`; nothing where there are none."""
    scales = [scale.detach().flatten().double() for scale in norm_scales(model)]
    if not scales:
        return {}
    size = torch.cat(scales).square().mean().sqrt().item()
    return {"norm/gamma": size} if math.isfinite(size) else {}


def saved_for_backward(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> float:
    """The MiB that autograd keeps between a forward pass and its backward pass.

    That is what the operations save for their derivatives: every storage once and whole, without those of
    the tensors of `own`, such as weights, which are there anyway. What an `autograd.Function` keeps as an
    attribute instead of saving it is not seen.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # The graph lives until all is counted, so that no address is used twice.
        _graph = forward()
    return sum(saved.values()) / 2**20


def finite_or_worst(values: dict[str, float], num_classes: int, last_loss: float) -> dict[str, float]:
    """The scores, or what a diverged run is given: accuracy 1/K, NLL max(log K, the last finite one)."""
    if all(math.isfinite(value) for value in values.values()):
        return values
    return worst_scores(num_classes, last_loss)


def worst_scores(num_classes: int, last_loss: float) -> dict[str, float]:
    """What a diverged run scores: accuracy 1/K and NLL max(log K, the last finite training loss)."""
    floor = math.log(num_classes)
    return {"loss": max(floor, last_loss) if math.isfinite(last_loss) else floor, "acc": 1 / num_classes}
