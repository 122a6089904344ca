"""What probes recorded is in the report: its figures show the numbers of the traces and say what they are."""

import base64
import io
import itertools
import math
import re
import statistics
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from bnbench.probes import PROBES, Moment, Trace, build_probe
from bnbench.report import Report, StudyResult, write_report
from bnbench.report.album import Album
from bnbench.report.drawing import Group, arm_styles
from bnbench.report.gradient_growth import draw_growth, growth_by_batch_size, growth_group
from bnbench.report.probe_figures import draw_heat_maps, draw_value_curves
from bnbench.report.probe_gallery import probe_groups
from bnbench.report.probe_summaries import Grid, grid_of, range_by_step, series_at, traces_of, value_by_step
from bnbench.report.probe_views import VIEWS, Quantity
from bnbench.report.scales import evenly, log_ticks, short
from bnbench.report.summaries import Band
from bnbench.study import Table
from bnbench.study.estimands.gradients import mean_field_factor
from tests.doctored_traces import ARMS, LAYERS, SIZES, STEPS, traced_result, traced_study
from tests.test_report import Page

STYLES = arm_styles(arm.name for arm in ARMS)
NUMBERS = np.random.default_rng(0)


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return traced_result(traced_study())


@pytest.fixture(scope="module")
def groups(result: StudyResult) -> list[Group]:
    return probe_groups(Album(), "study-gradient-flow-quick", result, STYLES)


