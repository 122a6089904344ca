"""Dead and saturated units: those whose activation function is stuck where it is flat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import is_linear_map, leaving_no_trace, run, train_mode, watching
from bnbench.probes.trace import Reading

#: A unit is dead that is positive for a smaller share of its inputs.
DEAD_BELOW = 1e-3
#: A unit is saturated that is in the flat part for a larger share of its inputs.
SATURATED_ABOVE = 0.95


@leaving_no_trace
def measure_dead_units(model: nn.Module, x: Tensor, y: Tensor) -> Reading:
    """The share of units that are dead, and of those that are saturated, in the activations of a batch.

    In training mode, over the samples and positions that a unit (a channel) sees:

        dead: P(a > 0) < 0.001, behind ReLU, ReLU6, GELU or SiLU, which are positive where their input is;
        saturated: P(|a| > 0.97) > 0.95 behind tanh, P(a < 0.05 or a > 0.95) > 0.95 behind a sigmoid.

    With fewer than 1,000 samples and positions a dead unit is one that is never positive, so of units that
    are seldom active a small batch shows too many. The values are the shares among all units behind a
    function of that kind, NaN where there is none; the series have the share by activation layer, NaN where
    its function is of the other kind. Activations are found where they are modules of torch, each call of one
    by itself; calls of functions such as `torch.relu` are not seen, and LeakyReLU, which never is flat, is
    left out. Units that are not finite make a share NaN.
    The thresholds are conventions of ours.
    """
    train_mode(model)
    calls: list[tuple[str, str, Tensor]] = []
    axis = 1

    def note_axis(name: str, module: nn.Module, *_: Any) -> None:
        nonlocal axis
        axis = -1 if isinstance(module, nn.Linear) else 1

    def note_call(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        kind, is_stuck = _KINDS[type(module)]
        # Judged at once, since what follows may change the output in place.
        units = output.movedim(axis, 0).flatten(1)
        stuck = is_stuck(units).to(units.dtype).masked_fill(units.isnan().any(1), math.nan)
        calls.append((kind, name, stuck))

    with (
        watching(model, is_linear_map, note_axis),
        watching(model, lambda module: type(module) in _KINDS, note_call),
        torch.no_grad(),
    ):
        run(model, x)
    return Reading(
        {kind: _share([stuck for own, _, stuck in calls if own == kind]) for kind in _NAMES},
        {
            kind: tuple(_share([stuck]) if own == kind else math.nan for own, _, stuck in calls)
            for kind in _NAMES
        },
        "layer",
        _labels([name for _, name, _ in calls]),
    )


def _is_dead(units: Tensor) -> Tensor:
    return (units > 0).sum(1) < DEAD_BELOW * units.shape[1]


def _is_saturated_tanh(units: Tensor) -> Tensor:
    return (units.abs() > 0.97).sum(1) > SATURATED_ABOVE * units.shape[1]


def _is_saturated_sigmoid(units: Tensor) -> Tensor:
    return ((units < 0.05) | (units > 0.95)).sum(1) > SATURATED_ABOVE * units.shape[1]


_NAMES = ("dead", "saturated")
#: By the type of an activation: which kind of stuck unit it may have, and which of units (C, inputs) are.
_KINDS: dict[type[nn.Module], tuple[str, Callable[[Tensor], Tensor]]] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU), ("dead", _is_dead)),
    nn.Tanh: ("saturated", _is_saturated_tanh),
    nn.Sigmoid: ("saturated", _is_saturated_sigmoid),
}


def _share(stuck: list[Tensor]) -> float:
    return torch.cat(stuck).double().mean().item() if stuck else math.nan


def _labels(names: list[str]) -> tuple[str, ...]:
    """The names, later calls of one module numbered from 2."""
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(labels)


@probe("dead_units", passes=2.5)
class DeadUnits(Probe):
    """Shares of dead and saturated units; see :func:`measure_dead_units`."""

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_dead_units(model, x, y)
