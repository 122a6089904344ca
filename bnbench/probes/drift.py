"""Drift: how the distribution of each unit's activations moves while a network is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from bnbench.norms.base import widen
from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import leaving_no_trace, run_and_watch, train_mode
from bnbench.probes.trace import Reading
from bnbench.registry import BadInput

#: So many values of a unit are kept for the Wasserstein distance.
KEPT_VALUES = 512


class Activations(TypedDict):
    """The units of one layer on a batch: `mean` and `sd` (units,), and values in order (units, at most 512).

    sd is biased. A plain dictionary, so that checkpoints can have it.
    """

    mean: Tensor
    sd: Tensor
    ordered: Tensor


#: Activations by kind ("input" or "output" of a linear map) and by the name of the linear map.
Snapshot = Mapping[str, Mapping[str, Activations]]


@leaving_no_trace
def measure_activations(model: nn.Module, x: Tensor) -> dict[str, dict[str, Activations]]:
    """Statistics of the hidden units of a network on a batch, in training mode, by kind and layer.

    Kind "input" is what a linear map or convolution receives, after the norm and the activation below it,
    without the data that the first one receives; kind "output" is what it gives, before the norm above,
    without the logits. A unit is a feature or channel; samples and positions are its values. Of more than
    512 values all count in the mean and the sd, and the same 512 at random are kept in order.
    """
    train_mode(model)
    with torch.no_grad():
        _, layers = run_and_watch(model, x)
        return {
            "input": {layer.name: _summarize(layer.module, layer.input) for layer in layers[1:]},
            "output": {layer.name: _summarize(layer.module, layer.output) for layer in layers[:-1]},
        }


def _summarize(module: nn.Module, activations: Tensor) -> Activations:
    units_last = activations if isinstance(module, nn.Linear) else activations.movedim(1, -1)
    values = widen(units_last.flatten(0, -2).T)
    variance, mean = torch.var_mean(values, 1, correction=0)
    if values.shape[1] > KEPT_VALUES:
        generator = torch.Generator().manual_seed(0)
        kept = torch.randperm(values.shape[1], generator=generator)[:KEPT_VALUES]
        values = values[:, kept.to(values.device)]
    # NumPy sorts short rows several times as fast as torch does on a CPU, where they go anyway.
    ordered = torch.from_numpy(np.sort(values.cpu().numpy(), axis=1))
    return Activations(mean=mean.cpu(), sd=variance.sqrt().cpu(), ordered=ordered)


def _mean_drift(before: Activations, after: Activations) -> Tensor:
    return (after["mean"] - before["mean"]).abs() / before["sd"]


def _sd_drift(before: Activations, after: Activations) -> Tensor:
    return (after["sd"] / before["sd"]).log().abs()


def _wasserstein(before: Activations, after: Activations) -> Tensor:
    return (after["ordered"] - before["ordered"]).abs().mean(1) / before["sd"]


_MEASURES: dict[str, Callable[[Activations, Activations], Tensor]] = {
    "mean": _mean_drift,
    "sd": _sd_drift,
    "wasserstein": _wasserstein,
}


def compare_activations(before: Snapshot | None, after: Snapshot) -> Reading:
    """The drift between two snapshots of the same batch; see :func:`measure_drift`."""
    index = tuple(dict.fromkeys([*after["output"], *after["input"]]))
    series = {}
    for kind, now in after.items():
        then = now if before is None else before[kind]
        if _shapes(then) != _shapes(now):
            raise BadInput("probe 'drift': a snapshot is of another network, or of another number of samples")
        for name, measure in _MEASURES.items():
            moved = {layer: _mean_of_finite(measure(then[layer], now[layer])) for layer in now}
            known = {} if before is None else moved
            series[f"{kind}_{name}"] = tuple(known.get(layer, math.nan) for layer in index)
    values = {name: _mean_of_finite(torch.tensor(row, dtype=torch.float64)) for name, row in series.items()}
    return Reading(values, series, "layer", index)


def _shapes(layers: Mapping[str, Activations]) -> dict[str, torch.Size]:
    return {name: activations["ordered"].shape for name, activations in layers.items()}


def _mean_of_finite(numbers: Tensor) -> float:
    return numbers[numbers.isfinite()].double().mean().item()


def measure_drift(
    model: nn.Module, x: Tensor, y: Tensor | None = None, *, before: Snapshot | None = None
) -> Reading:
    """How far the activations of each hidden unit have moved since a snapshot of the same batch.

    For the values of a unit with mean m and standard deviation s in the snapshot, and m′ and s′ now,

        mean: |m′ − m| / s,   sd: |log(s′ / s)|,   wasserstein: W₁ / s,

    with W₁ the mean of |a′₍ₖ₎ − a₍ₖ₎| over the values in order, which is the 1-Wasserstein distance of the
    two samples. Each is averaged over the units of a layer, then over layers, for the two kinds of units of
    :func:`measure_activations`: `input_mean`, `input_sd`, `input_wasserstein`, and the same with `output`.
    Units whose drift is not finite are left out: those that are constant in the snapshot, and for `sd` those
    that are constant now. Random draws are those of the moment: noise in a layer's input is a part of it.

    Series: the same by layer, NaN for the input of the first linear map and the output of the last.
    All is NaN without a snapshot; y is not used. Raises BadInput for a snapshot of other layers or of another
    number of samples.
    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167) speak of the change in the distribution of a layer's
    inputs in training; these three measures of it are ours.
    """
    return compare_activations(before, measure_activations(model, x))


@probe("drift", passes=5, paper="arXiv:1502.03167")
class Drift(Probe):
    """Drift of activations since the reading before, NaN in the first; see :func:`measure_drift`.

    The number of steps between readings (`every`, `steps`) is part of the definition: compare what was
    measured with the same one.
    """

    _before: Snapshot | None = None

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        before, self._before = self._before, measure_activations(model, x)
        return compare_activations(before, self._before)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._before = state_dict["before"]
