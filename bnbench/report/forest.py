"""Forest plots: effects with their simultaneous intervals, one below the other, every replicate a dot."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory

from bnbench.report.drawing import (
    DECISION_COLOURS,
    INK,
    WIDTH,
    Dot,
    Drawing,
    cut,
    draw_dots,
    draw_mark,
    finish,
    house_style,
    marks_of,
    new_figure,
)
from bnbench.report.words import effect, is_ratio
from bnbench.study.verdicts import Verdict

#: Ratios for the ticks of an axis, the most telling first.
# fmt: off
_RATIO_TICKS = (
    1, 2, 0.5, 1.25, 0.8, 1.5, 3, 4, 0.25, 10, 0.1, 5, 0.2, 1.1, 0.9, 20, 0.05, 100, 0.01, 1000, 0.001,
)
# fmt: on


@dataclass(frozen=True)
class ForestRow:
    """One interval of a forest plot, under a heading (words, decision) where it starts a group.

    `diverged` are the replicates in which a training diverged.
    """

    label: str
    verdict: Verdict
    heading: tuple[str, str] | None = None
    diverged: Set[int] = frozenset()


@dataclass(frozen=True)
class _Frame:
    """Where the rows of a forest plot lie: label and effect above each interval, or beside it where wide."""

    low: float
    high: float
    in_delta: bool
    wide: bool

    @property
    def limits(self) -> tuple[float, float]:
        return self.low, self.high

    def unit(self, verdict: Verdict) -> float:
        return verdict.delta if self.in_delta else 1.0

    @property
    def height(self) -> float:
        return 0.72 if self.wide else 1.0


def draw_forest(
    name: str, title: str, rows: Sequence[ForestRow], *, in_delta: bool, wide: bool = False
) -> Drawing:
    """The effects with their simultaneous intervals, one below the other, each replicate as a dot.

    The tint of a row says what its interval would have to reach: green speaks for the claim, orange against
    it, none is too small to matter. `in_delta` measures in units of each cell's δ and cuts at ±6 δ. A
    replicate in which a training diverged is a cross, one beyond the scale a triangle at its edge.
    """
    frame = _Frame(*_limits(rows, in_delta), in_delta, wide)
    total = sum(frame.height + (0.95 if row.heading else 0.0) for row in rows) + 0.1
    every = [value / frame.unit(row.verdict) for row in rows for value in row.verdict.values]
    marks = marks_of(every, frame.limits, diverged=any(row.diverged for row in rows))
    width, inside, foot = (800.0, 34.0 * total, 46.0) if wide else (WIDTH, 36.0 * total, 46.0)
    foot += 20.0 if marks else 0.0
    left, right = (0.24, 0.705) if wide else (0.02, 0.98)
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
            label = "effect ÷ δ" if in_delta else " / ".join(sorted(units))
        if all(row.verdict.kind == "greater" and not row.verdict.against for row in rows):
            label = f"← against the claim\u2003{label}\u2003for the claim →"
        axes.set_xlabel(label)
        if marks:
            figure.legend(handles=list(map(draw_mark, marks)), loc="lower center", ncols=2, borderaxespad=0.1)
        return finish(figure, name, title)


def _forest_row(axes: Any, row: ForestRow, top: float, frame: _Frame, across: Any) -> None:
    verdict = row.verdict
    unit = frame.unit(verdict)
    colour = DECISION_COLOURS[verdict.on_claim]
    start, end = (top + 0.04, top + frame.height - 0.04) if frame.wide else (top + 0.47, top + 0.97)
    line = (start + end) / 2
    words = line if frame.wide else top + 0.24
    for left, right, tint in _zones(verdict, verdict.delta / unit, frame.low, frame.high):
        axes.add_patch(
            Rectangle((left, start), right - left, end - start, color=tint, alpha=0.13, linewidth=0)
        )
    for edge in (-verdict.delta / unit, verdict.delta / unit):
        axes.plot([edge, edge], [start, end], color=INK, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.7)
    axes.plot([0, 0], [start, end], color=INK, linewidth=0.9)
    sides = (0.232, 0.713) if frame.wide else (0.02, 0.98)
    place: dict[str, Any] = {"transform": across, "fontsize": 11, "va": "center"}
    axes.text(
        sides[0],
        words,
        cut(row.label, 28 if frame.wide else 30),
        ha="right" if frame.wide else "left",
        **place,
    )
    axes.text(sides[1], words, effect(verdict), ha="left" if frame.wide else "right", **place)
    dots = [Dot(value / unit, line, r in row.diverged) for r, value in enumerate(verdict.values)]
    draw_dots(axes, dots, frame.limits, along="x", s=9, color=INK, alpha=0.35, marker="o")
    if verdict.estimate is None:
        return
    if verdict.low is not None and verdict.high is not None:
        ends = max(verdict.low / unit, frame.low), min(verdict.high / unit, frame.high)
        if ends[0] < ends[1]:
            axes.plot(ends, [line, line], color=colour, linewidth=2.8, solid_capstyle="butt", zorder=3)
    estimate = min(max(verdict.estimate / unit, frame.low), frame.high)
    marker = {"SUPPORTED": "o", "REFUTED": "s"}.get(verdict.on_claim, "D")
    if estimate != verdict.estimate / unit:
        marker = ">" if estimate == frame.high else "<"
    face = colour if verdict.on_claim != "INCONCLUSIVE" else "none"
    axes.plot(
        [estimate], [line], marker=marker, markersize=7, color=colour, markerfacecolor=face, clip_on=False,
        zorder=4,
    )  # fmt: skip


def _zones(verdict: Verdict, delta: float, low: float, high: float) -> list[tuple[float, float, str]]:
    good, bad = DECISION_COLOURS["SUPPORTED"], DECISION_COLOURS["REFUTED"]
    if verdict.against:
        good, bad = bad, good
    if verdict.kind == "equivalent":
        return [(low, -delta, bad), (-delta, delta, good), (delta, high, bad)]
    return [(low, 0.0, bad), (delta, high, good)]


def _limits(rows: Sequence[ForestRow], in_delta: bool) -> tuple[float, float]:
    """Limits that hold zero, every δ and interval, and replicates that are not far from them."""
    edges, values = [0.0], []
    for row in rows:
        v = row.verdict
        unit = v.delta if in_delta else 1.0
        edges += [n / unit for n in (v.low, v.high, v.estimate) if n is not None]
        edges += [-1.3 * v.delta / unit, 1.3 * v.delta / unit]
        values += [value / unit for value in v.values]
    far = (max(edges) - min(edges)) / 2
    bounds = min(edges) - far, max(edges) + far
    edges += [min(max(value, bounds[0]), bounds[1]) for value in values]
    low, high = min(edges), max(edges)
    if in_delta:
        low, high = max(low, -6.0), min(high, 6.0)
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
