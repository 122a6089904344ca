"""What a table of results says in a few numbers: curves, sweeps, pairs, means, and what went wrong."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bnbench.report.result import StudyResult
from bnbench.report.words import median_range, plain, spans
from bnbench.study.estimands import steps_to_target, stuck, usable_lr_width
from bnbench.study.stats import restricted_mean
from bnbench.study.table import Entry, Role
from bnbench.study.verdicts import Verdict

#: The fall below an arm's own best validation accuracy within which a learning rate counts as usable.
USABLE_MARGIN = 0.02


@dataclass(frozen=True)
class Band:
    """The median of some series and its interquartile range, by step."""

    steps: tuple[float, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Sweep:
    """A metric over the learning rate: each replicate's points, and their mean where there are any.

    `diverged` are the points whose training diverged.
    """

    replicates: Mapping[int, tuple[tuple[float, float], ...]]
    diverged: tuple[tuple[float, float], ...]
    mean: tuple[tuple[float, float], ...]
    usable: tuple[tuple[float, float], ...]


def score(entry: Entry, metric: str) -> float | None:
    """A metric of a row; the accuracy of a diverged row that has none is chance."""
    value = entry.result.metrics.get(metric)
    if value is None and entry.result.status == "diverged" and metric.endswith("/acc"):
        value = entry.result.metrics.get("chance")
    return value if value is not None and math.isfinite(value) else None


def learning_curve(entries: Iterable[Entry], metric: str = "val/acc") -> Band | None:
    """The band of a curve over replicates; a diverged row stays at chance after its last point."""
    series: list[tuple[dict[float, float], float | None]] = []
    for entry in entries:
        steps, values = entry.result.curve.get("step", ()), entry.result.curve.get(metric, ())
        points = {s: v for s, v in zip(steps, values, strict=False) if s >= 1 and math.isfinite(v)}
        after = entry.result.metrics.get("chance") if entry.result.status == "diverged" else None
        if points or after is not None:
            series.append((points, after))
    band: list[tuple[float, float, float, float]] = []
    for step in sorted({s for points, _ in series for s in points}):
        here = []
        for points, after in series:
            ended = after is not None and step > max(points, default=0.0)
            value = after if ended else points.get(step)
            if value is not None:
                here.append(value)
        low, high = _quartiles(here)
        band.append((step, low, statistics.median(here), high))
    return Band(*zip(*band, strict=True)) if band else None


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def sweep(entries: Sequence[Entry], metric: str = "val/acc") -> Sweep | None:
    """A metric over the grid of one arm in one cell."""
    by_replicate: dict[int, list[tuple[float, float]]] = {}
    by_lr: dict[float, list[float]] = {}
    lost: list[tuple[float, float]] = []
    for entry in sorted(entries, key=lambda e: e.trial.lr):
        value = score(entry, metric)
        if value is not None:
            by_replicate.setdefault(entry.replicate, []).append((entry.trial.lr, value))
            by_lr.setdefault(entry.trial.lr, []).append(value)
            if entry.result.status == "diverged":
                lost.append((entry.trial.lr, value))
    if not by_lr:
        return None
    mean = tuple((lr, statistics.fmean(values)) for lr, values in sorted(by_lr.items()))
    chance = next((e["chance"] for e in entries if "chance" in e.result.metrics), 0.0)
    threshold = max(max(value for _, value in mean) - USABLE_MARGIN, 1.5 * chance)
    replicates = {r: tuple(p) for r, p in sorted(by_replicate.items())}
    return Sweep(replicates, tuple(lost), mean, _above(mean, threshold))


def _above(points: Sequence[tuple[float, float]], threshold: float) -> tuple[tuple[float, float], ...]:
    """The stretches of lr where the points, joined by straight lines over log lr, reach a threshold."""
    stretches: list[tuple[float, float]] = []
    start: float | None = None
    for i, (lr, value) in enumerate(points):
        if i and (value >= threshold) != (points[i - 1][1] >= threshold):
            lr0, value0 = points[i - 1]
            crossing = lr0 * (lr / lr0) ** ((threshold - value0) / (value - value0))
            if start is None:
                start = crossing
            else:
                stretches.append((start, crossing))
                start = None
        elif not i and value >= threshold:
            start = lr
    if start is not None:
        stretches.append((start, points[-1][0]))
    return tuple(stretches)


def confirmed(result: StudyResult, cell: str) -> dict[str, dict[int, Entry]]:
    """The training that stands for an arm, by replicate: the confirmed one, or the best of a sweep's grid."""
    role: Role = "sweep" if result.study.program == "sweep" else "own"
    metric = score_metric(result)
    found: dict[str, dict[int, Entry]] = {}
    for arm in (a.name for a in result.design.arms_in(cell)):
        there: dict[int, Entry] = {}
        best: dict[int, float] = {}
        for entry in result.table.of(cell=cell, arm=arm, roles=(role,)):
            value = score(entry, metric)
            if value is not None and value > best.get(entry.replicate, -math.inf):
                there[entry.replicate], best[entry.replicate] = entry, value
        if there:
            found[arm] = there
    return found


