"""The figures of searches: importances, history, the best to expect, and slices of the space."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bnbench.report.drawing import (
    INK,
    WIDTH,
    ArmStyle,
    Drawing,
    cut,
    finish,
    house_style,
    new_figure,
    panel,
    percent,
)
from bnbench.report.searches import Search, best_so_far
from bnbench.report.words import dimension_words
from bnbench.study.space import Dimension, Range

_LABELS, _TITLE = 118.0, 22.0
_ALONE: Any = (0, (4, 2))
_TRIAL: dict[str, Any] = {"linestyle": "none", "markersize": 3.6, "markeredgewidth": 0}


def draw_importances(
    name: str, cell: str, found: Mapping[str, Mapping[str, Sequence[float]]], styles: Mapping[str, ArmStyle]
) -> Drawing:
    """The share of each dimension in the spread of scores: a dot a search, a bar for their mean."""
    dimensions = list(dict.fromkeys(d for arm in sorted(found.values(), key=len, reverse=True) for d in arm))
    rows = [(d, [arm for arm, shares in found.items() if d in shares]) for d in dimensions]
    most = max((len(values) for shares in found.values() for values in shares.values()), default=0)
    with house_style():
        total = sum(len(arms) + 1.0 for _, arms in rows)
        figure, axes = panel(12.0 * total + 38, found, styles, markers=True, left=_LABELS)
        y = 0.5
        for dimension, arms in rows:
            axes.annotate(
                cut(dimension_words(dimension), 20), (0, y + (len(arms) - 1) / 2),
                xycoords=("axes fraction", "data"), xytext=(-6, 0), textcoords="offset points",
                ha="right", va="center",
            )  # fmt: skip
            for arm in arms:
                style, shares = styles[arm], [100 * share for share in found[arm][dimension]]
                axes.plot(
                    shares, [y] * len(shares), linestyle="none", color=style.colour, marker=style.marker,
                    markersize=5, markeredgewidth=0, alpha=0.75,
                )  # fmt: skip
                mean = statistics.fmean(shares)
                axes.plot([mean, mean], [y - 0.42, y + 0.42], color=style.colour, linewidth=2.4)
                y += 1.0
            y += 1.0
            if dimension != dimensions[-1]:
                axes.axhline(y - 1.0, color=INK, linewidth=0.7, alpha=0.13)
        axes.set(ylim=(total - 0.5, -0.5), yticks=[])
        axes.set_xlim(left=0)
        axes.grid(False, axis="y")
        axes.margins(x=0.03)
        axes.set_xlabel("share of the spread of scores, %")
        if most < 2:
            axes.text(
                0.99, 0.02, "one search: an anecdote", transform=axes.transAxes, ha="right", va="bottom"
            )
        return finish(figure, name, f"Hyperparameter importances, {cell}")


def draw_history(
    name: str, cell: str, searches: Mapping[str, Sequence[Search]], styles: Mapping[str, ArmStyle]
) -> Drawing:
    """The score of every trial and the best so far, a line a search, a panel an arm."""
    scores = [value for found in searches.values() for search in found for value in search.scores]
    floor, top = score_limits(scores)
    with house_style():
        figure, panels = _small_panels(list(searches), "trial")
        for axes, (arm, found) in zip(panels, searches.items(), strict=True):
            style = styles[arm]
            for search in found:
                tried = [(i, s) for i, (_, s) in enumerate(search.trials, start=1) if s is not None]
                seen = [point for point in tried if point[1] >= floor]
                axes.plot(*percent(seen), color=style.colour, marker="o", alpha=0.6, **_TRIAL)
                below = [i for i, value in tried if value < floor]
                axes.plot(
                    below, [100 * floor] * len(below), color=style.colour, marker="v", clip_on=False, **_TRIAL
                )
                axes.step(
                    *percent(best_so_far(search)), where="post", color=style.colour, linewidth=1.4, alpha=0.9
                )
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        panels[0].set_ylim(100 * floor, 100 * top)
        return finish(figure, name, f"Search history, {cell}")


@dataclass(frozen=True)
class Expectation:
    """The best scores to expect after 1, 2, … trials of an arm, and with its learning rate alone."""

    arm: str
    whole: Sequence[float]
    lr_alone: Sequence[float] = ()


def draw_expected(
    name: str, cell: str, expectations: Sequence[Expectation], styles: Mapping[str, ArmStyle]
) -> Drawing:
    """The best score to expect after k trials, a panel an arm."""
    with house_style():
        legend = [
            Line2D([], [], color=INK, linewidth=2, label="all that the arm searches"),
            Line2D([], [], color=INK, linewidth=1.4, linestyle=_ALONE, label="the learning rate alone"),
        ]
        compared = any(expectation.lr_alone for expectation in expectations)
        figure, panels = _small_panels(
            [e.arm for e in expectations], "trials (k)", legend if compared else ()
        )
        for axes, expectation in zip(panels, expectations, strict=True):
            axes.plot(
                *percent(list(enumerate(expectation.whole, start=1))), color=styles[expectation.arm].colour,
                linewidth=2,
            )  # fmt: skip
            axes.plot(
                *percent(list(enumerate(expectation.lr_alone, start=1))), color=INK, linewidth=1.4,
                linestyle=_ALONE, alpha=0.8,
            )  # fmt: skip
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        return finish(figure, name, f"Best validation accuracy to expect after k trials, {cell}")


@dataclass(frozen=True)
class Slice:
    """One dimension of an arm's searches, under a title."""

    title: str
    arm: str
    dimension: Dimension
    searches: Sequence[Search]


