"""The gap between training and evaluation: batch statistics, running averages and precise statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bnbench.norms import KeepsMoments
from bnbench.norms.base import channel_moments
from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.batches import evaluation_mode, outputs_by_batch, training_batches
from bnbench.probes.passes import leaving_no_trace, run, train_mode, untouched, watching
from bnbench.probes.trace import Reading

#: A variance below this share of the mean square is rounding: the unit is constant.
CONSTANT = 1e-12


@leaving_no_trace
@torch.no_grad()
def measure_eval_gap(model: nn.Module, x: Tensor, y: Tensor | None = None, *, batch_size: int) -> Reading:
    """How far a network in training is from the same network in evaluation, and why.

    The samples, cut into batches of `batch_size` in their order, have three outputs:

        f_batch:    by the statistics of their batch, dropout off,
        f_precise:  by the statistics of all of them (:func:`bnbench.norms.recalibrate` on the batches),
        f_EMA:      in evaluation as it is, by the running averages.

    With the output f of one of them, and p = softmax f,

        l2(f) = ‖f − f_precise‖ / ‖f_precise‖,   kl(f) = KL(p_precise ‖ p) in nats, the mean over samples:

    `variance_l2` and `variance_kl` are those of f_batch, the noise of the batch; `lag_l2` and `lag_kl`
    those of f_EMA, averages that are behind the weights, or of inputs with dropout. All four are 0 for a
    model without running statistics.

    Series by layer: `variance_shift`, for each norm with running statistics in the order in which they run,
    is the variance of a unit of its input in evaluation over that in training, dropout on; the geometric
    mean over units. Running averages are of the latter, so a norm with a shift s scales its input to a
    variance of s. Dropout with probability p directly before a norm, where activations have mean 0, gives
    1 − p. The value is that of the first norm, NaN where there is none; further up it has the shifts and
    lags of the norms below.

    y is not used. Raises BadInput where there are fewer than two batches.
    Source: Wu & Johnson 2021 (arXiv:2105.07576) for the statistics, Li et al. 2019 (arXiv:1801.05134) for
    the variance shift; the two parts and their measures are ours.
    """
    batches = training_batches("eval_gap", x, batch_size)
    with untouched(model):
        train_mode(model)
        _, in_training = _run_and_watch_norms(model, batches)
    evaluation_mode(model)
    # Without batch statistics one pass over all samples is the same, and cheaper.
    everything = torch.cat(batches)
    averaged, in_evaluation = _run_and_watch_norms(model, [everything])
    by_batch = torch.cat(outputs_by_batch(model, batches))
    precise = run(model, everything)
    shifts = [_shift(in_evaluation[name], in_training[name]) for name in in_evaluation]
    variance, lag = _distances(by_batch, precise), _distances(averaged, precise)
    return Reading(
        {
            "variance_l2": variance[0],
            "variance_kl": variance[1],
            "lag_l2": lag[0],
            "lag_kl": lag[1],
            "variance_shift": shifts[0] if shifts else math.nan,
        },
        {"variance_shift": tuple(shifts)},
        "layer",
        tuple(in_evaluation),
    )


def _run_and_watch_norms(
    model: nn.Module, batches: Sequence[Tensor]
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Outputs, and for each norm with running statistics the moments of its input in every batch."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(channel_moments(inputs[0]))

    with watching(model, _has_running_statistics, keep, before=True):
        return torch.cat([run(model, batch) for batch in batches]), seen


def _has_running_statistics(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.running_mean is not None
    return isinstance(module, KeepsMoments)


def _shift(evaluation: list[tuple[Tensor, Tensor]], training: list[tuple[Tensor, Tensor]]) -> float:
    """The ratio of two variances, the geometric mean over the units that are not constant."""
    variances, varies = [], []
    for moments in (evaluation, training):
        mean, square = (torch.stack(parts).mean(0) for parts in zip(*moments, strict=True))
        variances.append(square - mean.square())
        varies.append(variances[-1] > CONSTANT * square)
    logarithms = (variances[0] / variances[1]).log()
    return logarithms[varies[0] & varies[1]].mean().exp().item()


def _distances(output: Tensor, precise: Tensor) -> tuple[float, float]:
    """Relative l2 distance, and KL divergence from the precise one in nats."""
    output, precise = output.double(), precise.double()
    l2 = (output - precise).norm() / precise.norm()
    logs = (output.log_softmax(1), precise.log_softmax(1))
    return l2.item(), F.kl_div(*logs, log_target=True, reduction="batchmean").item()


@probe("eval_gap", passes=18, batches=8, paper="arXiv:2105.07576")
class EvalGap(Probe):
    """Variance part and lag part of the train–eval gap; see :func:`measure_eval_gap`."""

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_eval_gap(model, x, y, batch_size=moment.batch_size)
