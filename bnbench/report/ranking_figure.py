"""Critical-difference diagrams: mean ranks, one below the other, and bars that join what is level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
)
from bnbench.report.ranking import Ranking

_ROW, _HEAD, _FOOT = 15.0, 26.0, 40.0
#: The room of a bar, in CSS pixels, and the most bars that have room.
_BAR, _MOST_BARS = 5.0, 16


def draw_ranking(name: str, title: str, ranking: Ranking, styles: Mapping[str, ArmStyle]) -> Drawing:
    """The mean ranks of a cell, the best first; bars on the right join arms that are not told apart.

    A bar spans a largest set of arms of which no two mean ranks differ by more than the critical difference,
    which is drawn to scale on top (Demšar 2006, figure 1, turned by a quarter). The accuracy is a number.
    """
    places = ranking.places
    rows = {place.arm: i for i, place in enumerate(places)}
    lanes = bars_in_lanes([(rows[group[0]], rows[group[-1]]) for group in ranking.groups])
    names = [cut(place.arm, 30) for place in places]
    height = _HEAD + _ROW * len(places) + _FOOT
    left = 42.0 + 5.4 * max(map(len, names))
    right = 10.0 + _BAR * min(len(lanes), _MOST_BARS)
    with house_style():
        figure = new_figure(WIDTH, height)
        axes = figure.add_axes(
            (left / WIDTH, _FOOT / height, (WIDTH - left - right) / WIDTH, _ROW * len(places) / height)
        )
        first, last = 1.0, float(len(places))
        room = 0.02 * (last - first)
        axes.set_xlim(first - room, last + room)
        axes.set_ylim(len(places) - 0.5, -0.5)
        for i, place in enumerate(places):
            style = styles[place.arm]
            axes.plot([first - room, place.rank], [i, i], color=style.colour, linewidth=0.8, alpha=0.5)
            axes.plot([place.rank], [i], color=style.colour, marker=style.marker, markersize=5, clip_on=False)
        labels = [f"{name}  {place.accuracy.value:.1f}" for name, place in zip(names, places, strict=True)]
        axes.set_yticks(range(len(places)), labels, fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("mean rank")
        for lane, bars in enumerate(lanes[:_MOST_BARS]):
            x = 1 + (6.0 + _BAR * lane) / (WIDTH - left - right)
            for start, end in bars:
                axes.plot(
                    [x, x], [start - 0.3, end + 0.3], transform=axes.get_yaxis_transform(), color=INK,
                    linewidth=2.2, alpha=0.75, solid_capstyle="butt", clip_on=False,
                )  # fmt: skip
        reach = min(first + ranking.difference, last)
        axes.plot(
            [first, reach], [-1.0, -1.0], color=INK, linewidth=2.2, solid_capstyle="butt", clip_on=False
        )
        axes.text(first, -1.25, f"critical difference {ranking.difference:.1f}", fontsize=9, va="bottom")
        return finish(figure, name, title)


def bars_in_lanes(bars: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Lay bars from the first row to the last into as few lanes as keep them apart, the upper ones first."""
    lanes: list[list[tuple[int, int]]] = []
    for start, end in sorted(bars):
        lane = next((lane for lane in lanes if lane[-1][1] < start), None)
        if lane is None:
            lanes.append(lane := [])
        lane.append((start, end))
    return lanes