def draw_slices(name: str, title: str, slices: Sequence[Slice], styles: Mapping[str, ArmStyle]) -> Drawing:
    """The score of every trial over each dimension, one below the other; rings mark what was chosen."""
    floor, top = score_limits([s for part in slices for search in part.searches for s in search.scores])
    with house_style():
        strips = [_Strip(part.dimension) for part in slices]
        total = sum(_TITLE + strip.height for strip in strips)
        figure = new_figure(WIDTH, total + 38)
        place = (_LABELS / WIDTH, 38 / (total + 38), (WIDTH - _LABELS - 8) / WIDTH, total / (total + 38))
        # One panel with rows in pixels: a panel for each dimension would take six times as long to draw.
        axes = figure.add_axes(place)
        marks: list[tuple[float, str]] = []
        y = 0.0
        for part, strip in zip(slices, strips, strict=True):
            words: dict[str, Any] = {
                "xycoords": ("figure pixels", "data"),
                "va": "center",
                "fontweight": "bold",
            }
            axes.annotate(cut(part.title, 60), (4, y + 0.6 * _TITLE), fontsize=10.5, **words)
            y += _TITLE
            marks += [(y + offset, text) for offset, text in strip.marks()]
            _draw_strip(axes, part, strip, y, styles[part.arm], floor)
            y += strip.height
        axes.set_yticks([mark for mark, _ in marks], [cut(text, 21) for _, text in marks])
        axes.set(xlim=(100 * floor, 100 * top), ylim=(total, 0))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_xlabel("validation accuracy, %")
        return finish(figure, name, title)