def score_metric(result: StudyResult) -> str:
    """The accuracy by which a study's confirmed trainings, or the best of its grids, are shown."""
    return "val/acc" if result.study.program == "sweep" else "test/acc"


def paired_scores(result: StudyResult, cell: str) -> dict[str, dict[int, float]]:
    """Accuracy by arm and replicate: of the confirmed row, or the best of the grid in a sweep."""
    metric = score_metric(result)
    return {
        arm: {r: value for r, entry in there.items() if (value := score(entry, metric)) is not None}
        for arm, there in confirmed(result, cell).items()
    }


def diverged_replicates(result: StudyResult, verdict: Verdict) -> frozenset[int]:
    """The replicates in which a confirmed training that a verdict reads diverged.

    A sweep reads whole grids, whose ends are there to diverge; it has none.
    """
    hypothesis = next((h for h in result.study.hypotheses if h.name == verdict.hypothesis), None)
    if hypothesis is None or result.study.program == "sweep":
        return frozenset()
    bound = hypothesis.estimand.keywords if isinstance(hypothesis.estimand, partial) else {}
    role: Role = "common" if bound.get("role") == "common" else "own"
    return frozenset(
        entry.replicate
        for arm in (*hypothesis.better, *hypothesis.other)
        for entry in result.table.of(cell=verdict.cell, arm=arm, roles=(role,))
        if entry.result.status == "diverged"
    )


def mean_sd(values: Sequence[float], scale: float = 1.0, places: int = 2) -> str:
    """`71.2 ± 0.6`: the mean and, from two values on, the standard deviation over replicates."""
    finite = [v * scale for v in values if math.isfinite(v)]
    if not finite:
        return "–"
    mean = plain(statistics.fmean(finite), places)
    return mean if len(finite) < 2 else f"{mean} ± {statistics.stdev(finite):.{places}f}"


_ROLE_WORDS: dict[Role, str] = {
    "own": "own best",
    "common": "common",
    "sweep": "whole grid",
    "tune": "tuning",
    "shortlist": "comparing the best",
    "timing": "step time",
}
#: Column heads of the table of numbers, with the metric, the factor to the shown unit, and the decimals.
_COLUMNS = (
    ("test accuracy, %", "test/acc", 100.0, 1),
    ("test loss, nats", "test/loss", 1.0, 3),
    ("calibration error, %", "test/ece", 100.0, 1),
    ("validation accuracy, %", "val/acc", 100.0, 1),
    ("training loss, nats", "train/loss", 1.0, 3),
)


def number_heads(result: StudyResult) -> list[str]:
    """The heads of the table of numbers."""
    if result.study.program == "sweep":
        usable = f"usable lr within {100 * USABLE_MARGIN:g} pp, decades"
        measured = ["best validation accuracy, %", usable, "best lr"]
    else:
        measured = [head for head, *_ in _COLUMNS] + ["lr, median (range)"]
        measured += [head for head, _ in _sometimes(result)]
    return ["arm", "training", *measured, "trainings", "diverged", "stuck", "ms per step"]


def number_rows(result: StudyResult, cell: str) -> list[list[str]]:
    """Mean ± standard deviation over replicates, arm by arm."""
    rows = []
    roles: tuple[Role, ...] = ("sweep",) if result.study.program == "sweep" else ("own", "common")
    sometimes = _sometimes(result)
    for role in roles:
        for arm in (a.name for a in result.design.arms_in(cell)):
            rows_there = result.table.of(cell=cell, arm=arm, roles=(role,))
            entries = [e for e in rows_there if e.result.status != "failed"]
            if not entries:
                continue
            if role == "sweep":
                measured = _sweep_numbers(entries)
            else:
                measured = [_column(entries, metric, scale, places) for _, metric, scale, places in _COLUMNS]
                measured.append(median_range([e.trial.lr for e in entries]))
                measured += [say(result, cell, entries) for _, say in sometimes]
            diverged = sum(e.result.status == "diverged" for e in entries)
            seen = [e for e in entries if {"chance", "train/loss"} <= e.result.metrics.keys()]
            held = sum(stuck(e) for e in seen)
            share = f"{held} ({100 * held / len(seen):.0f} %)" if role == "sweep" and seen else str(held)
            time = _step_time(entries)
            rows.append([arm, _ROLE_WORDS[role], *measured, str(len(entries)), str(diverged), share, time])
    return rows


def _sometimes(
    result: StudyResult,
) -> list[tuple[str, Callable[[StudyResult, str, Sequence[Entry]], str]]]:
    """Columns that a study has only where there is something in them, with what makes their texts."""
    entries = result.table.entries
    columns: list[tuple[str, Callable[[StudyResult, str, Sequence[Entry]], str]]] = []
    if any("target" in cell.constants for cell in result.design.cells):
        columns += [("target reached", _success), ("steps to target, restricted mean", _mean_steps)]
    if any("train/reached" in e.result.metrics for e in entries):
        columns.append(("training loss reached", _matched))
    if any(e.role == "timing" for e in entries):
        columns.append(("ms per step, alone", _time_alone))
    return columns


