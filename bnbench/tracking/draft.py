"""What a run of MLflow holds: its name, tags, parameters, metrics and files. Pure functions."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from bnbench.probes import Trace
from bnbench.registry import BadInput
from bnbench.study.estimands import steps_to_target
from bnbench.study.programs import TUNING_SEEDS
from bnbench.study.space import Space, recall
from bnbench.study.table import Entry
from bnbench.study.trial import Trial
from bnbench.tracking.live import Live, Place

#: The most metrics of a run: MLflow's page gets slow with more.
MOST_METRICS = 15
#: The metrics of a training that MLflow shows. The others are in result.json.
METRICS = (
    "train/loss",
    "train/acc",
    "val/loss",
    "val/acc",
    "test/loss",
    "test/acc",
    "test/ece",
    "test/gap",
    "test/gap_calibrated",
    "norm/gamma",
    "train/steps",
    "steps_to_target",
    "time/step_ms",
    "time/total_s",
    "memory/peak_mib",
)
#: Those that make room where a row has probes, whose values a claim reads.
YIELDING = ("test/ece", "test/gap", "test/gap_calibrated", "norm/gamma", "memory/peak_mib")
CURVES = ("train/loss", "val/loss", "val/acc")
#: Shown of every training, at their defaults too.
PARAMS = (
    *("data", "model", "norm", "norm_options", "order", "lr", "batch_size", "weight_decay", "dropout"),
    *("steps", "seed", "devices", "num_nodes", "precision"),
)
#: MLflow's longest values, in characters.
LONGEST_PARAM, LONGEST_TAG = 6000, 8000


@dataclass(frozen=True)
class Definition:
    """A registered definition of a study; `registered` is in seconds since 1970."""

    study_hash: str
    registered: float
    values: Mapping[str, Any]

    @property
    def experiment(self) -> str:
        """The experiment of the study."""
        return f"bnbench/{self.values['name']}/{self.values['preset']}"

    @property
    def tuning(self) -> str:
        """The experiment of its searches."""
        return f"{self.experiment}/tuning"

    @cached_property
    def spaces(self) -> dict[tuple[str, str], Space]:
        """What is searched, by cell and arm; those that are not here are tuned over the grid."""
        return {
            (cell, arm): recall(space)
            for cell, arms in self.values.get("spaces", {}).items()
            for arm, space in arms.items()
        }

    @property
    def command(self) -> str:
        """What trains the study again."""
        return f"bnbench run {shlex.quote(self.values['name'])} --preset {self.values['preset']}"


class Point(NamedTuple):
    """One value of a metric; `time` in milliseconds since 1970, None for the time of sending."""

    key: str
    value: float
    time: int | None
    step: int


@dataclass(frozen=True)
class Draft:
    """A run as it should be; times in milliseconds since 1970.

    `files` are artifacts by path: a text, or a file or folder to copy.
    """

    name: str
    tags: Mapping[str, str]
    start: int
    end: int
    params: Mapping[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    files: Mapping[str, str | Path] = field(default_factory=dict)
    status: str = "FINISHED"


def place_name(definition: Definition, place: Place | Entry, number: int = 0) -> str:
    """The name of the run of a training or a grid: `cnn-mnist1d-batch-s3`, or `…-search1-t7`."""
    if is_point(definition, place):
        name = f"{search_title(place.cell, place.arm, place.role, place.replicate)}-t{number}"
        return f"{name}-data{_turn(place.replicate)}" if place.role == "shortlist" else name
    name = f"{_stem(place.cell, place.arm)}-s{place.replicate}"
    return f"{name}-common" if place.role == "common" else name


def search_title(cell: str, arm: str, role: str, replicate: int) -> str:
    """The name of the run of a search, or of the comparison of the best points of an arm's searches."""
    return f"{_stem(cell, arm)}-{'shortlist' if role == 'shortlist' else f'search{_turn(replicate)}'}"


def _stem(cell: str, arm: str) -> str:
    return f"{cell.replace(' · ', '-')}-{arm}"


def _turn(replicate: int) -> str:
    """Which of the repeated searches, from 1; `-s3` for the search of replicate 3."""
    return f"-s{replicate}" if replicate < TUNING_SEEDS else str(replicate - TUNING_SEEDS + 1)


