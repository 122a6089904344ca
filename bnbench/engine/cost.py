"""What rows will cost: measured by a few steps of each shape, or known from rows that were trained before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bnbench.data import DATASETS
from bnbench.engine.conduct import train_rows
from bnbench.engine.fleet import FLEET_SIZE
from bnbench.engine.rows import look_steps, probes_of
from bnbench.record import Record
from bnbench.study.table import Result
from bnbench.study.trial import Trial

_PROBE_STEPS = 24
#: An evaluated sample, which comes in large batches, costs about this share of what one more sample adds to a
#: step; half of a step of 64 samples does not depend on their number.
_FORWARD_SHARE = 0.3
_FIXED_SAMPLES = 64
#: Fields of a row that change no amount of work.
_FREE = {
    *("lr", "momentum", "weight_decay", "decay_norm", "gamma_decay", "warmup", "schedule", "steps"),
    *("init", "init_scale", "bias_init", "logit_scale", "label_noise", "label_smoothing"),
    # Dropping units costs little beside the rest, and would double the shapes of a search.
    *("order", "dropout", "dropout_at"),
    *("data_seed", "seed", "repeat", "score_on", "curve_points", "until_train_nll", "probes", "alone"),
}
#: And such options of norms.
_FREE_OPTIONS = ("eps", "momentum", "gamma_init", "gamma")


def shape_of(trial: Trial) -> str:
    """Rows with the same text cost the same a step: they differ in numbers that change no amount of work."""
    fields = {name: value for name, value in trial.changed().items() if name not in _FREE}
    for name in ("norm_options", "last_norm_options"):
        left = {k: v for k, v in fields.pop(name, {}).items() if k not in _FREE_OPTIONS}
        if left:
            fields[name] = left
    return json.dumps(fields, sort_keys=True)


@dataclass(frozen=True)
class Cost:
    """What a row of some shape takes: seconds a training step, and seconds beside its steps."""

    step: float
    beside: float


Costs = Mapping[str, Cost]

#: Seconds a step at batch 64, without a norm and with one, on one core of an idle machine of two (digits and
#: mnist1d; an mlp of depth 4, a cnn of depth 3 with 16 channels). Half of it does not depend on the batch.
_REFERENCE = {
    "mlp": (0.40e-3, 0.56e-3),
    "cnn": (1.0e-3, 1.4e-3),
    "resnet8": (3.6e-3, 5.0e-3),
    "resnet20": (8.9e-3, 12.3e-3),
}
_REFERENCE_DEPTH = {"mlp": 4, "cnn": 3}
_REFERENCE_WIDTH = {"mlp": ("width", 128), "cnn": ("channels", 16)}
#: A step costs as the width to this power (measured at widths 64 to 256 and batches of 64 to 512).
_WIDTH_POWER = 0.75
_OTHER_MODEL = (2e-3, 2e-3)
_BESIDE = 0.020
#: How many times as fast the steps of a row are in a fleet, and what is beside them.
_FLEET_SPEEDUP, _FLEET_BESIDE = 1.6, 0.016
#: What several processes add: to a step, to one with synchronized statistics, and to the rest.
_JOINED, _SYNCHRONIZED, _JOINING = 2e-3, 10e-3, 0.3


def reference_cost(trial: Trial) -> Cost:
    """The cost of a row whose shape nobody has measured here: measured elsewhere, or guessed."""
    plain, normalized = _REFERENCE.get(trial.model, _OTHER_MODEL)
    step = (plain if trial.norm == "none" else normalized) * (1 + trial.batch_size / _FIXED_SAMPLES) / 2
    if usual := _REFERENCE_DEPTH.get(trial.model):
        step *= trial.model_options.get("depth", usual) / usual
        option, width = _REFERENCE_WIDTH[trial.model]
        step *= (trial.model_options.get(option, width) / width) ** _WIDTH_POWER
    if trial.world_size == 1:
        in_fleet = Cost(step / _FLEET_SPEEDUP, _FLEET_BESIDE)
        return Cost(step, _BESIDE) if trial.backend == "single" else in_fleet
    joined = _SYNCHRONIZED if trial.norm == "sync_batch" else _JOINED
    return Cost(step + joined, _BESIDE + _JOINING)


def _evaluations(trial: Trial) -> float:
    """What a row evaluates on the way, by probes and on test data, in the time of training steps."""
    samples = trial.curve_points * 1512 + (12000 if trial.score_on == "test" else 0)
    samples += len(look_steps(trial)) * 1536
    probed = sum(len(probe.due_steps(trial.steps)) * probe.passes for probe in probes_of(trial))
    return samples * _FORWARD_SHARE / (_FIXED_SAMPLES + trial.batch_size) + probed


def _cost_of(trial: Trial, result: Result) -> Cost:
    step = result.metrics["time/step_ms"] / 1000
    steps = result.metrics.get("train/steps", trial.steps)
    return Cost(step, max(0.0, result.metrics["time/total_s"] - (steps + _evaluations(trial)) * step))


def known_costs(record: Record) -> dict[str, Cost]:
    """The cost of every shape that the record has."""
    found: dict[str, list[Cost]] = {}
    for trial, result in record.rows():
        if result.status == "done":
            found.setdefault(shape_of(trial), []).append(_cost_of(trial, result))
    return {shape: _mean(costs) for shape, costs in found.items()}


def _mean(costs: Sequence[Cost]) -> Cost:
    return Cost(fmean(cost.step for cost in costs), fmean(cost.beside for cost in costs))


def probe_of(trial: Trial, steps: int) -> Trial:
    """A row of the same shape that trains for a few steps and needs no download."""
    return trial.replace(
        steps=steps,
        score_on="val",
        curve_points=0,
        until_train_nll=None,
        probes={},
        data_seed=0,
        seed=0,
        lr=1e-3,
        data_options={**trial.data_options, **DATASETS[trial.data].offline},
    )


def rows_like(trial: Trial) -> list[Trial]:
    """What is trained to try a row: itself, or a whole fleet, which is never compiled, as that takes long."""
    if trial.backend == "single":
        return [trial]
    return [trial.replace(backend="eager", seed=trial.seed + number) for number in range(FLEET_SIZE)]


def measure_costs(
    trials: Iterable[Trial], known: Costs, executor: Executor, data: Path, runs: Path
) -> dict[str, Cost]:
    """The cost of every shape among the trials; unknown ones train for a few steps, alone or in a fleet.

    A shape whose rows are hardly longer than that is not tried: to find out would cost more than it tells.
    """
    costs = dict(known)
    shapes = {shape_of(trial): trial for trial in trials if trial.steps > 2 * _PROBE_STEPS}
    probes = {
        shape: rows_like(probe_of(trial, _PROBE_STEPS))
        for shape, trial in shapes.items()
        if shape not in costs
    }
    task: Callable[..., list[Result]] = train_rows  # `devices` is for the executor
    places = str(data.absolute()), str(runs.absolute())
    # Two rounds: the first one of each pays for loading the data and warming up. In a fleet that is little.
    for last in (False, True):
        futures = {
            shape: executor.submit(task, [row.as_dict() for row in rows], *places, devices=rows[0].devices)
            for shape, rows in probes.items()
            if last or len(rows) == 1
        }
        for shape, future in futures.items():
            if isinstance(future.exception(), BrokenExecutor):
                continue  # the study itself will say by name which row kills its worker
            pairs = zip(probes[shape], future.result(), strict=True)
            if found := [_cost_of(row, result) for row, result in pairs if result.status != "failed"]:
                costs[shape] = _mean(found)
    return costs


def seconds_of(trial: Trial, costs: Costs) -> float:
    """The expected seconds of a row, on all its devices together."""
    cost = costs.get(shape_of(trial)) or reference_cost(trial)
    return trial.devices * (cost.beside + (trial.steps + _evaluations(trial)) * cost.step)


def occupied_seconds(trial: Trial, costs: Costs, width: int) -> float:
    """The expected seconds of a row on all of `width` workers that cannot train another row meanwhile."""
    return seconds_of(trial, costs) * (width / trial.devices if trial.alone else 1)
