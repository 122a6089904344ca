"""What rows will cost: measured by a few steps of each shape, or known from rows that were trained before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import BrokenExecutor, Executor
from pathlib import Path

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
    free = Trial()
    changes = {"lr": 0.1, "data_seed": 0, "seed": 0, "steps": 1, "score_on": "val", "curve_points": 0}
    changes |= {name: getattr(free, name) for name in ("momentum", "weight_decay", "warmup", "schedule")}
    changes |= {
        name: getattr(free, name)
        for name in (
            "init",
            "init_scale",
            "label_noise",
            "label_smoothing",
            "decay_norm",
            "order",
            "dropout_at",
        )
    }
    # Dropping units costs little beside the rest, and would double the shapes of a search.
    changes["dropout"] = 0.0
    changes["norm_options"] = {k: v for k, v in trial.norm_options.items() if k != "gamma_init"}
    return json.dumps(trial.replace(**changes).changed(), sort_keys=True)


def _work(trial: Trial) -> float:
    """The row's work in training steps: its steps, and its evaluations in the same unit."""
    batch = trial.batch_size
    curve = trial.curve_points * 1512 * _FORWARD_SHARE / batch
    final = (7000 if trial.score_on == "val" else 19000) * _FORWARD_SHARE / batch
    return trial.steps + curve + final


def known_costs(record: Record) -> dict[str, float]:
    """Seconds a unit of work, by shape, from what the record has."""
    sums: dict[str, tuple[float, float]] = {}
    for trial, result in record.rows():
        if result.status == "done":
            seconds, work = sums.get(shape_of(trial), (0.0, 0.0))
            total = result.metrics["time/total_s"]
            sums[shape_of(trial)] = (seconds + total, work + _work(trial))
    return {shape: seconds / work for shape, (seconds, work) in sums.items()}


def measure_costs(
    trials: Iterable[Trial], known: Mapping[str, float], executor: Executor, data: Path, runs: Path
) -> dict[str, float]:
    """Seconds a unit of work for every shape among the trials; unknown ones train for a few steps.

    A shape whose rows are hardly longer than that is not tried: to find out would cost more than it tells.
    """
    costs = dict(known)
    shapes = {shape_of(trial): trial for trial in trials if trial.steps > 2 * _PROBE_STEPS}
    probes = {
        shape: trial.replace(
            steps=_PROBE_STEPS,
            score_on="val",
            curve_points=0,
            data_seed=0,
            seed=0,
            lr=1e-3,
            # A plan needs no download: a stand-in of the same shape costs as much.
            data_options={**trial.data_options, **DATASETS[trial.data].offline},
        )
        for shape, trial in shapes.items()
        if shape not in costs
    }
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
            costs[shape] = _seconds_a_unit(probes[shape], future.result())
    return costs


def _seconds_a_unit(probe: Trial, result: Result) -> float:
    return max(result.metrics.get("time/step_ms", 1.0) / 1000, 1e-4)


#: Seconds that any row takes beside its steps: building, evaluating, the Trainer.
ROW_OVERHEAD = 0.02


def seconds_of(trial: Trial, costs: Mapping[str, float]) -> float:
    """The expected seconds of a row on one worker."""
    return ROW_OVERHEAD + _work(trial) * costs.get(shape_of(trial), 2e-3)
