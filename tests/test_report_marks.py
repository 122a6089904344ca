"""No training disappears from a figure: diverged ones are crosses, far ones triangles, and dots are links."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.report import Report, summaries, write_report
from bnbench.report.drawing import (
    Dot,
    arm_styles,
    cut,
    draw_dots,
    fence,
    house_style,
    log_axis,
    new_figure,
    panel,
)
from bnbench.report.figures import draw_replicates, draw_sweep
from bnbench.report.forest import ForestRow, draw_forest
from bnbench.report.summaries import Sweep
from tests.doctored_results import doctored_report, wide_report
from tests.test_report import Page
from tests.test_report_sentences import verdict

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def wide() -> Report:
    return wide_report(6, links=True)


@pytest.fixture(scope="module")
def folder(wide: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(wide, tmp_path_factory.mktemp("report")).parent


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def collections_of(dots: list[Dot], limits: tuple[float, float], along: Any) -> list[Any]:
    """What is drawn of some dots: a collection for each kind of mark."""
    with house_style():
        axes = new_figure(100, 100).add_axes((0, 0, 1, 1))
        draw_dots(axes, dots, limits, along=along, color="#102030", s=20, marker="o")
    return list(axes.collections)


def kind_of(collection: Any) -> str:
    """The mark of a collection: a cross has two lines, a triangle three corners, a circle is curved."""
    (path,) = collection.get_paths()
    codes = [] if path.codes is None else list(path.codes)
    if codes == [path.MOVETO, path.LINETO] * 2:
        return "x"
    return "o" if path.CURVE4 in codes else "triangle"


@given(
    st.lists(
        st.tuples(st.floats(0, 9), st.floats(-20, 20), st.booleans()), min_size=1, max_size=12, unique=True
    )
)
def test_every_dot_is_drawn_once_and_within_the_limits(points: list[tuple[float, float, bool]]) -> None:
    found: dict[str, list[tuple[float, ...]]] = {}
    for collection in collections_of([Dot(*point) for point in points], (-5.0, 5.0), "y"):
        places = [tuple(map(float, offset)) for offset in collection.get_offsets()]
        found.setdefault(kind_of(collection), []).extend(places)
    placed = [(x, min(max(y, -5.0), 5.0), lost, not -5 <= y <= 5) for x, y, lost in points]
    expected = {
        "x": [(x, y) for x, y, lost, _ in placed if lost],
        "o": [(x, y) for x, y, lost, far in placed if not lost and not far],
        "triangle": [(x, y) for x, y, lost, far in placed if not lost and far],
    }
    assert {kind: sorted(places) for kind, places in found.items()} == {
        kind: sorted(places) for kind, places in expected.items() if places
    }


@pytest.mark.parametrize(("axis", "value"), [("x", 9), ("x", -9), ("y", 9), ("y", -9)])
def test_the_edge_triangle_points_where_the_value_lies(axis: Any, value: float) -> None:
    (mark,) = collections_of([Dot(value, 0) if axis == "x" else Dot(0, value)], (-1.0, 1.0), axis)
    (path,) = mark.get_paths()
    corners = path.vertices[:3, 0 if axis == "x" else 1]
    # The tip lies alone on its side of the middle.
    beyond = sum(corners > corners.mean()) == 1
    assert kind_of(mark) == "triangle" and beyond == (value > 0)


@given(st.lists(st.lists(st.floats(0.1, 0.9), min_size=1, max_size=10), min_size=1, max_size=4))
def test_a_scale_holds_every_mean_and_lies_within_the_values(groups: list[list[float]]) -> None:
    low, high = fence(groups, 0.005)
    every = [v for values in groups for v in values]
    assert min(every) <= low + 1e-12 and high - 1e-12 <= max(every)
    for values in groups:
        assert low - 1e-12 <= sum(values) / len(values) <= high + 1e-12


def test_a_scale_leaves_out_what_is_far() -> None:
    close = [0.90, 0.905, 0.91, 0.915, 0.92, 0.91, 0.9, 0.92, 0.91]
    assert fence([close, close], 0.005) == (0.90, 0.92)
    low, _ = fence([[*close, 0.1]], 0.005)
    assert 0.1 < low < 0.85


def test_a_forest_shows_who_diverged_and_who_is_beyond() -> None:
    values = (1.0, 1.2, 0.9, 1.1, 1.05, 1.0, 1.1, 0.95, 1.0, 60.0)
    found = verdict("mlp", "SUPPORTED", 1.1, values=values)
    plain = draw_forest("f", "t", [ForestRow("mlp", replace(found, values=values[:9]))], in_delta=False)
    assert "diverged" not in plain.svg and "beyond the scale" not in plain.svg
    row = ForestRow("mlp", found, diverged={3})
    svg = draw_forest("f", "t", [row], in_delta=False).svg
    assert ">diverged<" in svg and ">beyond the scale<" in svg
    # Ten replicates, the mean, the two marks of the legend.
    assert len(drawn(svg).findall(f".//{SVG}use")) - ticks(svg) == 10 + 1 + 2


def ticks(svg: str) -> int:
    """How many marks of an SVG are ticks of its axes."""
    return len([1 for use in re.findall(r"<use [^>]*>", svg) if "stroke-width: 0.8" in use])


def test_the_replicates_of_a_forest_that_diverged_are_those_of_the_rows(wide: Report) -> None:
    (result,) = wide.results
    by_name = {v.hypothesis: v for v in result.verdicts if v.cell == "mlp · mnist1d"}
    # In the doctored rows “none ×10” diverges in the replicates that 3 does not divide.
    assert summaries.diverged_replicates(result, by_name["C2.d"]) == {1, 2, 4, 5}
    assert summaries.diverged_replicates(result, by_name["C2.b"]) == frozenset()
    sweep = doctored_report(5).results[1]
    assert summaries.diverged_replicates(sweep, sweep.verdicts[0]) == frozenset()


def test_every_training_of_a_sweep_is_a_dot_and_diverged_ones_are_crosses() -> None:
    points = {r: ((0.1, 0.5 + r / 100), (1.0, 0.1)) for r in range(4)}
    found = Sweep(points, ((1.0, 0.1),), ((0.1, 0.515), (1.0, 0.1)), ((0.1, 0.2),))
    styles = arm_styles(["none"])
    svg = draw_sweep("s", "mlp", {"none": found}, styles).svg
    assert ">diverged<" in svg
    lost = draw_sweep("s", "mlp", {"none": replace(found, diverged=())}, styles).svg
    assert ">diverged<" not in lost
    # The legend's cross is there once more.
    assert len(re.findall("<use ", svg)) == len(re.findall("<use ", lost)) + 1


def test_diverged_confirmed_trainings_are_crosses_in_the_figure_of_replicates(folder: Path) -> None:
    assert ">diverged<" in (folder / "figures" / "study-init-stability-quick-replicates-1.svg").read_text()
    trainings = {"a": {r: Dot(0.9 + r / 1000, 0, diverged=r == 0) for r in range(6)}}
    one = draw_replicates("r", "c", trainings, arm_styles(["a"]), "test accuracy").svg
    assert ">diverged<" in one and ">beyond the scale<" not in one
    far = {"a": {**{r: Dot(0.9 + r / 1000, 0) for r in range(9)}, 9: Dot(0.1, 0, diverged=True)}}
    both = draw_replicates("r", "c", far, arm_styles(["a"]), "test accuracy").svg
    assert ">diverged<" in both and ">beyond the scale<" in both


def test_dots_of_confirmed_trainings_link_to_their_runs_and_nothing_else_does(
    wide: Report, folder: Path
) -> None:
    (result,) = wide.results
    page = (folder / "index.html").read_text()
    own = {e.trial.key for e in result.table.of(roles=("own",))}
    linked = [target for target in Page(page).loads if not target.startswith("#")]
    assert sorted(linked) == sorted(result.links[key] for key in own)
    # What opens beside the report is a training's mark: a dot, a triangle or, where it diverged, a cross.
    found = re.findall(r'<a href="http[^"]*" target="_blank"> *<(use|path) [^>]*/> *</a>', page)
    assert len(found) == len(linked)
    assert "A dot opens its run in the MLflow UI." in Page(page).text


def test_links_are_in_the_files_of_the_figures_and_cost_little(wide: Report, folder: Path) -> None:
    (result,) = wide.results
    svg = (folder / "figures" / "study-init-stability-quick-replicates-1.svg").read_text()
    own = result.table.of(cell="mlp · mnist1d", roles=("own",))
    links = re.findall(r'<a href="http://127\.0\.0\.1:5000/#/runs/\w{32}" target="_blank">', svg)
    assert len(links) == len(own) == 84
    ElementTree.fromstring(svg)
    page = (folder / "index.html").read_text()
    assert sum(map(len, re.findall(r"<a href=.http[^>]*>", page))) < 0.05 * len(page) < 30_000


def test_small_marks_of_a_log_axis_stand_between_its_numbers() -> None:
    with house_style():
        axes = new_figure(300, 200).add_axes((0.1, 0.1, 0.8, 0.8))
        axes.plot([0.01, 1.0], [0.2, 0.7])
        axes.set_xlim(0.01, 1.0)
        limits = axes.get_ylim()
        log_axis(axes, "learning rate")
        (marks,) = (line for line in axes.get_lines() if line.get_linestyle() == "None")
        assert [axes.xaxis.get_major_formatter()(x, 0) for x in axes.get_xticks() if 0.01 <= x <= 1] == [
            "0.01", "0.03", "0.1", "0.3", "1",
        ]  # fmt: skip
    expected = [digit * power for power in (0.01, 0.1) for digit in (2, 4, 5, 6, 7, 8, 9)]
    assert list(marks.get_xdata()) == pytest.approx(expected)
    assert axes.get_xlim() == (0.01, 1.0) and axes.get_ylim() == limits


def test_fourteen_arms_stay_readable(wide: Report) -> None:
    names = [arm.name for arm in wide.results[0].design.arms]
    assert len(names) == 14
    styles = arm_styles(names)
    with house_style():
        figure, axes = panel(255, names, styles, markers=True)
        (legend,) = figure.legends
        figure.canvas.draw()
        box, plot = legend.get_window_extent(), axes.get_window_extent()
        # The legend lies above the panel, inside the figure, and does not take most of it.
        assert box.y0 >= plot.y1 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 + 1
        assert box.height < plot.height
    trainings = {name: {r: Dot(0.5 + r / 100, 0) for r in range(5)} for name in names}
    text = drawn(draw_replicates("r", "c", trainings, styles, "test accuracy").svg)
    shown = {element.text for element in text.iter(f"{SVG}text")}
    assert set(names) <= shown


def test_the_names_of_many_arms_do_not_overlap() -> None:
    names = [f"an arm of a long name {i}" for i in range(14)]
    trainings = {name: {r: Dot(0.5 + r / 100, 0) for r in range(5)} for name in names}
    svg = drawn(draw_replicates("r", "c", trainings, arm_styles(names), "test accuracy").svg)
    shown = {cut(name, 22) for name in names}
    places = []
    for element in svg.iter(f"{SVG}text"):
        if element.text in shown:
            found = re.search(r"translate\(\s*([\d.]+)[ ,]+([\d.]+)", element.get("transform") or "")
            x, y = (element.get("x"), element.get("y")) if found is None else found.groups()
            places.append((float(x or 0), float(y or 0)))
    heights = sorted(y for _, y in places)
    assert len(places) == 14 and min(x for x, _ in places) >= 0
    assert min(b - a for a, b in pairwise(heights)) > 12


def test_every_figure_of_the_page_has_the_command_that_makes_it_again(folder: Path) -> None:
    figures = re.findall(r"<figure.*?</figure>", (folder / "index.html").read_text(), flags=re.DOTALL)
    assert len(figures) == len(list((folder / "figures").iterdir()))
    command = "bnbench run &#39;init stability&#39; --preset quick"
    assert all(f"<code>{command}</code>" in figure for figure in figures)
    assert sum('id="headline"' in figure for figure in figures) == 1
