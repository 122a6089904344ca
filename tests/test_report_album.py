"""A figure is drawn once: while what it shows stays as it is, a later report takes it from its file."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bnbench.report import Report, album, render_html, write_report
from bnbench.report.album import Album
from bnbench.report.drawing import Drawing, finish, house_style, new_figure
from tests.doctored_results import doctored_report


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by a line whenever matplotlib draws a figure."""
    calls: list[str] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: Any, **options: Any) -> None:
        calls.append("a figure")
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    yield calls


@pytest.fixture(scope="module")
def small() -> Report:
    """One study of two cells with five replicates, quick to draw."""
    whole = doctored_report(replicates=5)
    claims = tuple((c, v) for c, v in whole.claims if c.id == "C2")
    return Report((whole.results[1],), claims, whole.made)


def draw_text(name: str, words: str, *, size: float = 11.0) -> Drawing:
    with house_style():
        figure = new_figure(80, 20)
        figure.text(0, 0.5, words, fontsize=size)
        return finish(figure, name, f"{words} <&> “ü”")


def keep(folder: Path, drawing: Drawing) -> Path:
    file = folder / f"{drawing.name}.svg"
    file.write_bytes(drawing.file.encode())
    return file


def test_a_figure_that_shows_the_same_is_taken_from_its_file_to_the_letter(
    tmp_path: Path, drawn: list[str]
) -> None:
    first = Album(tmp_path).draw(draw_text, "f", "words", size=9.0)
    assert first == replace(draw_text("f", "words", size=9.0), key=first.key) and len(drawn) == 2
    keep(tmp_path, first)
    assert Album(tmp_path).draw(draw_text, "f", "words", size=9.0) == first and len(drawn) == 2


@pytest.mark.parametrize(
    ("name", "words", "size"), [("g", "words", 9.0), ("f", "other words", 9.0), ("f", "words", 9.5)]
)
def test_a_figure_that_shows_something_else_is_drawn(
    tmp_path: Path, drawn: list[str], name: str, words: str, size: float
) -> None:
    file = keep(tmp_path, Album(tmp_path).draw(draw_text, "f", "words", size=9.0))
    (tmp_path / "g.svg").write_bytes(file.read_bytes())
    now = Album(tmp_path).draw(draw_text, name, words, size=size)
    assert len(drawn) == 2 and now.svg == draw_text(name, words, size=size).svg


@pytest.mark.parametrize("left", [b"", b"<svg>", b"\xff\xfe", "half", None])
def test_a_file_that_is_not_whole_is_no_figure(tmp_path: Path, drawn: list[str], left: Any) -> None:
    first = Album(tmp_path).draw(draw_text, "f", "words")
    file = keep(tmp_path, first)
    if left is None:
        file.unlink()
    else:
        file.write_bytes(first.file[:-20].encode() if left == "half" else left)
    assert Album(tmp_path).draw(draw_text, "f", "words") == first and len(drawn) == 2


def test_other_code_draws_again(tmp_path: Path, drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path, Album(tmp_path).draw(draw_text, "f", "words"))
    monkeypatch.setattr(album, "_code", lambda: b"a later version")
    Album(tmp_path).draw(draw_text, "f", "words")
    assert len(drawn) == 2


def test_a_report_written_again_is_the_same_and_draws_nothing(
    small: Report, tmp_path: Path, drawn: list[str]
) -> None:
    write_report(small, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert len(drawn) == len(list((tmp_path / "figures").iterdir())) == 6
    write_report(doctored_copy(small), tmp_path)
    assert len(drawn) == 6
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert (tmp_path / "index.html").read_text() == render_html(small)


def doctored_copy(report: Report) -> Report:
    """An equal report whose results are other objects, as after a second start."""
    return replace(report, results=(doctored_report(replicates=5).results[1],))


def test_only_figures_with_new_links_are_drawn_again(small: Report, tmp_path: Path, drawn: list[str]) -> None:
    write_report(small, tmp_path)
    (result,) = small.results
    links = {e.trial.key: f"http://host/#/runs/{e.trial.key}" for e in result.table.entries}
    linked = replace(small, results=(replace(result, links=links),))
    del drawn[:]
    write_report(linked, tmp_path)
    assert len(drawn) == 2  # the replicates of two cells
    assert (tmp_path / "index.html").read_text() == render_html(linked)
