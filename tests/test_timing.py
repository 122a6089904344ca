"""Tests of step times that are measured alone: which rows do so, and who reads them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from itertools import groupby

import pytest

from bnbench.engine.search import draw
from bnbench.study import Arm, Choice, Entry, Range, Replicate, Result, Study, Table, Trial
from bnbench.study.claims import judge
from bnbench.study.programs import planned_rows, programs_of
from bnbench.tracking.draft import Definition
from bnbench.tracking.layout import items
from tests.pilot_study import ARMS, design, drive, hypothesis, invented, study

SPACE = (Range("lr", 0.05, 1.0), Choice("schedule", ("trapezoid", "cosine")))
TUNINGS = pytest.mark.parametrize("tuning", ["once", "per_replicate"])


def timed(tuning: str = "per_replicate", **changes: object) -> Study:
    arms = (*ARMS[:2], Arm("searched", norm="layer", space=SPACE))
    values = {"arms": arms, "trials": 3, "tuning": tuning, "replicates": 6, "timing_steps": 50, **changes}
    return study(quick=design(**values), full=design(**values))


def with_times(trial: Trial) -> Result:
    """What a row might give, with a time a step that its key decides."""
    result = invented(trial)
    times = {"time/step_ms": 1 + result.metrics["time/total_s"]}
    return dataclasses.replace(result, metrics={**result.metrics, **times})


def lines_of(the_study: Study, cell: str = "mlp") -> list[Entry]:
    made = programs_of(the_study, "quick", draw)
    return [e for name, program in made if name == cell for e in drive(program, with_times)[0]]


@TUNINGS
def test_every_arm_of_a_confirmed_replicate_is_timed_at_its_own_choice(tuning: str) -> None:
    lines = lines_of(timed(tuning))
    rows = [e for e in lines if e.role == "timing"]
    assert Counter((e.arm, e.replicate) for e in rows) == {
        (arm, replicate): 1 for arm in ("none", "batch", "searched") for replicate in range(6)
    }
    for entry in rows:
        (own,) = [
            e.trial for e in lines
            if (e.arm, e.replicate, e.role) == (entry.arm, entry.replicate, "own")
        ]  # fmt: skip
        assert entry.trial == own.replace(
            lr=0.01, steps=50, schedule="constant", score_on="val", curve_points=0, alone=True
        )


@TUNINGS
def test_the_arms_of_one_replicate_are_timed_one_after_the_other(tuning: str) -> None:
    for _, program in programs_of(timed(tuning), "quick", draw):
        *_, last = drive(program)[1]
        rows = [row for row in last if row.role == "timing"]
        assert [[row.arm for row in group] for _, group in groupby(rows, key=lambda row: row.replicate)] == [
            ["none", "batch", "searched"]
        ] * (6 if tuning == "once" else 1)


@TUNINGS
def test_a_plan_counts_what_is_timed(tuning: str) -> None:
    the_study = timed(tuning)
    asked = {e.trial.key for cell in ("mlp", "cnn") for e in lines_of(the_study, cell) if e.role == "timing"}
    planned = {trial.key for trial in planned_rows(the_study, "quick") if trial.alone}
    assert len(planned) == len(asked) == 2 * 3 * 6
    on_grid = [key for key in asked if key in planned]
    assert len(on_grid) >= 2 * 2 * 6  # exactly known, but for what a search chooses


@TUNINGS
def test_only_the_first_replicates_are_timed_where_a_design_says_so(tuning: str) -> None:
    the_study = timed(tuning, timed=2)
    asked = [e for cell in ("mlp", "cnn") for e in lines_of(the_study, cell) if e.role == "timing"]
    assert Counter(e.replicate for e in asked) == {0: 6, 1: 6}
    assert sum(trial.alone for trial in planned_rows(the_study, "quick")) == len(asked)


def test_nothing_is_timed_unless_asked_for_nor_in_a_sweep() -> None:
    for the_study in (study(), dataclasses.replace(timed(), program="sweep"), timed(timing_steps=0)):
        assert not any(trial.alone for trial in planned_rows(the_study, "quick"))
        assert not any(e.role == "timing" for e in lines_of(the_study))


def test_a_row_that_stops_at_a_loss_is_timed_to_its_end() -> None:
    rows = [e.trial for e in lines_of(timed(base=Trial(steps=80, until_train_nll=0.5))) if e.role == "timing"]
    assert {(trial.steps, trial.until_train_nll) for trial in rows} == {(50, None)}


def test_a_replicate_gives_the_row_of_an_arm() -> None:
    replicate = Table(tuple(lines_of(timed()))).replicates("mlp", {})[2]
    entry = replicate.timing("batch")
    assert (entry.arm, entry.replicate, entry.role, entry.trial.alone) == ("batch", 2, "timing", True)
    with pytest.raises(LookupError, match="0 rows of 'group' as timing"):
        replicate.timing("group")


def time_ratio(replicate: Replicate) -> float:
    none, batch = (replicate.timing(arm)["time/step_ms"] for arm in ("none", "batch"))
    return math.log(none / batch)


def damaged(lines: list[Entry], result: Result) -> Table:
    """All lines, but of the timing of the arm `batch` this result."""
    return Table(
        tuple(
            dataclasses.replace(e, result=result) if (e.role, e.arm) == ("timing", "batch") else e
            for e in lines
        )
    )


def test_a_lost_time_counts_only_for_a_hypothesis_that_reads_it() -> None:
    reads_it = hypothesis(name="C1.c", estimand=time_ratio, cells=("mlp",))
    reads_none = hypothesis(cells=("mlp",))
    the_study = dataclasses.replace(timed(), hypotheses=(reads_it, reads_none))
    lines = lines_of(the_study)
    whole = judge(the_study, "quick", Table(tuple(lines)), {"C1": 2})
    assert [v.n for v in whole] == [6, 6] and "incomplete" not in {v.gate for v in whole}
    for lost in (Result("failed", reason="the row killed its worker"), None):
        if lost is None:
            table = Table(tuple(e for e in lines if (e.role, e.arm) != ("timing", "batch")))
        else:
            table = damaged(lines, lost)
        timing, accuracy = judge(the_study, "quick", table, {"C1": 2})
        assert timing.gate == "incomplete" and "0 rows of 'batch' as timing" in timing.reason
        assert accuracy == whole[1]


def test_a_timing_that_diverged_is_no_diverged_training() -> None:
    the_study = dataclasses.replace(timed(), hypotheses=(hypothesis(cells=("mlp",)),))
    lines = lines_of(the_study)
    (whole,) = judge(the_study, "quick", Table(tuple(lines)), {"C1": 1})
    assert judge(the_study, "quick", damaged(lines, Result("diverged", {"chance": 0.1})), {"C1": 1}) == (
        whole,
    )


def test_mlflow_shows_step_times_as_a_metric_of_the_arm_and_as_no_runs() -> None:
    the_study = timed()
    lines = lines_of(the_study)
    definition = Definition(the_study.hash("quick"), 0.0, the_study.definition("quick"))
    with_timing, without = (
        {item.name: item for item in items(definition, Table(tuple(rows)), [])}
        for rows in (lines, [e for e in lines if e.role != "timing"])
    )
    assert set(with_timing) == set(without)
    name = f"{definition.study_hash}/arm/mlp/batch"
    shown = {point.key: point.value for point in with_timing[name].draft().points}
    assert shown.pop("step_ms_alone") == statistics.median(
        e["time/step_ms"] for e in lines if (e.role, e.arm) == ("timing", "batch")
    )
    assert shown == {point.key: point.value for point in without[name].draft().points}
    assert with_timing[name].draft().params == without[name].draft().params
    assert with_timing[name].mark != without[name].mark
