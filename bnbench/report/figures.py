"""The figures of a study: learning curves, sweeps and paired replicates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from matplotlib.ticker import MaxNLocator

from bnbench.report.drawing import (
    INK,
    ArmStyle,
    Dot,
    Drawing,
    cut,
    draw_dots,
    draw_lines,
    fence,
    finish,
    house_style,
    log_axis,
    marks_of,
    panel,
    percent,
)
from bnbench.report.summaries import USABLE_MARGIN, Band, Sweep

_HEIGHT = 255.0


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
    """Validation accuracy over the learning rate: every training, means bold, the usable range below."""
    with house_style():
        lost = any(found.diverged for found in sweeps.values())
        marks = ("diverged",) * lost
        figure, axes = panel(_HEIGHT + 10 * len(sweeps), sweeps, styles, marks=marks, markers=True)
        for arm, found in sweeps.items():
            style = styles[arm]
            lines = found.replicates.values()
            draw_lines(
                axes, [[(lr, 100 * v) for lr, v in line] for line in lines], color=style.colour, alpha=0.3
            )
            dots = [Dot(lr, 100 * v, (lr, v) in found.diverged) for line in lines for lr, v in line]
            draw_dots(axes, dots, (0.0, 100.0), along="y", color=style.colour, marker="o", s=7, alpha=0.45)
            axes.plot(
                *percent(found.mean), color=style.colour, linestyle=style.dashes, linewidth=2,
                marker=style.marker, markersize=4.5,
            )  # fmt: skip
        bottom, top = axes.get_ylim()
        step = (top - bottom) * min(0.05, 0.5 / len(sweeps))
        thick = 3.0 if len(sweeps) > 8 else 4.0
        for i, (arm, found) in enumerate(sweeps.items()):
            for start, end in found.usable:
                y = bottom - (i + 0.6) * step
                axes.plot(
                    [start, end], [y, y], color=styles[arm].colour, linewidth=thick, solid_capstyle="butt"
                )
        axes.set_ylim(bottom - (len(sweeps) + 0.4) * step, top)
        axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
        log_axis(axes, "learning rate")
        axes.set_ylabel("validation accuracy, %")
        bars = f"bars: within {100 * USABLE_MARGIN:g} points of the arm's own best"
        return finish(figure, name, f"Validation accuracy over the learning rate, {cell} ({bars})")


def draw_replicates(
    name: str,
    cell: str,
    trainings: Mapping[str, Mapping[int, Dot]],
    styles: Mapping[str, ArmStyle],
    metric: str,
) -> Drawing:
    """Every replicate as a dot, an arm a line of them; grey lines join what saw the same data.

    A dot's x is a share; its y is not read.
    """
    with house_style():
        groups = [[dot.x for dot in found.values()] for found in trainings.values()]
        limits = fence(groups, 0.005)
        lost = any(dot.diverged for found in trainings.values() for dot in found.values())
        marks = marks_of([x for group in groups for x in group], limits, diverged=lost)
        row = 34.0 if len(trainings) <= 6 else 24.0
        names = {arm: cut(arm, 22) for arm in trainings}
        left = 16.0 + 6.1 * max(map(len, names.values()))
        figure, axes = panel(row * len(trainings) + 46, {}, styles, marks=marks, left=left)
        places = {arm: float(i) for i, arm in enumerate(trainings)}
        ends = (100 * limits[0], 100 * limits[1])
        joined = [
            [
                (min(max(100 * found[r].x, ends[0]), ends[1]), places[arm])
                for arm, found in trainings.items()
                if r in found
            ]
            for r in sorted({r for found in trainings.values() for r in found})
        ]
        draw_lines(axes, joined, color=INK, alpha=0.3, zorder=1)
        for arm, found in trainings.items():
            style, y = styles[arm], places[arm]
            dots = [Dot(100 * dot.x, y, dot.diverged, dot.url) for dot in found.values()]
            looks = {"color": style.colour, "marker": style.marker, "s": 26, "alpha": 0.85}
            draw_dots(axes, dots, ends, along="x", **looks)
            mean = statistics.fmean(dot.x for dot in dots)
            axes.plot([mean, mean], [y - 0.3, y + 0.3], color=style.colour, linewidth=2.4, zorder=3)
        room = 0.03 * (ends[1] - ends[0] or 1.0)
        axes.set_xlim(ends[0] - room, ends[1] + room)
        axes.set_ylim(len(trainings) - 0.5, -0.5)
        axes.set_yticks(list(places.values()), list(names.values()))
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.set_xlabel(f"{metric}, %")
        return finish(figure, name, f"{metric.capitalize()} of every replicate, {cell}; bars are means")
