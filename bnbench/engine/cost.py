"""What rows will cost: measured by a few steps of each shape, or known from rows that were trained before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bnbench.data import DATASETS
from bnbench.engine.conduct import train_row
from bnbench.record import Record
from bnbench.study.table import Result
from bnbench.study.trial import Trial

_PROBE_STEPS = 24
#: An evaluated sample costs about this share of a trained one.
_FORWARD_SHARE = 0.15


def shape_of(trial: Trial) -> str:
    """Rows with the same text cost the same a step: they differ in numbers that change no amount of work."""
    free = (
        *("momentum", "weight_decay", "decay_norm", "warmup", "schedule", "init", "init_scale"),
        # Dropping units costs little beside the rest, and would double the shapes of a search.
        *("label_noise", "label_smoothing", "order", "dropout", "dropout_at"),
    )
    changes: dict[str, Any] = {name: getattr(Trial(), name) for name in free}
    changes |= {"lr": 0.1, "data_seed": 0, "seed": 0, "steps": 1, "score_on": "val", "curve_points": 0}
    changes["norm_options"] = {k: v for k, v in trial.norm_options.items() if k != "gamma_init"}
    return json.dumps(trial.replace(**changes).changed(), sort_keys=True)


@dataclass(frozen=True)
class Cost:
    """What a row of some shape takes: seconds a training step, and seconds beside its steps."""

    step: float
    beside: float


Costs = Mapping[str, Cost]
#: Of a shape that nobody has measured.
GUESS = Cost(step=2e-3, beside=0.1)


def _evaluations(trial: Trial) -> float:
    """What a row evaluates on the way and on test data, in the time of training steps."""
    samples = trial.curve_points * 1512 + (12000 if trial.score_on == "test" else 0)
    return samples * _FORWARD_SHARE / trial.batch_size


def _cost_of(trial: Trial, result: Result) -> Cost:
    step = result.metrics["time/step_ms"] / 1000
    return Cost(step, max(0.0, result.metrics["time/total_s"] - (trial.steps + _evaluations(trial)) * step))


def known_costs(record: Record) -> dict[str, Cost]:
    """The cost of every shape that the record has."""
    found: dict[str, list[Cost]] = {}
    for trial, result in record.rows():
        if result.status == "done":
            found.setdefault(shape_of(trial), []).append(_cost_of(trial, result))
    return {
        shape: Cost(fmean(cost.step for cost in costs), fmean(cost.beside for cost in costs))
        for shape, costs in found.items()
    }


def probe_of(trial: Trial, steps: int) -> Trial:
    """A row of the same shape that trains for a few steps and needs no download."""
    return trial.replace(
        steps=steps,
        score_on="val",
        curve_points=0,
        data_seed=0,
        seed=0,
        lr=1e-3,
        data_options={**trial.data_options, **DATASETS[trial.data].offline},
    )


def measure_costs(
    trials: Iterable[Trial], known: Costs, executor: Executor, data: Path, runs: Path
) -> dict[str, Cost]:
    """The cost of every shape among the trials; unknown ones train for a few steps.

    A shape whose rows are hardly longer than that is not tried: to find out would cost more than it tells.
    """
    costs = dict(known)
    shapes = {shape_of(trial): trial for trial in trials if trial.steps > 2 * _PROBE_STEPS}
    probes = {shape: probe_of(trial, _PROBE_STEPS) for shape, trial in shapes.items() if shape not in costs}
    task: Callable[..., Result] = train_row  # `devices` is for the executor
    places = str(data.absolute()), str(runs.absolute())
    # Two rounds: the first one of each pays for loading the data and warming up.
    for _ in range(2):
        futures = {
            shape: executor.submit(task, probe.as_dict(), *places, devices=probe.devices)
            for shape, probe in probes.items()
        }
        for shape, future in futures.items():
            if isinstance(future.exception(), BrokenExecutor):
                continue  # the study itself will say by name which row kills its worker
            if (result := future.result()).status != "failed":
                costs[shape] = _cost_of(probes[shape], result)
    return costs


def seconds_of(trial: Trial, costs: Costs) -> float:
    """The expected seconds of a row, on all its devices together."""
    cost = costs.get(shape_of(trial), GUESS)
    return trial.devices * (cost.beside + (trial.steps + _evaluations(trial)) * cost.step)
