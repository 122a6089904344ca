"""Which figures a report draws of the traces of probes, and what they say in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from bnbench.probes import Trace
from bnbench.report.album import Album
from bnbench.report.drawing import ArmStyle, Drawing, Group
from bnbench.report.gradient_growth import growth_group
from bnbench.report.probe_figures import (
    draw_depth_curves,
    draw_heat_maps,
    draw_ranges,
    draw_value_curves,
)
from bnbench.report.probe_summaries import (
    Grid,
    grid_of,
    range_by_step,
    series_at,
    traces_of,
    value_by_step,
)
from bnbench.report.probe_views import VIEWS, Quantity, View, plain_view
from bnbench.report.result import StudyResult
from bnbench.report.summaries import Band

_LINES = (
    " Line: median over the replicates with probes. Band: their middle half. A training that diverges counts"
    " up to its last reading."
)
_COLOURS = " Heat maps show medians, a column a reading, blank where there is none."


def probe_groups(album: Album, name: str, result: StudyResult, styles: Mapping[str, ArmStyle]) -> list[Group]:
    """The figures of all that probes recorded in a study; none where no row has a trace.

    Each arm is shown at its own setting. A probe without a view of its own, as from a plug-in, has its values
    drawn over steps.
    """
    by_cell = {cell.name: traces_of(result, cell.name) for cell in result.design.cells}
    recorded = {probe for traces in by_cell.values() for probe in traces}
    groups = [growth_group(album, name, result, styles)]
    ordered = (*(probe for probe in VIEWS if probe in recorded), *sorted(recorded - VIEWS.keys()))
    for number, probe in enumerate(ordered, start=1):
        cells = {cell: traces[probe] for cell, traces in by_cell.items() if probe in traces}
        view = VIEWS.get(probe) or plain_view(probe, _values(cells.values()))
        drawings = [
            drawing
            for i, (cell, arms) in enumerate(cells.items(), start=1)
            for drawing in _drawings(album, f"{name}-probe-{number}-{i}", view, cell, arms, styles)
        ]
        caption = view.caption + _LINES + _COLOURS * bool(view.heat_maps)
        groups.append(Group(view.title, caption, tuple(drawings)))
    return [group for group in groups if group.drawings]


def _values(cells: Iterable[Mapping[str, Sequence[Trace]]]) -> dict[str, None]:
    """The names of all values that some traces have, in their order."""
    return dict.fromkeys(
        value for arms in cells for traces in arms.values() for trace in traces for value in trace.values
    )


def _drawings(
    album: Album,
    stem: str,
    view: View,
    cell: str,
    arms: Mapping[str, Sequence[Trace]],
    styles: Mapping[str, ArmStyle],
) -> list[tuple[str, Drawing]]:
    """The figures of a probe in one cell that have something to show, each under its label."""
    kinds: tuple[tuple[tuple[Quantity, ...], Callable[..., Any], Callable[..., Drawing], str], ...] = (
        (view.ranges, partial(_over_steps, range_by_step), draw_ranges, ""),
        (view.curves, partial(_over_steps, value_by_step), draw_value_curves, ""),
        (view.depths, _over_depth, draw_depth_curves, " over depth"),
        (view.heat_maps, partial(_over_steps, grid_of), draw_heat_maps, " by layer and step"),
    )
    drawings: list[tuple[str, Drawing]] = []
    for quantities, summarize, draw, how in kinds:
        for quantity in quantities:
            if found := summarize(arms, quantity.name):
                name = f"{stem}-{len(drawings) + 1}"
                drawing = album.draw(draw, name, cell, quantity, found, styles)
                drawings.append((f"{cell} · {quantity.words}{how}", drawing))
    return drawings


def _over_steps(
    summarize: Callable[[Sequence[Trace], str], Band | Grid | None],
    arms: Mapping[str, Sequence[Trace]],
    quantity: str,
) -> dict[str, Band | Grid]:
    """What is there of every arm, where some arm has more than one reading."""
    found = {arm: summary for arm, traces in arms.items() if (summary := summarize(traces, quantity))}
    return found if any(len(summary.steps) > 1 for summary in found.values()) else {}


def _over_depth(arms: Mapping[str, Sequence[Trace]], quantity: str) -> dict[str, dict[str, Band]]:
    """A series of every arm at the first and at the last step at which some arm has a number."""
    steps = sorted({step for traces in arms.values() for trace in traces for step in trace.steps})
    by_step = {
        step: {arm: band for arm, traces in arms.items() if (band := series_at(traces, quantity, step))}
        for step in steps
    }
    known = [step for step in steps if by_step[step]]
    ends = dict.fromkeys((known[0], known[-1])) if known else {}
    return {f"after step {step}" if step else "before training": by_step[step] for step in ends}
