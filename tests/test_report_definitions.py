"""A study whose file changed is a new study: no verdict of the report mixes two definitions."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from bnbench.cli.recorded import gather, linked, results_of
from bnbench.engine.suite import prepare
from bnbench.record import Record
from bnbench.report import StudyResult, render_html
from bnbench.study import Entry, Study
from bnbench.study.claims import adjust, family_sizes, judge
from bnbench.study.estimands import accuracy_difference
from bnbench.study.programs import programs_of
from bnbench.study.verdicts import Verdict
from tests.pilot_study import design, drive, hypothesis, study
from tests.test_report import Page

BEFORE = study(quick=design(replicates=6))
LOSS = partial(accuracy_difference, better="batch", other="none", metric="test/loss", points=-1.0)
#: The question, the smallest effect that matters, the metric and the number of replicates are others.
AFTER = study(
    question="Does it help at all?",
    hypotheses=(hypothesis(delta=0.03, estimand=LOSS),),
    quick=design(replicates=5),
)  # fmt: skip


def rows_of(one: Study) -> list[Entry]:
    return [e for _, program in programs_of(one, "quick") for e in drive(program)[0]]


def keep(record: Record, one: Study, entries: list[Entry]) -> None:
    job = prepare(one, "quick")
    record.register(job.study_hash, one.definition("quick"))
    record.append([(e.trial, e.result) for e in entries])
    record.enroll(job.study_hash, entries)


def found(record: Record, one: Study) -> StudyResult:
    (result,) = results_of(record, [prepare(one, "quick")], {})
    return result


def judged(one: Study, entries: list[Entry]) -> tuple[Verdict, ...]:
    """The verdicts from these rows alone, without a record."""
    from bnbench.study import Table

    sizes = family_sizes([one], "quick")
    return adjust(judge(one, "quick", Table(tuple(entries)), sizes), sizes)


def test_a_changed_definition_starts_without_a_row_and_says_what_differs(tmp_path: Path) -> None:
    record = Record(tmp_path / "bnbench.db")
    keep(record, BEFORE, rows_of(BEFORE))
    assert all(v.n == 6 and v.gate != "incomplete" for v in found(record, BEFORE).verdicts)
    result = found(record, AFTER)
    assert result.recorded == 0
    assert {(v.n, v.gate, v.delta) for v in result.verdicts} == {(0, "incomplete", 0.03)}
    text = " ".join(Page(render_html(gather([result], tmp_path))).text.split())
    assert f"The version registered before it is {BEFORE.hash('quick')}" in text
    assert "not registered" in text and f"Hash {AFTER.hash('quick')}" in text
    for key, old, new in (
        ("hypotheses › C1.a › delta", "1.0", "0.03"),
        ("question", '"Does it help?"', '"Does it help at all?"'),
        ("replicates", "6", "5"),
    ):
        assert f"{key} {old} {new}" in text
    record.close()


def test_rows_are_shared_but_each_verdict_is_that_of_its_own_definition(tmp_path: Path) -> None:
    record = Record(tmp_path / "bnbench.db")
    keep(record, BEFORE, rows_of(BEFORE))
    before = found(record, BEFORE).verdicts
    later = rows_of(AFTER)
    # Half of the new definition's rows: what the old one has of the rest is not borrowed.
    half = [e for e in later if e.replicate < 3]
    keep(record, AFTER, half)
    assert {(v.n, v.gate) for v in found(record, AFTER).verdicts} == {(3, "incomplete")}
    assert {e.trial.key for e in half} <= {e.trial.key for e in rows_of(BEFORE)}
    keep(record, AFTER, later)
    after = found(record, AFTER)
    assert after.verdicts == judged(AFTER, later)
    assert {e.replicate for e in after.table.entries} == set(range(5))
    assert found(record, BEFORE).verdicts == before == judged(BEFORE, rows_of(BEFORE))
    # The report of both presents one definition of the study, under its hash.
    report = gather([after], tmp_path)
    assert {(r.study_hash, v.n) for r in report.results for v in r.verdicts} == {(AFTER.hash("quick"), 5)}
    record.close()


def test_what_the_hash_covers_changes_it() -> None:
    arms = (replace_arm(BEFORE, dropout=0.1),)
    changed = (
        replace(BEFORE, hypotheses=(hypothesis(delta=2.0),)),
        replace(BEFORE, hypotheses=(hypothesis(kind="equivalent"),)),
        replace(BEFORE, hypotheses=(hypothesis(estimand=LOSS),)),
        replace(BEFORE, quick=replace(BEFORE.quick, arms=(*BEFORE.quick.arms[:2], *arms))),
        replace(BEFORE, quick=replace(BEFORE.quick, base=BEFORE.quick.base.replace(steps=9))),
        replace(BEFORE, quick=replace(BEFORE.quick, replicates=7)),
        replace(BEFORE, quick=replace(BEFORE.quick, lr=(0.01, 0.1))),
    )
    assert len({one.hash("quick") for one in (BEFORE, *changed)}) == 1 + len(changed)


def replace_arm(one: Study, **changes: float):
    from bnbench.study import Arm

    arm = one.quick.arms[2]
    return Arm(arm.name, **{**arm.changes, **changes})


def test_a_report_links_what_is_published_by_now(tmp_path: Path) -> None:
    record = Record(tmp_path / "bnbench.db")
    keep(record, AFTER, rows_of(AFTER))
    report, uri = gather([found(record, AFTER)], tmp_path), "https://host"
    assert linked(report, record, uri) == report
    own = next(e for e in report.results[0].table.entries if e.role == "own")
    item = f"{AFTER.hash('quick')}/own/{own.cell}/{own.arm}/s{own.replicate}/{own.trial.key}"
    record.note_published(uri, item, "r" * 32, "mark")
    (result,) = linked(report, record, uri).results
    assert result.links == {own.trial.key: f"https://host/#/runs/{'r' * 32}"}
    record.close()