@pytest.fixture(scope="module")
def folder(result: StudyResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(Report((result,), ()), tmp_path_factory.mktemp("report")).parent


def some_traces(shape: tuple[int, int, int]) -> tuple[np.ndarray[Any, Any], list[Trace]]:
    """Random numbers by replicate, step and layer, some of them missing, as traces."""
    numbers = np.exp(NUMBERS.normal(size=shape))
    numbers[NUMBERS.random(shape) < 0.1] = math.nan
    steps = tuple(range(0, 10 * shape[1], 10))
    names = tuple(map(str, range(shape[2])))
    return numbers, [
        Trace("layer", names, steps, {"v": tuple(rows[:, 0])}, {"s": tuple(map(tuple, rows))})
        for rows in numbers
    ]


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def images(svg: str) -> list[np.ndarray[Any, Any]]:
    """The pictures of a figure in their order."""
    found = re.findall(r'href="data:image/png;base64,([^"]+)"', svg)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_a_value_is_summed_up_by_its_median_and_quartiles() -> None:
    numbers, traces = some_traces((5, 7, 3))
    band = value_by_step(traces, "v")
    assert band is not None and band.steps == traces[0].steps
    for side, share in ((band.low, 25), (band.middle, 50), (band.high, 75)):
        np.testing.assert_allclose(side, np.nanpercentile(numbers[:, :, 0], share, axis=0))


def test_a_series_is_summed_up_by_layer_at_a_step_and_over_all_steps() -> None:
    numbers, traces = some_traces((4, 6, 5))
    medians = np.nanmedian(numbers, axis=0)
    band, grid = series_at(traces, "s", 20), grid_of(traces, "s")
    assert band is not None and grid is not None
    assert band.steps == (1, 2, 3, 4, 5) and grid.steps == traces[0].steps
    np.testing.assert_allclose(band.middle, medians[2])
    np.testing.assert_allclose(grid.rows, medians.T)


def test_a_range_spans_the_medians_of_both_ends_and_leaves_out_broken_readings() -> None:
    numbers, traces = some_traces((6, 5, 4))
    numbers[:, 3] = math.nan
    broken = np.isnan(numbers).any(axis=2, keepdims=True)
    whole = np.where(broken, math.nan, numbers)
    traces = [
        replace(t, series={"s": tuple(map(tuple, rows))}) for t, rows in zip(traces, numbers, strict=True)
    ]
    band = range_by_step(traces, "s")
    assert band is not None
    there = [i for i in range(5) if not np.isnan(whole[:, i]).all()]
    assert band.steps == tuple(10 * i for i in there) and 3 not in there
    np.testing.assert_allclose(band.low, np.nanmedian(whole[:, there].min(axis=2), axis=0))
    np.testing.assert_allclose(band.high, np.nanmedian(whole[:, there].max(axis=2), axis=0))


def test_what_no_trace_has_is_nothing() -> None:
    _, traces = some_traces((2, 2, 2))
    lost = [replace(t, values={"v": (math.nan,) * 2}, series={"s": ((math.nan,) * 2,) * 2}) for t in traces]
    for some in (traces, lost, []):
        name = {"v": "other", "s": "other"} if some is traces else {"v": "v", "s": "s"}
        assert value_by_step(some, name["v"]) is None
        assert (
            range_by_step(some, name["s"])
            is grid_of(some, name["s"])
            is series_at(some, name["s"], 0)
            is None
        )


def test_replicates_with_readings_at_other_steps_are_read_where_they_are() -> None:
    traces = [Trace(steps=(0, 10), values={"v": (1.0, 2.0)}), Trace(steps=(0, 5), values={"v": (3.0, 4.0)})]
    band = value_by_step(traces, "v")
    assert band is not None and (band.steps, band.middle) == ((0, 5, 10), (2.0, 4.0, 2.0))


@pytest.mark.parametrize("log", [True, False])
def test_a_heat_map_has_the_colour_of_every_number(log: bool) -> None:
    rows = np.exp(NUMBERS.normal(size=(2, 3, 4)))
    rows[0, 1, 2] = math.nan
    grids = {"none": Grid((0, 5, 10, 40), tuple(map(tuple, rows[0]))),
             "batch": Grid((0, 5, 10, 40), tuple(map(tuple, rows[1])))}  # fmt: skip
    drawing = draw_heat_maps("n", "cell", Quantity("s", "words", log=log), grids, STYLES)
    shown = np.log(rows) if log else rows
    low, high = np.nanmin(shown), np.nanmax(shown)
    *panels, scale = images(drawing.svg)
    colours = matplotlib.colormaps["viridis"]((shown - low) / (high - low), bytes=True)
    colours[0, 1, 2] = 0
    for panel, expected in zip(panels, colours, strict=True):
        assert np.abs(panel.astype(int) - expected).max() <= 1
    # The first row of each picture, the first layer, is at the bottom: it is drawn upside down.
    assert len(re.findall(r'transform="matrix\([\d.]+ 0 0 -[\d.]+ ', drawing.svg)) == 2
    again = draw_heat_maps("n", "cell", Quantity("s", "words", log=log), grids, STYLES)
    assert again == drawing
    assert (scale[0, 0] == matplotlib.colormaps["viridis"](0.0, bytes=True)).all()
    assert (scale[0, -1] == matplotlib.colormaps["viridis"](1.0, bytes=True)).all()


def test_a_heat_map_lines_up_arms_with_other_steps_and_stays_small() -> None:
    short_arm = Grid((0, 20), ((1.0, 2.0),))
    long_arm = Grid((0, 10, 20), ((3.0, 4.0, 5.0),))
    grids = {"none": short_arm, "batch": long_arm}
    first, second, _ = images(draw_heat_maps("n", "cell", Quantity("s", "w"), grids, STYLES).svg)
    assert [alpha > 0 for alpha in first[0, :, 3]] == [True, False, True]
    assert second[0, :, 3].all()
    steps = tuple(range(1000))
    huge = Grid(steps, tuple(tuple(NUMBERS.random(1000)) for _ in range(80)))
    drawing = draw_heat_maps("n", "cell", Quantity("s", "w"), dict.fromkeys(STYLES, huge), STYLES)
    assert images(drawing.svg)[0].shape[:2] == (80, 40)
    assert len(drawing.svg) < 80_000


def test_curves_with_a_zero_keep_it_and_those_over_decades_are_logarithmic() -> None:
    wide = {"none": Band((0, 10), (1e-4, 1.0), (1e-3, 1.0), (1e-2, 1.0))}
    zero = {"none": Band((0, 10), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0))}
    texts = [
        [
            text.text
            for text in drawn(draw_value_curves("n", "c", Quantity("v", "w"), bands, STYLES).svg).iter()
            if text.text
        ]
        for bands in (wide, zero)
    ]
    assert {"0.001", "0.01", "0.1"} <= set(texts[0])
    assert {"0", "0.2", "0.4"} <= set(texts[1])


