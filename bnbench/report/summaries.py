"""What a table of results says in a few numbers: curves, sweeps, pairs, means, and what went wrong."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnbench.report.result import StudyResult
from bnbench.report.words import median_range, plain, spans
from bnbench.study.estimands import stuck, usable_lr_width
from bnbench.study.table import Entry, Role

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
    """A metric over the learning rate: each replicate's points, and their mean where there are any."""

    replicates: Mapping[int, tuple[tuple[float, float], ...]]
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
    for entry in sorted(entries, key=lambda e: e.trial.lr):
        value = score(entry, metric)
        if value is not None:
            by_replicate.setdefault(entry.replicate, []).append((entry.trial.lr, value))
            by_lr.setdefault(entry.trial.lr, []).append(value)
    if not by_lr:
        return None
    mean = tuple((lr, statistics.fmean(values)) for lr, values in sorted(by_lr.items()))
    chance = next((e["chance"] for e in entries if "chance" in e.result.metrics), 0.0)
    threshold = max(max(value for _, value in mean) - USABLE_MARGIN, 1.5 * chance)
    return Sweep({r: tuple(p) for r, p in sorted(by_replicate.items())}, mean, _above(mean, threshold))


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


def paired_scores(result: StudyResult, cell: str) -> dict[str, dict[int, float]]:
    """Accuracy by arm and replicate: of the confirmed row, or the best of the grid in a sweep."""
    scores: dict[str, dict[int, float]] = {}
    for arm in (a.name for a in result.design.arms):
        found: dict[int, float] = {}
        if result.study.program == "sweep":
            for entry in result.table.of(cell=cell, arm=arm, roles=("sweep",)):
                value = score(entry, "val/acc")
                if value is not None:
                    found[entry.replicate] = max(value, found.get(entry.replicate, 0.0))
        else:
            for entry in result.table.of(cell=cell, arm=arm, roles=("own",)):
                value = score(entry, "test/acc")
                if value is not None:
                    found[entry.replicate] = value
        if found:
            scores[arm] = found
    return scores


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
    return ["arm", "training", *measured, "trainings", "diverged", "stuck", "ms per step"]


def number_rows(result: StudyResult, cell: str) -> list[list[str]]:
    """Mean ± standard deviation over replicates, arm by arm."""
    rows = []
    roles: tuple[Role, ...] = ("sweep",) if result.study.program == "sweep" else ("own", "common")
    for role in roles:
        for arm in (a.name for a in result.design.arms):
            rows_there = result.table.of(cell=cell, arm=arm, roles=(role,))
            entries = [e for e in rows_there if e.result.status != "failed"]
            if not entries:
                continue
            if role == "sweep":
                measured = _sweep_numbers(entries)
            else:
                measured = [_column(entries, metric, scale, places) for _, metric, scale, places in _COLUMNS]
                measured.append(median_range([e.trial.lr for e in entries]))
            diverged = sum(e.result.status == "diverged" for e in entries)
            seen = [e for e in entries if {"chance", "train/loss"} <= e.result.metrics.keys()]
            held = sum(stuck(e) for e in seen)
            share = f"{held} ({100 * held / len(seen):.0f} %)" if role == "sweep" and seen else str(held)
            step_ms = [e["time/step_ms"] for e in entries if "time/step_ms" in e.result.metrics]
            time = f"{statistics.median(step_ms):.2f}" if step_ms else "–"
            rows.append([arm, _ROLE_WORDS[role], *measured, str(len(entries)), str(diverged), share, time])
    return rows


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