def trial_params(trial: Trial, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """A row as MLflow parameters: the standard ones, those that differ from their defaults, and two sizes.

    `global_batch` is the samples of an optimizer step on all devices together. `nbs` is the normalization
    batch size: how many samples share one set of statistics. A value that is too long for MLflow is in the
    run's files, and says so.
    """
    names = set(PARAMS).union(trial.changed()).difference(leave_out)
    values = {name: value for name, value in trial.as_dict().items() if name in names}
    values["global_batch"] = trial.global_batch
    nbs = _normalization_batch_size(trial)
    if nbs is not None:
        values["nbs"] = nbs
    shown = {name: json.dumps(v) if isinstance(v, dict) else str(v) for name, v in values.items()}
    return {
        name: v if len(v) <= LONGEST_PARAM else "too long: see the artifacts" for name, v in shown.items()
    }


def training_draft(definition: Definition, entry: Entry, number: int = 0) -> Draft:
    """The run of one training, with its whole row in trial.json and all results in result.json.

    What probes measured is in probes.json. Their values are metrics too, in their order, until the run has
    `MOST_METRICS`; its note names the rest. `number` is the place of a point in its search.
    """
    start, end = span(entry)
    result, provenance = entry.result, entry.result.provenance
    last = int(result.metrics.get("train/steps", entry.trial.steps))
    # A point of the curve comes before the final metric of the same step, which MLflow shows as the latest.
    share = max(end - start - 1, 0) / last
    points = [
        Point(key, value, start + int(step * share), int(step))
        for key in CURVES
        for step, value in zip(result.curve.get("step", ()), result.curve.get(key, ()), strict=False)
    ]
    metrics = {**result.metrics, **_steps_to_target(definition, entry)}
    shown = [k for k in METRICS if k in metrics and not (result.traces and k in YIELDING)]
    points += [Point(k, metrics[k], end, last) for k in shown]
    room = MOST_METRICS - len({point.key for point in finite(points)})
    probed = _probe_points(result.traces, lambda step: start + int(step * share))
    points += [point for key in list(probed)[:room] for point in probed[key]]
    tags = {**place_tags(definition, entry, "training"), "bnbench.status": result.status}
    if is_point(definition, entry):
        tags["bnbench.trial"] = str(number)
    for name in ("git", "dirty", "world_size"):
        if name in provenance:
            tags[f"bnbench.{name}"] = str(provenance[name])
    if provenance.get("git"):
        tags["mlflow.source.git.commit"] = str(provenance["git"])
    outcome = {
        "status": result.status,
        "reason": result.reason,
        "metrics": dict(result.metrics),
        "curve": {key: list(values) for key, values in result.curve.items()},
        "provenance": dict(provenance),
    }
    files = {"trial.json": as_json(entry.trial.as_dict()), "result.json": as_json(outcome)}
    notes = [f"{result.status}: {result.reason}"] if result.status != "done" else []
    if result.traces:
        files["probes.json"] = as_json(result.plain_traces())
        if hidden := list(probed)[room:]:
            notes.append(f"Only in probes.json: {', '.join(hidden)}")
    if notes:
        tags["mlflow.note.content"] = "\n\n".join(notes)[:LONGEST_TAG]
    if result.status == "failed":
        files["traceback.txt"] = str(provenance.get("traceback", result.reason))
    return Draft(
        name=place_name(definition, entry, number),
        tags=tags,
        start=start,
        end=end,
        params=trial_params(entry.trial),
        points=finite(points),
        files=files,
        status="FAILED" if result.status == "failed" else "FINISHED",
    )


def _probe_points(traces: Mapping[str, Trace], when: Callable[[int], int]) -> dict[str, tuple[Point, ...]]:
    """The values of probes over the steps, by metric; those without a finite number are left out."""
    found = {}
    for probe, trace in traces.items():
        for name, numbers in trace.values.items():
            key = f"probe/{probe}/{name}"
            readings = zip(trace.steps, numbers, strict=False)
            points = finite(Point(key, number, when(step), step) for step, number in readings)
            if points:
                found[key] = points
    return found


def _steps_to_target(definition: Definition, entry: Entry) -> dict[str, float]:
    """The steps to the cell's registered target, where it has one and the training reached it."""
    target = definition.values["cells"][entry.cell]["constants"].get("target")
    if target is None or "step" not in entry.result.curve:
        return {}
    steps = steps_to_target(entry, target)
    return {} if steps is None else {"steps_to_target": steps}


def arm_draft(
    definition: Definition, entries: Sequence[Entry], decided: str, timed: Sequence[Entry] = ()
) -> Draft:
    """The run of an arm in a cell: mean over replicates with its 95 % interval (Student's t), step = n.

    Of a study that confirms these are the arm's own trainings on test data; of one that sweeps, the best
    of each grid on validation data. A diverged training counts with the scores that its record gives. `timed`
    are the rows that measured the time of a step alone.
    """
    cell, arm = entries[0].cell, entries[0].arm
    start, end = span(*entries)
    whole = [e for e in entries if e.result.status != "failed"]
    judged, split = [e for e in whole if e.role == "own"], "test"
    if not judged:
        grids: dict[int, list[Entry]] = {}
        for e in whole:
            if is_grid(definition, e) and "val/acc" in e.result.metrics:
                grids.setdefault(e.replicate, []).append(e)
        judged, split = [max(grid, key=lambda e: e["val/acc"]) for grid in grids.values()], "val"
    diverged = sum(e.result.status == "diverged" for e in judged)
    values: dict[str, float] = {"n": len(judged), "n_diverged": diverged}
    if judged:
        values["lr_median"] = statistics.median(e.trial.lr for e in judged)
    if alone := [e["time/step_ms"] for e in timed if "time/step_ms" in e.result.metrics]:
        values["step_ms_alone"] = statistics.median(alone)
    for key in (f"{split}/acc", f"{split}/loss"):
        seen = [x for e in judged if math.isfinite(x := e.result.metrics.get(key, math.nan))]
        if seen:
            values[f"{key}_mean"] = statistics.fmean(seen)
        if key.endswith("/acc") and (interval := _interval(seen)):
            values[f"{key}_low"], values[f"{key}_high"] = interval
    declared = Trial(**definition.values["cells"][cell]["arms"][arm])
    own = {"lr", "seed", "data_seed"}
    own.update(k for k, v in declared.as_dict().items() if any(getattr(e.trial, k) != v for e in entries))
    tags = {**place_tags(definition, entries[0], "arm"), "bnbench.status": "done"}
    if decided:
        tags["bnbench.verdict"] = decided[:LONGEST_TAG]
    points = [Point(key, value, end, len(judged)) for key, value in values.items()]
    params = trial_params(declared, leave_out=own)
    files: dict[str, str | Path] = {"arm.json": as_json(declared.as_dict())}
    return Draft(f"{cell} · {arm}", tags, start, end, params, finite(points), files)


def live_draft(definition: Definition, place: Place, live: Live) -> Draft:
    """The run of something that is being trained, before there is a result."""
    in_grid = is_grid(definition, place)
    tags = {**place_tags(definition, place, "grid" if in_grid else "training"), "bnbench.status": "running"}
    params = trial_params(place.trial, leave_out=("lr",) if in_grid else ())
    start = round(live.started * 1000)
    name = place_name(definition, place, place.number)
    return Draft(name, tags, start, start, params, status="RUNNING")


def live_points(live: Live, after: int) -> tuple[Point, ...]:
    """What a training has told behind a step."""
    return finite(
        Point(key, point[key], round(point["time"] * 1000), int(point["step"]))
        for point in live.points
        for key in CURVES
        if key in point and point["step"] > after
    )


def live_note(running: Sequence[tuple[Place, Live]]) -> str:
    """How far the trainings of a grid are: `lr 0.03: step 1200 of 8000, val/acc 0.71`."""
    lines = []
    for place, live in sorted(running, key=lambda one: (one[0].trial.lr, one[0].trial.key)):
        last = live.points[-1] if live.points else {"step": 0}
        score = f", val/acc {last['val/acc']:.3g}" if "val/acc" in last else ""
        lines.append(f"lr {place.trial.lr:g}: step {last['step']:g} of {place.trial.steps}{score}")
    return "\n\n".join(lines)[:LONGEST_TAG]


def is_grid(definition: Definition, place: Place | Entry) -> bool:
    """Whether a training is shown as a point of its grid's run rather than as a run."""
    return place.role in ("tune", "sweep") and not is_point(definition, place)


def is_point(definition: Definition, place: Place | Entry) -> bool:
    """Whether a training is a point of a search, shown as a run below that of the search."""
    tuned = place.role == "tune" and (place.cell, place.arm) in definition.spaces
    return tuned or place.role == "shortlist"


def place_tags(definition: Definition, place: Place | Entry, level: str) -> dict[str, str]:
    tags = {
        **study_tags(definition, level),
        "bnbench.cell": place.cell,
        "bnbench.arm": place.arm,
        "bnbench.backend": place.trial.backend,
        "bnbench.world_size": str(place.trial.world_size),
    }
    if level != "arm":
        tags |= {"bnbench.role": place.role, "bnbench.replicate": str(place.replicate)}
    if level == "training":
        tags["bnbench.key"] = place.trial.key
    return tags


def study_tags(definition: Definition, level: str) -> dict[str, str]:
    return {
        "bnbench.level": level,
        "bnbench.study": str(definition.values["name"]),
        "bnbench.preset": str(definition.values["preset"]),
        "bnbench.study_hash": definition.study_hash,
        "mlflow.source.name": definition.command,
        "mlflow.source.type": "LOCAL",
    }


def span(*entries: Entry) -> tuple[int, int]:
    """First start and last end of trainings, in milliseconds since 1970."""
    starts, ends = [], []
    for entry in entries:
        start = float(entry.result.provenance.get("started", 0.0))
        starts.append(start)
        ends.append(
            float(
                entry.result.provenance.get("finished", start + entry.result.metrics.get("time/total_s", 0.0))
            )
        )
    return round(min(starts) * 1000), round(max(ends) * 1000)


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    # Brings scipy, which is slow to import.
    from bnbench.study.stats import paired_t_interval

    return paired_t_interval(values, 0.95)


def _normalization_batch_size(trial: Trial) -> int | None:
    # Brings torch.
    from bnbench.norms import normalization_batch_size

    size = trial.global_batch if trial.norm == "sync_batch" else trial.batch_size
    try:
        return normalization_batch_size(trial.norm, size, **trial.norm_options)
    except BadInput:
        return None  # A norm of a package that is not installed here.


def finite(points: Iterable[Point]) -> tuple[Point, ...]:
    # MLflow would keep an infinity as 1.8e308; that a training diverged is a tag.
    return tuple(point for point in points if math.isfinite(point.value))


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
