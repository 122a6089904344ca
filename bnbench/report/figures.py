"""The figures of a report: learning curves, sweeps, paired replicates and forest plots of effects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory

from bnbench.report.drawing import (
    DECISION_COLOURS,
    INK,
    WIDTH,
    ArmStyle,
    Drawing,
    cut,
    finish,
    house_style,
    log_axis,
    new_figure,
    panel,
    percent,
)
from bnbench.report.summaries import USABLE_MARGIN, Band, Sweep
from bnbench.report.words import effect, is_ratio
from bnbench.study.claims import Verdict

_HEIGHT = 255.0
_RATIO_TICKS = (
    1,
    2,
    0.5,
    1.25,
    0.8,
    1.5,
    3,
    4,
    0.25,
    10,
    0.1,
    5,
    0.2,
    1.1,
    0.9,
    20,
    0.05,
    100,
    0.01,
    1000,
    0.001,
)


def draw_curves(
    name: str,
    cell: str,
    bands: Mapping[str, Band],
    styles: Mapping[str, ArmStyle],
    target: float | None,
    note: str,
) -> Drawing:
    """Validation accuracy over steps: the median of each arm and its interquartile range."""
    with house_style():
        figure, axes = panel(_HEIGHT, bands, styles)
        for arm, band in bands.items():
            style = styles[arm]
            percent = [[100 * v for v in series] for series in (band.low, band.middle, band.high)]
            axes.fill_between(band.steps, percent[0], percent[2], color=style.colour, alpha=0.18, linewidth=0)
            axes.plot(band.steps, percent[1], color=style.colour, linestyle=style.dashes, linewidth=1.8)
        if target is not None:
            axes.axhline(100 * target, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.7)
            axes.annotate(
                f"target {100 * target:.3g} %", (0.01, 100 * target), xycoords=("axes fraction", "data"),
                xytext=(0, 3), textcoords="offset points", fontsize=9.5,
            )  # fmt: skip
        log_axis(axes, "training step")
        axes.set_ylabel("validation accuracy, %")
        return finish(figure, name, f"Validation accuracy while training, {cell}, {note}")


def draw_sweep(name: str, cell: str, sweeps: Mapping[str, Sweep], styles: Mapping[str, ArmStyle]) -> Drawing:
    """Validation accuracy over the learning rate: replicates thin, means bold, the usable range below."""
    with house_style():
        figure, axes = panel(_HEIGHT + 10 * len(sweeps), sweeps, styles, markers=True)
        for arm, found in sweeps.items():
            style = styles[arm]
            for points in found.replicates.values():
                axes.plot(*percent(points), color=style.colour, linewidth=0.7, alpha=0.35)
            axes.plot(
                *percent(found.mean), color=style.colour, linestyle=style.dashes, linewidth=2,
                marker=style.marker, markersize=4.5,
            )  # fmt: skip
        bottom, top = axes.get_ylim()
        step = (top - bottom) * 0.05
        for i, (arm, found) in enumerate(sweeps.items()):
            for start, end in found.usable:
                y = bottom - (i + 0.6) * step
                axes.plot([start, end], [y, y], color=styles[arm].colour, linewidth=4, solid_capstyle="butt")
        axes.set_ylim(bottom - (len(sweeps) + 0.4) * step, top)
        log_axis(axes, "learning rate")
        axes.set_ylabel("validation accuracy, %")
        bars = f"bars: within {100 * USABLE_MARGIN:g} points of the arm's own best"
        return finish(figure, name, f"Validation accuracy over the learning rate, {cell} ({bars})")


def draw_pairs(
    name: str,
    cell: str,
    scores: Mapping[str, Mapping[int, float]],
    styles: Mapping[str, ArmStyle],
    metric: str,
) -> Drawing:
    """Every replicate as a dot; lines join the arms of one replicate, which saw the same data."""
    with house_style():
        slanted = len(scores) > 5 or any(len(arm) > 10 for arm in scores)
        figure, axes = panel(_HEIGHT + 30 * slanted, {}, styles, foot=26.0 + 50 * slanted)
        places = {arm: float(i) for i, arm in enumerate(scores)}
        for replicate in sorted({r for found in scores.values() for r in found}):
            line = [(places[arm], found[replicate]) for arm, found in scores.items() if replicate in found]
            axes.plot(*percent(line), color=INK, linewidth=0.7, alpha=0.3, zorder=1)
        for arm, found in scores.items():
            style, values = styles[arm], [100 * v for v in found.values()]
            axes.scatter(
                [places[arm]] * len(values), values, s=26, color=style.colour, marker=style.marker,
                linewidths=0, alpha=0.85, zorder=2,
            )  # fmt: skip
            mean = sum(values) / len(values)
            bar = [places[arm] - 0.2, places[arm] + 0.2]
            axes.plot(bar, [mean, mean], color=style.colour, linewidth=2.4, zorder=3)
        axes.set_xlim(-0.5, len(scores) - 0.5)
        axes.set_xticks(
            list(places.values()), [cut(arm, 18) for arm in places], rotation=30 if slanted else 0,
            ha="right" if slanted else "center",
        )  # fmt: skip
        axes.grid(False, axis="x")
        axes.set_ylabel(f"{metric}, %")
        return finish(figure, name, f"{metric.capitalize()} of every replicate, {cell}; bars are means")


@dataclass(frozen=True)
class ForestRow:
    """One interval of a forest plot, under a heading (words, decision) where it starts a group."""

    label: str
    verdict: Verdict
    heading: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Frame:
    """Where the rows of a forest plot lie: label and effect above each interval, or beside it where wide."""

    low: float
    high: float
    in_delta: bool
    wide: bool

    @property
    def height(self) -> float:
        return 0.72 if self.wide else 1.0


def draw_forest(
    name: str, title: str, rows: Sequence[ForestRow], *, in_delta: bool, wide: bool = False
) -> Drawing:
    """The effects with their simultaneous intervals, one below the other, each replicate as a dot.

    The tint of a row says what its interval would have to reach: green speaks for the claim, orange against
    it, none is too small to matter. `in_delta` measures in units of each cell's δ and cuts at ±6 δ.
    """
    frame = _Frame(*_limits(rows, in_delta), in_delta, wide)
    total = sum(frame.height + (0.95 if row.heading else 0.0) for row in rows) + 0.1
    width, inside, foot = (760.0, 34.0 * total, 46.0) if wide else (WIDTH, 36.0 * total, 46.0)
    left, right = (0.245, 0.755) if wide else (0.02, 0.98)
    with house_style():
        figure = new_figure(width, inside + foot)
        bottom = foot / (inside + foot)
        axes = figure.add_axes((left, bottom, right - left, 1 - bottom))
        across = blended_transform_factory(figure.transFigure, axes.transData)
        y = 0.0
        for row in rows:
            if row.heading:
                y += 0.95
                words, decision = row.heading
                place: dict[str, Any] = {
                    "transform": across,
                    "fontsize": 12,
                    "fontweight": "bold",
                    "va": "center",
                }
                axes.text(0.01, y - 0.34, cut(words, 96), **place)
                colour = DECISION_COLOURS.get(decision, INK)
                axes.text(
                    0.99, y - 0.34, decision, **{**place, "color": colour, "fontsize": 10.5}, ha="right"
                )
            _forest_row(axes, row, y, frame, across)
            y += frame.height
        axes.set(xlim=(frame.low, frame.high), ylim=(total, 0.0), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        units = {row.verdict.unit for row in rows}
        if not in_delta and all(is_ratio(unit) for unit in units):
            _ratio_ticks(axes, frame.low, frame.high)
            label = "ratio"
        else:
            axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("-", "−")))
            label = "effect ÷ the smallest one that matters (δ)" if in_delta else " / ".join(sorted(units))
        axes.set_xlabel(f"← against the claim\u2003{label}\u2003for the claim →")
        return finish(figure, name, title)


def _forest_row(axes: Any, row: ForestRow, top: float, frame: _Frame, across: Any) -> None:
    verdict = row.verdict
    unit = verdict.delta if frame.in_delta else 1.0
    colour = DECISION_COLOURS[verdict.decision]
    start, end = (top + 0.04, top + frame.height - 0.04) if frame.wide else (top + 0.47, top + 0.97)
    line = (start + end) / 2
    words = line if frame.wide else top + 0.24
    for left, right, tint in _zones(verdict.kind, verdict.delta / unit, frame.low, frame.high):
        axes.add_patch(
            Rectangle((left, start), right - left, end - start, color=tint, alpha=0.13, linewidth=0)
        )
    for edge in (-verdict.delta / unit, verdict.delta / unit):
        axes.plot([edge, edge], [start, end], color=INK, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.7)
    axes.plot([0, 0], [start, end], color=INK, linewidth=0.9)
    sides = (0.235, 0.765) if frame.wide else (0.02, 0.98)
    place: dict[str, Any] = {"transform": across, "fontsize": 11, "va": "center"}
    axes.text(
        sides[0],
        words,
        cut(row.label, 28 if frame.wide else 30),
        ha="right" if frame.wide else "left",
        **place,
    )
    axes.text(sides[1], words, effect(verdict), ha="left" if frame.wide else "right", **place)
    inside = [v / unit for v in verdict.values if frame.low <= v / unit <= frame.high]
    axes.scatter(inside, [line] * len(inside), s=9, color=INK, alpha=0.3, linewidths=0, zorder=2)
    if verdict.estimate is None:
        return
    if verdict.low is not None and verdict.high is not None:
        ends = max(verdict.low / unit, frame.low), min(verdict.high / unit, frame.high)
        if ends[0] < ends[1]:
            axes.plot(ends, [line, line], color=colour, linewidth=2.8, solid_capstyle="butt", zorder=3)
    estimate = min(max(verdict.estimate / unit, frame.low), frame.high)
    marker = {"SUPPORTED": "o", "REFUTED": "s"}.get(verdict.decision, "D")
    if estimate != verdict.estimate / unit:
        marker = ">" if estimate == frame.high else "<"
    face = colour if verdict.decision != "INCONCLUSIVE" else "none"
    axes.plot(
        [estimate], [line], marker=marker, markersize=7, color=colour, markerfacecolor=face, clip_on=False,
        zorder=4,
    )  # fmt: skip


def _zones(kind: str, delta: float, low: float, high: float) -> list[tuple[float, float, str]]:
    good, bad = DECISION_COLOURS["SUPPORTED"], DECISION_COLOURS["REFUTED"]
    if kind == "equivalent":
        return [(low, -delta, bad), (-delta, delta, good), (delta, high, bad)]
    return [(low, 0.0, bad), (delta, high, good)]


def _limits(rows: Sequence[ForestRow], in_delta: bool) -> tuple[float, float]:
    """Limits that hold zero, every δ, interval and replicate, with some room."""
    edges = [0.0]
    for row in rows:
        v = row.verdict
        unit = v.delta if in_delta else 1.0
        numbers = [n / unit for n in (v.low, v.high, v.estimate, *v.values) if n is not None]
        edges += [*numbers, -1.3 * v.delta / unit, 1.3 * v.delta / unit]
    if in_delta:
        edges = [min(max(edge, -6.0), 6.0) for edge in edges]
    low, high = min(edges), max(edges)
    room = 0.04 * (high - low or 1.0)
    return low - room, high + room


def _ratio_ticks(axes: Any, low: float, high: float) -> None:
    """Round ratios, the most telling first, as far as there is room between them."""
    chosen: list[float] = []
    for ratio in _RATIO_TICKS:
        x = math.log(ratio)
        if low <= x <= high and all(abs(x - other) > 0.13 * (high - low) for other in chosen):
            chosen.append(x)
    axes.xaxis.set_major_locator(FixedLocator(chosen))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{math.exp(x):.3g} ×"))