def _success(result: StudyResult, cell: str, entries: Sequence[Entry]) -> str:
    steps = _target_steps(result, cell, entries)
    return f"{sum(s is not None for s in steps)} of {len(steps)}" if steps else "–"


def _mean_steps(result: StudyResult, cell: str, entries: Sequence[Entry]) -> str:
    """A training that never reaches the target counts with its whole budget."""
    steps = _target_steps(result, cell, entries)
    return f"{restricted_mean(steps, entries[0].trial.steps):.0f}" if steps else "–"


def _target_steps(result: StudyResult, cell: str, entries: Sequence[Entry]) -> list[float | None]:
    target = result.design.cell(cell).constants.get("target")
    there = [e for e in entries if e.result.status == "diverged" or "val/acc" in e.result.curve]
    return [] if target is None else [steps_to_target(e, target) for e in there]


def _matched(result: StudyResult, cell: str, entries: Sequence[Entry]) -> str:
    """How many rows that train until their loss matches got there."""
    there = [e["train/reached"] for e in entries if "train/reached" in e.result.metrics]
    return f"{sum(there):.0f} of {len(there)}" if there else "–"


def _time_alone(result: StudyResult, cell: str, entries: Sequence[Entry]) -> str:
    return _step_time(result.table.of(cell=cell, arm=entries[0].arm, roles=("timing",)))


def _step_time(entries: Sequence[Entry]) -> str:
    """The median time of a step."""
    times = [e["time/step_ms"] for e in entries if "time/step_ms" in e.result.metrics]
    return f"{statistics.median(times):.2f}" if times else "–"


def _column(entries: Sequence[Entry], metric: str, scale: float, places: int) -> str:
    values = [score(entry, metric) for entry in entries]
    return mean_sd([v for v in values if v is not None], scale, places)


def _sweep_numbers(entries: Sequence[Entry]) -> list[str]:
    grids: dict[int, list[Entry]] = {}
    for entry in entries:
        if score(entry, "val/acc") is not None and {"val/acc", "chance"} <= entry.result.metrics.keys():
            grids.setdefault(entry.replicate, []).append(entry)
    grids = {r: sorted(rows, key=lambda e: e.trial.lr) for r, rows in grids.items()}
    best = [max(rows, key=lambda e: e["val/acc"]) for rows in grids.values()]
    widths = [usable_lr_width(rows, USABLE_MARGIN) for rows in grids.values()]
    accuracy = mean_sd([e["val/acc"] for e in best], 100.0, 1)
    return [accuracy, mean_sd(widths), median_range([e.trial.lr for e in best])]


def failures(result: StudyResult) -> list[list[str]]:
    """Diverged and failed rows, one line for each cell, arm, role, learning rate and reason.

    The trials of searches, of which each has a learning rate of its own, share one line.
    """
    searched = {
        (cell.name, arm.name) for cell in result.design.cells for arm in result.design.arms
        if arm.space_in(cell.name)
    }  # fmt: skip
    groups: dict[tuple[str, str, str, str, float, str], list[Entry]] = {}
    for e in result.table.entries:
        if e.result.status != "done":
            alone = (e.cell, e.arm) not in searched or e.role not in ("tune", "shortlist")
            which = (e.trial.lr, _reason(e)) if alone else (0.0, "")
            groups.setdefault((e.cell, e.arm, _ROLE_WORDS[e.role], e.result.status, *which), []).append(e)
    return [_failure(place[:4], rows) for place, rows in sorted(groups.items(), key=lambda group: group[0])]


def _failure(place: tuple[str, str, str, str], rows: Sequence[Entry]) -> list[str]:
    cell, arm, role, status = place
    low, high = min(e.trial.lr for e in rows), max(e.trial.lr for e in rows)
    reason, several = _reason(rows[0]), len({_reason(e) for e in rows}) > 1
    return [
        cell,
        arm,
        role,
        f"{low:g}" if low == high else f"{low:g}–{high:g}",
        status,
        f"{len(rows)} trainings; the first: {reason}" if several else reason,
        spans([e.replicate for e in rows]),
    ]


def _reason(entry: Entry) -> str:
    return entry.result.brief[:200]


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The keys of two definitions that differ, with both values; long ones are cut."""
    before, after = _flat(old), _flat(new)
    return [
        (key, _shown(before.get(key)), _shown(after.get(key)))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        parts = [_flat(part, f"{path} › {name}" if path else str(name)) for name, part in value.items()]
        return {key: text for part in parts for key, text in part.items()}
    return {path: json.dumps(value, sort_keys=True, ensure_ascii=False)}


def _shown(text: str | None) -> str:
    if text is None:
        return "(not there)"
    return text if len(text) <= 80 else f"{text[:60]} … ({len(text)} characters)"