class _Strip:
    """Where the values of a dimension lie in a strip of a figure, in pixels from its top."""

    def __init__(self, dimension: Dimension) -> None:
        self.dimension = dimension
        self.levels = [] if isinstance(dimension, Range) else list(dimension.levels)
        self.height = 15.0 * len(self.levels) or 64.0

    def place(self, value: Any) -> float:
        if isinstance(self.dimension, Range):
            low, high = self.dimension.low, self.dimension.high
            return (self.height - 8) * (1 - math.log(value / low) / math.log(high / low)) + 4
        return 15.0 * self.levels.index(value) + 7.5

    def marks(self) -> list[tuple[float, str]]:
        """The levels, or round numbers of a range, with their places."""
        if not isinstance(self.dimension, Range):
            return [(self.place(level), level) for level in self.levels]
        low, high = self.dimension.low, self.dimension.high
        powers = [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        numbers = powers[:: math.ceil(len(powers) / 5)] if len(powers) > 1 else [low, high]
        return [(self.place(number), f"{number:g}") for number in numbers]


def _draw_strip(axes: Any, part: Slice, strip: _Strip, y: float, style: ArmStyle, floor: float) -> None:
    name, count = part.dimension.name, len(part.searches)
    dots: list[tuple[float, float, bool]] = []
    rings: list[tuple[float, float]] = []
    by_level: dict[Any, list[float]] = {}
    for lane, search in enumerate(part.searches):
        for point, value in search.trials:
            if value is None or name not in point:
                continue
            # The searches of a level lie side by side, so that fewer dots hide each other.
            shift = 8 * ((lane + 0.5) / count - 0.5) if strip.levels else 0.0
            dots.append((100 * max(value, floor), y + strip.place(point[name]) + shift, value >= floor))
            by_level.setdefault(point[name], []).append(value)
            if point in search.chosen:
                rings.append(dots[-1][:2])
    for inside, marker in ((True, "o"), (False, "<")):
        there = [(x, height) for x, height, seen in dots if seen == inside]
        axes.plot(*_columns(there), color=style.colour, marker=marker, alpha=0.75, clip_on=False, **_TRIAL)
    axes.plot(
        *_columns(rings), linestyle="none", marker="o", markersize=8, markerfacecolor="none",
        markeredgecolor=INK, markeredgewidth=1.3, clip_on=False,
    )  # fmt: skip
    for level in strip.levels:
        if level in by_level:
            middle, line = 100 * max(statistics.median(by_level[level]), floor), y + strip.place(level)
            axes.plot([middle, middle], [line - 6, line + 6], color=INK, linewidth=1.8, alpha=0.75)


def score_limits(scores: Sequence[float]) -> tuple[float, float]:
    """Where a scale of scores begins and ends: scores far below the median would leave the rest no room."""
    if not scores:
        return 0.0, 1.0
    top, middle = max(scores), statistics.median(scores)
    floor = max(min(scores), top - 3 * max(top - middle, 0.005))
    room = 0.04 * max(top - floor, 0.01)
    return floor - room, top + room


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _small_panels(
    titles: Sequence[str], label: str, legend: Sequence[Line2D] = ()
) -> tuple[Figure, list[Any]]:
    """Panels with one scale of accuracy, two in a line where there are several, each under its title."""
    columns = min(2, len(titles))
    lines = math.ceil(len(titles) / columns)
    left, right, gap, foot, head, title = 44.0, 8.0, 12.0, 38.0, 22.0 if legend else 4.0, 19.0
    tall = 150.0 if columns == 1 else 92.0
    height = head + lines * (title + tall) + (lines - 1) * 14 + foot
    wide = (WIDTH - left - right - gap * (columns - 1)) / columns
    figure = new_figure(WIDTH, height)
    panels: list[Any] = []
    for i, text in enumerate(titles):
        line, column = divmod(i, columns)
        bottom = height - head - (line + 1) * (title + tall) - line * 14
        place = ((left + column * (wide + gap)) / WIDTH, bottom / height, wide / WIDTH, tall / height)
        shared = panels[0] if panels else None
        axes = figure.add_axes(place, sharex=shared, sharey=shared)
        axes.set_title(cut(text, 28), loc="left", pad=3, fontsize=10.5)
        last = i + columns >= len(titles)
        axes.tick_params(labelleft=column == 0, labelbottom=last)
        if last:
            axes.set_xlabel(label)
        panels.append(axes)
    figure.text(2 / WIDTH, 0.5, "validation accuracy, %", rotation=90, va="center", fontsize=10.5)
    if legend:
        figure.legend(handles=list(legend), loc="upper left", ncols=2, borderaxespad=0.2)
    return figure, panels
