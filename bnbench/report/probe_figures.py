"""The figures of probes: heat maps by layer and step, depth curves, bands of the loss, values over steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from bnbench.report.drawing import INK, ArmStyle, Drawing, cut, finish, house_style, panel
from bnbench.report.probe_summaries import Grid
from bnbench.report.probe_views import Quantity
from bnbench.report.scales import evenly, log_ticks, short
from bnbench.report.summaries import Band

_HEIGHT, _LEFT = 255.0, 60.0
_COLOURS = "viridis"
_Key = TypeVar("_Key")
#: A heat map has no more columns than this; of more readings, so many evenly spaced ones are shown.
_MOST_COLUMNS = 40


def draw_value_curves(
    name: str, cell: str, quantity: Quantity, bands: Mapping[str, Band], styles: Mapping[str, ArmStyle]
) -> Drawing:
    """A value of a probe over steps: the median of each arm and its interquartile range."""
    with house_style():
        figure, axes = panel(_HEIGHT, bands, styles, left=_LEFT)
        for arm, band in _on_scale(quantity, bands).items():
            _draw_band(axes, band, styles[arm])
        _scale_height(axes, quantity, bands.values())
        _scale_steps(axes, bands.values())
        axes.set_xlabel("training step")
        axes.set_ylabel(quantity.words)
        return finish(figure, name, f"{_sentence(quantity.words)} while training, {cell}")


def draw_depth_curves(
    name: str,
    cell: str,
    quantity: Quantity,
    moments: Mapping[str, Mapping[str, Band]],
    styles: Mapping[str, ArmStyle],
) -> Drawing:
    """A series over depth, a panel a moment: the median of each arm and its interquartile range."""
    with house_style():
        arms = dict.fromkeys(arm for bands in moments.values() for arm in bands)
        every = {(moment, arm): band for moment, bands in moments.items() for arm, band in bands.items()}
        figure, whole = panel(_HEIGHT, arms, styles, left=_LEFT)
        panels = _split(figure, whole, list(moments), columns=len(moments))
        places = dict(zip(moments, panels, strict=True))
        for (moment, arm), band in _on_scale(quantity, every).items():
            _draw_band(places[moment], band, styles[arm])
        for axes in panels:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axes.set_xlabel("layer")
        panels[0].set_xlim(left=0.5)
        _scale_height(panels[0], quantity, every.values())
        panels[0].set_ylabel(quantity.words)
        return finish(figure, name, f"{_sentence(quantity.words)} by layer, {cell}")


def draw_ranges(
    name: str, cell: str, quantity: Quantity, bands: Mapping[str, Band], styles: Mapping[str, ArmStyle]
) -> Drawing:
    """From the smallest to the largest number of a series over steps, a panel an arm, on one scale."""
    with house_style():
        figure, panels = _panel_an_arm(bands, quantity.words)
        for axes, (arm, band) in zip(panels, _on_scale(quantity, bands).items(), strict=True):
            looks: dict[str, Any] = {"color": styles[arm].colour, "alpha": 0.3, "linewidth": 0}
            axes.fill_between(band.steps, band.low, band.high, **looks)
            for edge in (band.low, band.high):
                axes.plot(band.steps, edge, color=styles[arm].colour, linewidth=1.2)
        _scale_height(panels[0], quantity, bands.values())
        _scale_steps(panels[0], bands.values(), most=3)
        return finish(figure, name, f"{_sentence(quantity.words)} while training, {cell}")


def draw_heat_maps(
    name: str, cell: str, quantity: Quantity, grids: Mapping[str, Grid], styles: Mapping[str, ArmStyle]
) -> Drawing:
    """A series by layer and step in colours, a panel an arm: a column is a reading, a row a layer.

    The styles of arms are not used: all arms have the same colours.
    """
    steps = sorted({step for grid in grids.values() for step in grid.steps})
    steps = [steps[place] for place in evenly(len(steps), _MOST_COLUMNS)]
    numbers = [n for grid in grids.values() for row in grid.rows for n in row]
    log = quantity.is_log(numbers)
    shown = [_colour_number(n, log) for n in numbers]
    finite = [n for n in shown if math.isfinite(n)] or [0.0]
    limits = (min(finite), max(finite))
    with house_style():
        figure, panels = _panel_an_arm(grids, "layer", top=42.0)
        for axes, grid in zip(panels, grids.values(), strict=True):
            rows = [dict(zip(grid.steps, row, strict=True)) for row in grid.rows]
            axes.imshow(
                [[_colour_number(row.get(step, math.nan), log) for step in steps] for row in rows],
                aspect="auto", origin="lower", interpolation="none", cmap=_COLOURS, vmin=limits[0],
                vmax=limits[1], extent=(-0.5, len(steps) - 0.5, 0.5, len(rows) + 0.5),
            )  # fmt: skip
            axes.grid(False)
        places = evenly(len(steps), 3)
        panels[0].set_xticks(places, [str(steps[place]) for place in places])
        panels[0].set_ylim(0.5, max(len(grid.rows) for grid in grids.values()) + 0.5)
        panels[0].yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        _draw_colour_bar(figure, panels[0], quantity.words, limits, log)
        return finish(figure, name, f"{_sentence(quantity.words)} by layer and training step, {cell}")


def _panel_an_arm(arms: Iterable[str], height_words: str, *, top: float = 0.0) -> tuple[Figure, list[Any]]:
    """Panels over training steps, up to three a line, with scales in common."""
    names = list(arms)
    columns = {1: 1, 2: 2, 4: 2}.get(len(names), 3)
    lines = math.ceil(len(names) / columns)
    figure, whole = panel(54 + top + (112.0 if lines > 1 else 150.0) * lines, {}, {})
    titles = [cut(arm, 44 // columns) for arm in names]
    panels = _split(figure, whole, titles, columns=columns, top=top)
    for part in panels[-columns:]:
        part.set_xlabel("training step")
    middle = (panels[0].get_position().y1 + panels[-1].get_position().y0) / 2
    figure.text(0.005, middle, height_words, rotation=90, va="center", fontsize=10.5)
    return figure, panels


def _split(figure: Figure, axes: Any, titles: Sequence[str], *, columns: int, top: float = 0.0) -> list[Any]:
    """Put panels with scales in common in the place of one, so many a line, each under its title.

    `top` pixels stay free above them.
    """
    width, height = (72 * side for side in figure.get_size_inches())
    box = axes.get_position()
    axes.remove()
    gap, title = 14.0, 20.0
    lines = math.ceil(len(titles) / columns)
    wide = (box.width * width - gap * (columns - 1)) / columns
    tall = (box.height * height - top) / lines - title
    panels: list[Any] = []
    for i, text in enumerate(titles):
        line, column = divmod(i, columns)
        left = box.x0 + column * (wide + gap) / width
        bottom = box.y1 - (top + (line + 1) * (title + tall)) / height
        shared = panels[0] if panels else None
        part = figure.add_axes((left, bottom, wide / width, tall / height), sharex=shared, sharey=shared)
        part.set_title(text, loc="left", pad=3, fontsize=10.5)
        part.tick_params(labelleft=column == 0, labelbottom=i + columns >= len(titles))
        panels.append(part)
    return panels


def _draw_band(axes: Any, band: Band, style: ArmStyle) -> None:
    axes.fill_between(band.steps, band.low, band.high, color=style.colour, alpha=0.18, linewidth=0)
    # A single point has no line.
    marker = style.marker if len(band.steps) == 1 else ""
    axes.plot(
        band.steps, band.middle, color=style.colour, linestyle=style.dashes, linewidth=1.8, marker=marker,
        markersize=5,
    )  # fmt: skip


def _on_scale(quantity: Quantity, bands: Mapping[_Key, Band]) -> dict[_Key, Band]:
    """The bands with gaps where a logarithmic scale has no place for them."""
    if not quantity.is_log(_numbers(bands.values())):
        return dict(bands)

    def kept(side: Sequence[float]) -> tuple[float, ...]:
        return tuple(number if number > 0 else math.nan for number in side)

    return {
        key: Band(band.steps, kept(band.low), kept(band.middle), kept(band.high))
        for key, band in bands.items()
    }


def _numbers(bands: Iterable[Band]) -> list[float]:
    return [number for band in bands for side in (band.low, band.middle, band.high) for number in side]


def _scale_height(axes: Any, quantity: Quantity, bands: Iterable[Band]) -> None:
    """The scale of the quantity, with its line to compare with."""
    numbers = _numbers(bands)
    if quantity.reference is not None:
        axes.axhline(quantity.reference, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.7)
        numbers.append(quantity.reference)
    if quantity.is_log(numbers):
        positive = [n for n in numbers if n > 0]
        room = (max(positive) / min(positive)) ** 0.04 if max(positive) > min(positive) else 1.2
        low, high = min(positive) / room, max(positive) * room
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: short(number)))


def _scale_steps(axes: Any, bands: Iterable[Band], most: int = 6) -> None:
    """Steps on a linear scale, or a logarithmic one after the first where readings are ever farther apart."""
    steps = sorted({step for band in bands for step in band.steps})
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    if gaps and max(gaps) > 10 * min(gaps):
        first = min(step for step in steps if step > 0)
        axes.set_xscale("symlog", linthresh=first, linscale=0.4)
        axes.set_xlim(-0.3 * first, 1.2 * steps[-1])
        powers = [step for step in (10.0**k for k in range(9)) if first <= step <= steps[-1]]
        axes.xaxis.set_major_locator(FixedLocator([0.0, *powers]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))


def _draw_colour_bar(figure: Figure, first: Any, words: str, limits: tuple[float, float], log: bool) -> None:
    """What the colours mean, above the panels."""
    height = 72 * figure.get_size_inches()[1]
    left = first.get_position().x0
    figure.text(left, 1 - 12 / height, words, va="center", fontsize=10.5)
    low, high = limits if limits[1] > limits[0] else (limits[0] - 0.5, limits[1] + 0.5)
    bar = figure.add_axes((left, 1 - 30 / height, 0.6, 9 / height))
    bar.imshow(
        [[i / 63 for i in range(64)]], aspect="auto", interpolation="none", cmap=_COLOURS,
        extent=(low, high, 0, 1),
    )  # fmt: skip
    bar.grid(False)
    if log:
        ticks = log_ticks(10**low, 10**high)
        ticks = ticks[:: math.ceil(len(ticks) / 5)]  # words of five letters and more
        bar.set_xticks([math.log10(tick) for tick in ticks], [short(tick) for tick in ticks])
    else:
        bar.xaxis.set_major_locator(MaxNLocator(5))
    bar.set_yticks([])


def _colour_number(number: float, log: bool) -> float:
    if not log:
        return number if math.isfinite(number) else math.nan
    return math.log10(number) if 0 < number < math.inf else math.nan


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]