def test_a_zero_on_a_logarithmic_scale_is_a_gap() -> None:
    ends = {"none": Band((0, 10, 20), (1.0, 0.1, 0.0), (2.0, 0.2, 0.0), (3.0, 0.3, 0.0))}
    shorter = {"none": Band((0, 10), (1.0, 0.1), (2.0, 0.2), (3.0, 0.3))}
    quantity = Quantity("v", "w", log=True)
    svgs = [draw_value_curves("n", "c", quantity, bands, STYLES).svg for bands in (ends, shorter)]
    lines = [re.findall(r'<path d="([^"]+)"[^>]*stroke-width: 1.8', svg) for svg in svgs]
    assert [path[0].count("L") for path in lines] == [1, 1]


@given(st.floats(1e-30, 1e30), st.floats(1.001, 1e40))
def test_a_logarithmic_scale_has_some_round_numbers_between_its_ends(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))
    assert low <= ticks[0] and ticks[-1] <= low * ratio


@given(st.floats(-1e12, 1e12).filter(lambda n: n == 0 or abs(n) > 1e-12))
def test_a_short_number_is_the_number(number: float) -> None:
    read = float(short(number).replace("−", "-"))
    assert math.isclose(read, number, rel_tol=0.006, abs_tol=0.0)
    assert len(short(number)) <= 9


@given(st.integers(1, 300), st.integers(2, 40))
def test_places_are_evenly_spaced_from_the_first_to_the_last(count: int, most: int) -> None:
    places = evenly(count, most)
    assert len(places) == min(count, most) and (places[0], places[-1]) == (0, count - 1)
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_every_view_shows_what_its_probe_records() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.Linear(8, 3))
    x, y = torch.randn(128, 8, generator=generator), torch.randint(3, (128,), generator=generator)
    assert PROBES.keys() == VIEWS.keys()
    for name, view in VIEWS.items():
        reading = build_probe(name).measure(model, x, y, Moment(0, 0.1, 16, (x, y)))
        assert {q.name for q in view.curves} <= reading.values.keys(), name
        assert {q.name for q in (*view.ranges, *view.depths, *view.heat_maps)} <= reading.series.keys(), name
        assert view.curves


def test_a_report_shows_every_probe_in_every_cell_with_its_words(groups: list[Group], folder: Path) -> None:
    assert [group.title for group in groups] == [
        "Gradient growth against its theory", "Gradient flow", "The loss along its gradient",
        "Probe: a plug-in's",
    ]  # fmt: skip
    labels = {group.title: [label for label, _ in group.drawings] for group in groups}
    deep = [f"deep mlp · batch_size={size} · gradient norm over depth" for size in SIZES]
    assert labels["Gradient flow"] == [
        "mlp · digits · gradient growth per layer, ×", "mlp · digits · gradient norm over depth",
        "mlp · digits · gradient norm by layer and step", *deep,
    ]  # fmt: skip
    assert labels["Probe: a plug-in's"] == ["mlp · digits · some value"]
    source = (folder / "index.html").read_text()
    page = Page(source)
    text = " ".join(page.text.split())
    for group in groups:
        assert group.title in text and group.caption in text
        assert all(label in text for label, _ in group.drawings)
        for _, drawing in group.drawings:
            figure = folder / "figures" / f"{drawing.name}.svg"
            assert drawn(figure.read_text())[0].text == drawing.title
            assert figure.stat().st_size < 30_000
    assert len(page.ids) == len(set(page.ids)) and any(target.startswith("data:") for target in page.loads)
    for target in page.loads:
        assert target.startswith("data:image/png;base64,") or target[1:] in page.ids


def test_a_depth_curve_compares_the_first_reading_with_the_last(groups: list[Group]) -> None:
    found = {label: drawing for group in groups for label, drawing in group.drawings}
    svg = found["mlp · digits · gradient norm over depth"].svg
    assert ">before training<" in svg and f">after step {STEPS[-1]}<" in svg
    single = found["deep mlp · batch_size=8 · gradient norm over depth"].svg
    assert ">before training<" in single and ">after step" not in single


