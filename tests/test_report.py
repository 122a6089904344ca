"""The report: complete, self-contained, the same bytes for the same results, and safe with any names."""

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from bnbench.registry import BadInput
from bnbench.report import (
    Report,
    StudyResult,
    claim_lines,
    render_csv,
    render_html,
    render_json,
    render_markdown,
    sentences,
    summaries,
    verdict_lines,
    words,
    write_report,
)
from bnbench.report.advice import ADVICE_HEADS, advise
from bnbench.report.drawing import FILE_INK
from bnbench.report.gallery import in_order
from bnbench.study import Arm, Cell, Claim, Design, Entry, Hypothesis, Result, Study, Table, Trial
from bnbench.study.claims import adjust, family_sizes, judge, judge_claim
from bnbench.study.estimands import (
    accuracy_difference,
)
from bnbench.study.verdicts import ClaimVerdict
from tests.doctored_results import CLAIMS, doctored_report, doctored_studies


@pytest.fixture(scope="module")
def report() -> Report:
    return doctored_report(drop=3)


@pytest.fixture(scope="module")
def folder(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("report")
    assert write_report(report, written) == written / "index.html"
    return written


@pytest.fixture(scope="module")
def small() -> Report:
    """One study of two cells, quick to draw."""
    whole = doctored_report(replicates=5)
    result = whole.results[1]
    claims = tuple((c, v) for c, v in whole.claims if c.id in ("C2", "P5"))
    return Report((result,), claims, whole.made)


class Page(HTMLParser):
    """Reads a page: its text, ids, references, and whether every element is closed where it must be."""

    VOID = frozenset(("meta", "br", "img", "link", "input", "hr"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._note(attrs)

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.loads.append(value or "")
            self.loads += re.findall(r"url\((.*?)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_well_formed_and_loads_nothing(folder: Path) -> None:
    source = (folder / "index.html").read_text()
    page = Page(source)
    assert len(page.ids) == len(set(page.ids)) > 100
    assert page.loads
    for target in page.loads:
        assert target.startswith("#") and target[1:] in page.ids, target
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "img"}
    assert "://" not in source and "@import" not in source
    assert len(source) < 2_500_000


def test_page_shows_every_claim_cell_arm_and_verdict(report: Report, folder: Path) -> None:
    text = " ".join(Page((folder / "index.html").read_text()).text.split())
    for claim, verdict in report.claims:
        assert claim.sentence in text
        assert sentences.conclude(verdict, report.condition(verdict)) in text
        assert all(sentence in text for sentence in claim.literature)
    for result in report.results:
        assert result.study.question in text and result.study_hash in text and result.command in text
        for verdict in result.verdicts:
            assert verdict.cell in text
            assert words.effect(verdict) in text
            assert sentences.explain(verdict) in text
        for arm in result.design.arms:
            assert arm.name in text


def test_what_is_missing_diverged_or_failed_is_said(report: Report, folder: Path) -> None:
    source = (folder / "index.html").read_text()
    text = " ".join(Page(source).text.split())
    for result in report.results:
        assert result.recorded < result.planned
        assert f"{result.recorded} of {result.planned} trainings are there" in text
    assert "MemoryError: <b>too</b> wide in line 3" in text
    assert "<b>too</b>" not in source
    assert "loss was NaN at step 3" in text
    # Rows that two studies share are one training.
    trained = {e.trial.key: e for r in report.results for e in r.table.entries}
    diverged = sum(e.result.status == "diverged" for e in trained.values())
    assert f"with {len(trained)} trainings, {diverged} of which diverged" in text
    assert 'question "An older <question>?"' in text and "replicates 8 10" in text
    lines = summaries.failures(report.results[0])
    assert ["cnn · mnist1d", "none", "tuning", "1", "diverged", "loss was NaN at step 3", "0–9"] in lines


def test_figures_are_files_that_stand_alone(folder: Path) -> None:
    files = sorted((folder / "figures").glob("*.svg"))
    names = [file.stem for file in files]
    assert "headline" in names and "claim-c1-effects" in names
    # Four cells in one study with two kinds of curves, a sweep and the replicates; two cells in the other.
    assert len([n for n in names if n.startswith("study-")]) == 4 * 4 + 2 * 2
    for file in files:
        root = ElementTree.fromstring(file.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox")
        assert FILE_INK in file.read_text() and "#010203" not in file.read_text()


def test_figures_of_an_earlier_report_are_removed(small: Report, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "study-gone.svg").write_text("old")
    write_report(small, tmp_path)
    left = [path.name for path in (tmp_path / "figures").iterdir()]
    assert "study-gone.svg" not in left and len(left) == 6


def test_rows_hold_every_training_with_all_digits(report: Report, folder: Path) -> None:
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    entries = [(r, e) for r in report.results for e in r.table.entries]
    assert len(rows) == len(entries)
    for row, (result, entry) in zip(rows, entries, strict=True):
        assert (row["study"], row["cell"], row["arm"], row["replicate"], row["key"], row["status"]) == (
            result.study.name, entry.cell, entry.arm, entry.replicate, entry.trial.key, entry.result.status,
        )  # fmt: skip
        assert row["trial/lr"] == entry.trial.lr
        assert row["val/acc"] == entry.result.metrics.get("val/acc")
        assert (row["curve/val/acc"] or []) == list(entry.result.curve.get("val/acc", ()))


def test_equal_results_give_equal_bytes(small: Report, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(small, tmp_path / name)
    first = {
        p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()
    }
    second = {
        p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()
    }
    assert first == second and len(first) == 9


def test_json_knows_no_times_places_or_machines(small: Report) -> None:
    result = small.results[0]
    moved = [
        replace(
            e,
            result=replace(
                e.result,
                metrics={**e.result.metrics, "time/total_s": 9.0, "memory/peak_mib": 1.0},
                provenance={"host": "elsewhere"},
            ),
        )
        for e in reversed(result.table.entries)
    ]
    again = judge(result.study, "quick", Table(tuple(moved)), family_sizes([result.study], "quick"))
    again = adjust(again, family_sizes([result.study], "quick"))
    elsewhere = replace(result, table=Table(tuple(moved)), verdicts=again, registered=())
    other = replace(small, results=(elsewhere,), made={"machine": "another"}, runs=Path("/somewhere/else"))
    assert render_json(other) == render_json(small)
    values = json.loads(render_json(small))
    assert values["studies"][0]["verdicts"][0]["values"] == list(result.verdicts[0].values)
    assert [claim["status"] for claim in values["claims"]] == [sentences.status(v) for _, v in small.claims]


def test_csv_and_markdown_and_terminal_say_the_same(report: Report) -> None:
    verdicts = [v for r in report.results for v in r.verdicts]
    lines = list(csv.DictReader(io.StringIO(render_csv(report))))
    assert [(x["hypothesis"], x["cell"], x["decision"]) for x in lines] == [
        (v.hypothesis, v.cell, v.decision) for v in verdicts
    ]
    assert [float(x["estimate"]) for x in lines if x["estimate"]] == [
        v.estimate for v in verdicts if v.estimate is not None
    ]
    text = render_markdown(report)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {4, 8, len(ADVICE_HEADS) + 1}
    own = 2 + len(report.claims) + 2 * len(report.results) + len(verdicts)
    assert len(table) == own + 2 + len(advise(report))
    screen = Console(file=io.StringIO(), width=200)
    for result in report.results:
        screen.print(verdict_lines(result))
    screen.print(claim_lines(report))
    shown = screen.file.getvalue()
    assert all(words.effect(v) in shown for v in verdicts)
    assert all(claim.sentence in shown for claim, verdict in report.claims if verdict.cells)
    untested = [claim.id for claim, verdict in report.claims if not verdict.cells]
    assert f"speaks of {', '.join(untested)}." in shown
    narrow = Console(file=io.StringIO(), width=60)
    narrow.print(claim_lines(report))


def test_nothing_to_report_is_a_page_too(tmp_path: Path) -> None:
    empty = Report((), ())
    assert "No study has results yet" in Page(write_report(empty, tmp_path).read_text()).text
    study = doctored_studies(5)[0]
    verdicts = judge(study, "quick", Table(()), family_sizes([study], "quick"))
    claims = tuple((c, judge_claim(c.id, verdicts)) for c in CLAIMS)
    result = StudyResult(study, "quick", study.hash("quick"), Table(()), verdicts, 400)
    text = Page(render_html(Report((result,), claims))).text
    assert "0 of 400 trainings are there" in text and "nothing recorded yet" in text
    assert "trainings are missing or failed" in text


def test_a_smoke_run_is_marked() -> None:
    study = doctored_studies(5)[1]
    result = StudyResult(study, "smoke", study.hash("smoke"), Table(()), (), 8)
    assert "No number here says anything" in Page(render_html(Report((result,), ()))).text


def test_odd_names_break_nothing(tmp_path: Path) -> None:
    arms = (
        Arm("ß = 1 · 50 %, a+b"),
        Arm("Ü", norm="none"),
        Arm("ü", norm="layer"),
        *(Arm(f"n{i}" * 9) for i in range(6)),
    )
    cells = (Cell("ä"), Cell("Ä × Ä", batch_size=8))
    design = Design(Trial(steps=4), cells, arms, (0.1, 0.3), replicates=5)
    estimand = partial(accuracy_difference, better="Ü", other="ü")
    hypothesis = Hypothesis(
        "h", '<i>"&', "<script>alert(1)</script>", estimand, 1.0, ("Ü",), ("ü",), unit="pp"
    )
    study = Study("ü", "</title>&amp;?", (hypothesis,), design, design, baseline="Ü")
    other = replace(study, name="Ü")
    entries = [
        Entry(c.name, a.name, r, role, design.trial(c, a, r, lr=lr), Result("done", {
            "chance": 0.1, "val/acc": 0.5 + r / 100, "test/acc": 0.5 + (r * len(a.name)) / 100,
            "train/loss": 1.0,
        }, {"step": (1, 4), "val/acc": (0.1, 0.5)}))
        for c in cells for a in arms for r in range(5)
        for role, lr in (("tune", 0.1), ("tune", 0.3), ("own", 0.3), ("common", 0.3))
    ]  # fmt: skip
    sizes = {'<i>"&': 4}
    results = tuple(
        StudyResult(
            s,
            "quick",
            s.hash("quick"),
            Table(tuple(entries)),
            judge(s, "quick", Table(tuple(entries)), sizes),
            360,
        )
        for s in (study, other)
    )
    claim = Claim('<i>"&', "<b>bold</b> {{ 1 + 1 }} $x_1$", ("<img src=x>",))
    verdict = judge_claim(claim.id, [v for r in results for v in r.verdicts])
    page = Page(write_report(Report(results, ((claim, verdict),)), tmp_path).read_text())
    assert len(page.ids) == len(set(page.ids))
    assert all(target[1:] in page.ids for target in page.loads)
    assert not page.tags & {"script", "img"}
    for text in (
        "<script>alert(1)</script>",
        "<b>bold</b> {{ 1 + 1 }} $x_1$",
        "ß = 1 · 50 %, a+b",
        "</title>&amp;?",
    ):
        assert text in page.text
    for file in (tmp_path / "figures").iterdir():
        assert file.stem.isascii()
        ElementTree.fromstring(file.read_text())


def test_a_folder_that_cannot_be_written_is_explained(small: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"cannot write the report to .*file"):
        write_report(Report((), ()), tmp_path / "file" / "report")


def test_disagreements_come_first_and_untested_claims_last(folder: Path) -> None:
    text = Page((folder / "index.html").read_text()).text
    text = text[text.index("The claims") :]
    places = [
        text.index(sentence) for sentence in (CLAIMS[0].sentence, CLAIMS[1].sentence, CLAIMS[3].sentence)
    ]
    assert places == sorted(places)
    decisions = ("INCONCLUSIVE", "SUPPORTED", "MIXED", "REFUTED")
    cell = judge(doctored_studies(5)[1], "quick", Table(()), {"C2": 2})[0]
    claims = [(Claim("untested", ""), ClaimVerdict("untested", "INCONCLUSIVE", 0, 0, 0, "", ()))]
    claims += [(Claim(d, ""), ClaimVerdict(d, d, 1, 0, 0, "", (cell,))) for d in decisions]
    found = [claim.id for claim, _ in in_order(Report((), tuple(claims)))]
    assert found == ["REFUTED", "MIXED", "SUPPORTED", "INCONCLUSIVE", "untested"]


def test_exploratory_hypotheses_are_apart(folder: Path) -> None:
    text = Page((folder / "index.html").read_text()).text
    start, end = text.index("Looked at besides "), text.index("Study: lr stability")
    assert text.index("C1.b: Fewer steps at the common rate.") in range(start, end)
    assert text.index("C1.a: Fewer steps at own best rates.") < start


def test_one_replicate_of_two_steps_can_be_drawn() -> None:
    study = doctored_studies(5)[0]
    design = study.design("smoke")
    entries = [
        Entry(c.name, a.name, 0, role, design.trial(c, a, 0, lr=lr), result)
        for c in design.cells
        for i, a in enumerate(design.arms)
        for role, lr in (
            *(("tune", lr) for lr in design.lr),
            ("own", design.lr[-1]),
            ("common", design.lr[0]),
        )
        for result in (
            Result(
                "done", {"chance": 0.1, "val/acc": 0.1, "test/acc": 0.1}, {"step": (2,), "val/acc": (0.1,)}
            )
            if i
            else Result("diverged", {"chance": 0.1}),
        )
    ]
    table = Table(tuple(entries))
    verdicts = judge(study, "smoke", table, family_sizes([study], "smoke"))
    result = StudyResult(study, "smoke", study.hash("smoke"), table, verdicts, len(entries))
    claims = tuple((c, judge_claim(c.id, verdicts)) for c in CLAIMS)
    text = Page(render_html(Report((result,), claims))).text
    assert "fewer than five replicates carry no verdict" in text
