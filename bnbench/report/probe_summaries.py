"""What the traces of probes say over replicates: values by step, series by layer, ranges along a step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bnbench.probes import Trace
from bnbench.report.result import StudyResult
from bnbench.report.summaries import Band, confirmed


@dataclass(frozen=True)
class Grid:
    """The median over replicates of a series: `rows[l][s]` is layer l + 1 at the step `steps[s]`.

    NaN where no replicate has a finite number.
    """

    steps: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]


def traces_of(result: StudyResult, cell: str) -> dict[str, dict[str, list[Trace]]]:
    """The traces of a cell by probe and arm, a trace a replicate, each arm at its own setting."""
    found: dict[str, dict[str, list[Trace]]] = {}
    for arm, entries in confirmed(result, cell).items():
        for entry in entries.values():
            for probe, trace in entry.result.traces.items():
                if trace.steps:
                    found.setdefault(probe, {}).setdefault(arm, []).append(trace)
    return found


def value_by_step(traces: Sequence[Trace], name: str) -> Band | None:
    """A value of a probe over steps: its median over replicates and the interquartile range."""
    return _band(dict(zip(t.steps, t.values[name], strict=True)) for t in traces if name in t.values)


def series_at(traces: Sequence[Trace], name: str, step: int) -> Band | None:
    """A series at one step: its median over replicates and the interquartile range, by layer from 1 on."""
    there = (t.at(step).series for t in traces if step in t.steps)
    return _band(dict(enumerate(series[name], start=1)) for series in there if name in series)


def range_by_step(traces: Sequence[Trace], name: str) -> Band | None:
    """From the smallest to the largest number of a series, over steps: medians over replicates of both."""
    ends: list[tuple[dict[float, float], dict[float, float]]] = []
    for trace in traces:
        rows = zip(trace.steps, trace.series.get(name, ()), strict=False)
        whole = [(step, row) for step, row in rows if row and all(map(math.isfinite, row))]
        ends.append(({step: min(row) for step, row in whole}, {step: max(row) for step, row in whole}))
    low, high = (_band(end[side] for end in ends) for side in (0, 1))
    return Band(low.steps, low.middle, low.middle, high.middle) if low and high else None


def grid_of(traces: Sequence[Trace], name: str) -> Grid | None:
    """A series by layer and step."""
    steps = sorted({step for trace in traces if name in trace.series for step in trace.steps})
    bands = [series_at(traces, name, step) for step in steps]
    columns = [dict(zip(band.steps, band.middle, strict=True)) if band else {} for band in bands]
    layers = int(max((layer for column in columns for layer in column), default=0))
    rows = tuple(tuple(column.get(layer, math.nan) for column in columns) for layer in range(1, layers + 1))
    return Grid(tuple(steps), rows) if rows else None


def _band(replicates: Iterable[Mapping[float, float]]) -> Band | None:
    """The median and the quartiles at every place, over the replicates that have a finite number there."""
    by_place: dict[float, list[float]] = {}
    for points in replicates:
        for place, value in points.items():
            if math.isfinite(value):
                by_place.setdefault(place, []).append(value)
    lines = []
    for place, values in sorted(by_place.items()):
        several = len(values) > 1
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if several else values * 3
        lines.append((place, low, middle, high))
    return Band(*zip(*lines, strict=True)) if lines else None