def test_names_that_differ_in_signs_alone_have_figures_of_their_own(result: StudyResult) -> None:
    trace = Trace(steps=(0, 1), values={"v": (1.0, 2.0)})
    rows = result.table.of(cell="mlp · digits", arm="batch")
    own = tuple(replace(e, result=replace(e.result, traces={"a_b": trace, "a-b": trace})) for e in rows)
    found = probe_groups(Album(), "study", replace(result, table=Table(own)), STYLES)
    assert [group.title for group in found] == ["Probe: a-b", "Probe: a b"]
    assert len({drawing.name for group in found for _, drawing in group.drawings}) == 2


def test_rows_at_another_setting_than_their_own_and_without_traces_draw_nothing(result: StudyResult) -> None:
    bare = [replace(e, result=replace(e.result, traces={})) for e in result.table.entries if e.role == "own"]
    tuned = [
        replace(e, role=role) for e in result.table.entries if e.role == "own" for role in ("tune", "common")
    ]
    for entries in (bare, tuned):
        assert probe_groups(Album(), "study", replace(result, table=Table(tuple(entries))), STYLES) == []


def test_a_sweep_shows_the_best_of_each_grid(result: StudyResult) -> None:
    study = replace(result.study, program="sweep")
    own = [replace(e, role="sweep") for e in result.table.entries if e.role == "own"]
    worse = [replace(e, result=replace(e.result, metrics={"val/acc": 0.2}, traces={
        "gradient_flow": Trace(steps=(0,), values={"factor": (99.0,)})})) for e in own]  # fmt: skip
    swept = replace(result, study=study, table=Table((*worse, *own)))
    traces = traces_of(swept, "mlp · digits")["gradient_flow"]["batch"]
    assert len(traces) == result.design.replicates and all(len(t.index) == LAYERS for t in traces)


def test_growth_is_read_before_training_at_every_batch_size(result: StudyResult) -> None:
    ((setting, factors),) = growth_by_batch_size(result).items()
    assert setting == "deep mlp" and set(factors) == {"none", "batch", "layer"}
    for size in SIZES:
        recorded = [
            e.result.traces["gradient_flow"].values["factor"][0]
            for e in result.table.of(cell=f"deep mlp · batch_size={size}", arm="batch", roles=("own",))
        ]
        assert factors["batch"][size] == recorded and len(recorded) == result.design.replicates


def test_growth_is_drawn_beside_the_theory_and_only_in_its_study(
    result: StudyResult, groups: list[Group]
) -> None:
    ((setting, drawing),) = groups[0].drawings
    assert setting == "deep mlp" and ">mean-field theory<" in drawing.svg
    other = replace(result, study=replace(result.study, name="other"))
    assert growth_group(Album(), "study", other, STYLES).drawings == ()
    few = [e for e in result.table.entries if not e.cell.endswith("=8")]
    assert growth_by_batch_size(replace(result, table=Table(tuple(few)))) == {}
    without = [e for e in result.table.entries if e.arm != "batch"]
    assert growth_by_batch_size(replace(result, table=Table(tuple(without)))) == {}


def test_the_marks_of_growth_lie_on_the_theory_where_the_numbers_do() -> None:
    exact = {size: [mean_field_factor(size)] for size in (8, 32, 128)}
    svg = draw_growth("n", "s", {"batch": exact}, arm_styles(["batch"])).svg
    line = max(re.findall(r'<path d="([^"]+)"[^>]*stroke-dasharray', svg), key=len)
    curve = [tuple(map(float, point.split())) for point in re.findall(r"[ML] ([\d.]+ [\d.]+)", line)]
    marks = [tuple(map(float, place)) for place in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg)]
    for x, y in (curve[0], curve[-1]):
        near = [mark for mark in marks if math.dist(mark, (x, y)) < 0.1]
        # A replicate, and the mean of them.
        assert len(near) == 2, (x, y)
    assert statistics.fmean(y for _, y in curve) > curve[0][1]
