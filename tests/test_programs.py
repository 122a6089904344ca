"""Tests of the programs: what they ask for, what they choose, and that plans count right."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbench.engine.search import draw
from bnbench.study import Arm, Cell, Choice, Entry, Range, Result, Study, Table, Trial
from bnbench.study.design import TUNING_REPLICATES
from bnbench.study.programs import (
    SHORTLIST,
    TUNING_SEEDS,
    choose,
    grid_of,
    measure,
    planned_rows,
    programs_of,
    rank,
    setting,
)
from tests.pilot_study import ARMS, CELLS, design, drive, invented, study


def line(lr: float, acc: float, loss: float = 1.0, replicate: int = 0, status: str = "done") -> Entry:
    metrics = {} if status == "failed" else {"val/acc": acc, "val/loss": loss}
    trial = Trial(lr=lr, seed=replicate, data_seed=replicate)
    return Entry("c", "a", replicate, "tune", trial, Result(status, metrics))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "chosen"),
    [
        ([line(0.1, 0.5), line(0.3, 0.6)], 0.3),
        ([line(0.1, 0.5, 0.9), line(0.3, 0.5, 0.8)], 0.3),
        ([line(0.3, 0.5, 0.8), line(0.1, 0.5, 0.8)], 0.1),
        ([line(0.1, 0.5), line(0.3, 0.9, status="failed")], 0.1),
        ([line(0.1, 0.1, status="diverged"), line(0.3, 0.2)], 0.3),
        ([line(0.1, 0.4, replicate=0), line(0.1, 0.6, replicate=1), line(0.3, 0.51), line(0.3, 0.51)], 0.3),
        ([line(0.1, 0.4), line(0.3, 0.9), line(0.3, 0.0, replicate=1, status="failed")], 0.1),
        ([line(0.1, 0.4, status="failed")], None),
        ([], None),
    ],
)
def test_the_best_rate_is_chosen_by_accuracy_then_loss_then_size(
    lines: list[Entry], chosen: float | None
) -> None:
    for order in (lines, lines[::-1]):
        found = choose(order)
        assert (None if found is None else found.lr) == chosen


def test_a_setting_that_reaches_the_training_loss_is_chosen_before_a_more_accurate_one() -> None:
    lines = [line(0.1, 0.9), line(0.3, 0.5), line(0.3, 0.5, replicate=1), line(1.0, 0.4)]
    reached = [0.0, 1.0, 0.0, 1.0]
    for entry, value in zip(lines, reached, strict=True):
        entry.result.metrics["train/reached"] = value  # type: ignore[index]
    assert [found.lr for found in rank(lines)] == [1.0, 0.3, 0.1]


def places(rows: list) -> Counter:  # type: ignore[type-arg]
    return Counter((row.cell, row.arm, row.replicate, row.role) for row in rows)


def test_a_search_tunes_on_validation_data_and_confirms_on_test_data() -> None:
    the_study = study()
    (cell, program), *_ = programs_of(the_study, "quick")
    lines, (tuning, confirming) = drive(program)
    assert cell == "mlp"
    assert [row.trial.score_on for row in tuning] == ["val"] * 9
    assert [row.trial.score_on for row in confirming] == ["test"] * 6
    assert {row.trial.curve_points for row in tuning} == {0}
    assert {row.trial.curve_points for row in confirming} == {26}
    assert [row.trial for row in lines] == [row.trial for row in [*tuning, *confirming]]
    assert all(row.trial.data_seed == row.trial.seed == row.replicate == 0 for row in lines)
    for arm in ("none", "batch", "group"):
        tuned = [row for row in lines if row.arm == arm and row.role == "tune"]
        best = max(tuned, key=lambda row: row["val/acc"]).trial.lr
        assert [r.trial.lr for r in lines if r.arm == arm and r.role == "own"] == [best]
    common = {row.trial.lr for row in lines if row.role == "common"}
    assert common == {row.trial.lr for row in lines if row.role == "own" and row.arm == "none"}


@pytest.mark.parametrize("tuning", ["once", "per_replicate"])
def test_a_design_may_confirm_no_arm_at_the_baselines_rate(tuning: str) -> None:
    for common in (True, False):
        the_study = study(quick=design(tuning=tuning, common=common))
        asked = [row for _, program in programs_of(the_study, "quick") for row in drive(program)[0]]
        confirmed = Counter(row.role for row in asked if row.role != "tune")
        assert confirmed == {"own": 12, "common": 12} if common else confirmed == {"own": 12}
        planned = planned_rows(the_study, "quick")
        assert sum(row.score_on == "test" for row in planned) == (20 if common else 12)


def test_equal_rates_are_one_row_in_two_roles() -> None:
    def best_at_a_tenth(trial: Trial) -> Result:
        result = invented(trial)
        return dataclasses.replace(result, metrics={**result.metrics, "val/acc": float(trial.lr == 0.1)})

    (_, program), *_ = programs_of(study(), "quick")
    _, (_, confirming) = drive(program, best_at_a_tenth)
    assert Counter(row.role for row in confirming) == {"own": 3, "common": 3}
    assert len({row.trial.key for row in confirming}) == 3


def test_an_arm_that_always_fails_is_not_confirmed() -> None:
    def group_fails(trial: Trial) -> Result:
        return Result("failed", reason="no") if trial.norm == "group" else invented(trial)

    def baseline_fails(trial: Trial) -> Result:
        return Result("failed", reason="no") if trial.norm == "none" else invented(trial)

    _, (_, confirming) = drive(programs_of(study(), "quick")[0][1], group_fails)
    assert {(row.arm, row.role) for row in confirming} == {
        ("none", "own"), ("none", "common"), ("batch", "own"), ("batch", "common"), ("group", "common")
    }  # fmt: skip
    _, (_, confirming) = drive(programs_of(study(), "quick")[0][1], baseline_fails)
    assert {(row.arm, row.role) for row in confirming} == {("batch", "own"), ("group", "own")}


def test_tuning_once_reads_replicates_that_are_never_judged() -> None:
    once = study(quick=design(tuning="once", replicates=4))
    programs = programs_of(once, "quick")
    assert [cell for cell, _ in programs] == ["mlp", "cnn"]
    lines, (tuning, confirming) = drive(programs[0][1])
    extra = range(TUNING_SEEDS, TUNING_SEEDS + TUNING_REPLICATES)
    assert {row.replicate for row in tuning} == {row.trial.data_seed for row in tuning} == set(extra)
    assert {row.replicate for row in confirming} == {0, 1, 2, 3}
    assert len(tuning) == 3 * 3 * TUNING_REPLICATES
    for arm in ("none", "batch"):
        means = {lr: [r["val/acc"] for r in lines if (r.arm, r.role, r.trial.lr) == (arm, "tune", lr)]
                 for lr in (0.01, 0.1, 1.0)}  # fmt: skip
        best = max(means, key=lambda lr: sum(means[lr]))
        assert {r.trial.lr for r in confirming if r.arm == arm and r.role == "own"} == {best}


@pytest.mark.parametrize("tuning", ["once", "per_replicate"])
@pytest.mark.parametrize("program", ["search", "sweep"])
def test_a_cell_has_replicates_of_its_own(tuning: str, program: str) -> None:
    cells = (Cell("mlp", replicates=4), Cell("cnn", model="cnn"), Cell("third", data="digits", replicates=1))
    there: dict[str, set[int]] = {}
    for cell, made in programs_of(study(quick=design(cells=cells, tuning=tuning), program=program), "quick"):
        judged = [row for row in drive(made)[0] if row.replicate < TUNING_SEEDS]
        there.setdefault(cell, set()).update(row.replicate for row in judged)
    assert there == {"mlp": {0, 1, 2, 3}, "cnn": {0, 1}, "third": {0}}


def test_a_sweep_asks_once_and_reads_no_test_data() -> None:
    lines, requests = drive(programs_of(study(program="sweep"), "quick")[0][1])
    assert len(requests) == 1
    assert {(row.role, row.trial.score_on) for row in lines} == {("sweep", "val")}
    assert [r.trial.lr for r in Table(tuple(lines)).replicates("mlp", {})[0].grid("batch")] == [
        0.01,
        0.1,
        1.0,
    ]


def test_a_search_and_a_sweep_share_their_grids() -> None:
    grids = [
        {row.trial.key for row in drive(program)[1][0]}
        for program in (
            programs_of(study(), "quick")[0][1],
            programs_of(study(program="sweep"), "quick")[0][1],
        )
    ]
    assert grids[0] == grids[1]


def test_nothing_is_asked_twice_in_one_place() -> None:
    for the_study in (study(), study(quick=design(tuning="once"))):
        rows = [row for _, program in programs_of(the_study, "quick") for row in drive(program)[0]]
        once = [place for place in places(rows).items() if place[0][3] in ("own", "common")]
        assert {count for _, count in once} == {1}


arms = st.sampled_from([
    ARMS, (*ARMS, Arm("a twin", norm="none")), (ARMS[0], Arm("a batch", batch_size=32)), ARMS[:1],
])  # fmt: skip
grids = st.sampled_from([(0.1,), (0.1, 1.0), (0.01, 0.1, 1.0), (0.01, 0.1, 1.0, 3.0)])


@settings(max_examples=40)
@given(arms, grids, st.integers(1, 3), st.sampled_from([None, 1, 4]),
       st.sampled_from(["once", "per_replicate"]), st.sampled_from(["search", "sweep"]),
       st.sampled_from(["quick", "smoke"]))  # fmt: skip
def test_a_plan_counts_what_programs_ask_for(arms, lr, replicates, own, tuning, program, preset) -> None:  # type: ignore[no-untyped-def]
    cells = (Cell("mlp", replicates=own), CELLS[1])
    one = design(arms=arms, cells=cells, lr=lr, replicates=replicates, tuning=tuning)
    the_study: Study = study(quick=one, full=one, hypotheses=(), program=program)
    asked = {row.trial.key: row for _, made in programs_of(the_study, preset) for row in drive(made)[0]}
    planned = {trial.key: trial for trial in planned_rows(the_study, preset)}
    assert len(planned) == len(planned_rows(the_study, preset))
    tuned = {key for key, row in asked.items() if row.trial.score_on == "val"}
    assert tuned == {key for key, trial in planned.items() if trial.score_on == "val"}
    assert len(asked) <= len(planned)
    shapes = {"lr": 0.1}
    assert {row.trial.replace(**shapes) for row in asked.values()} == {
        trial.replace(**shapes) for trial in planned.values()
    }


def test_a_program_gives_back_lines_in_the_order_asked() -> None:
    wanted = grid_of(design(), CELLS[0], 5, "sweep")
    lines, requests = drive(measure(wanted))
    assert requests == [wanted]
    assert [(e.cell, e.arm, e.replicate, e.role, e.trial) for e in lines] == [
        (w.cell, w.arm, w.replicate, w.role, w.trial) for w in wanted
    ]
    assert all(e.result == invented(e.trial) for e in lines)


SIZES = {"4": {"batch_size": 4, "steps": 16}, "8": {"batch_size": 8, "steps": 8}}
SPACE = (Range("lr", 0.01, 1.0), Choice("batch_size", SIZES))
SEARCHED = (ARMS[0], Arm("batch", space=SPACE), Arm("lr alone", space=SPACE[:1]))


def searching(tuning: str, **changes: object) -> Study:
    one = design(arms=SEARCHED, tuning=tuning, trials=5, batch=2, **changes)
    return study(quick=one, full=one, hypotheses=())


def test_a_search_asks_batch_by_batch_and_learns_from_what_it_got() -> None:
    the_study = searching("per_replicate")
    lines, requests = drive(programs_of(the_study, "quick", draw)[0][1])
    grid, *batches, confirming = requests
    assert {row.arm for row in grid} == {"none"}
    assert [len(rows) for rows in batches] == [4, 8, 10]
    for earlier, later in pairwise(batches):
        for arm in ("batch", "lr alone"):
            asked = [row for row in earlier if row.arm == arm]
            assert [row for row in later if row.arm == arm][: len(asked)] == asked
    assert {(row.arm, row.role) for row in confirming} == {
        ("none", "own"), ("none", "common"), ("batch", "own"), ("lr alone", "own")
    }  # fmt: skip
    for arm in ("batch", "lr alone"):
        tuned = [e for e in lines if e.arm == arm and e.role == "tune"]
        assert len({e.trial.key for e in tuned}) == len(tuned) == 5
        best = max(tuned, key=lambda e: e["val/acc"]).trial
        (own,) = [e.trial for e in lines if e.arm == arm and e.role == "own"]
        assert (own.lr, own.batch_size, own.steps) == (best.lr, best.batch_size, best.steps)
        assert (own.score_on, own.seed, own.data_seed) == ("test", best.seed, best.data_seed)


def test_a_search_starts_at_the_arms_own_row_where_its_space_has_it() -> None:
    own = (Range("lr", 0.01, 1.0), Choice("schedule", ("constant", "cosine")))
    for space, starts in ((own, True), (SPACE, False)):  # the base's batch size is no level of the other
        one = design(arms=(ARMS[0], Arm("batch", space=space)), tuning="per_replicate", trials=3, batch=2)
        _, (_, first, *_) = drive(programs_of(study(quick=one, full=one, hypotheses=()), "quick", draw)[0][1])
        assert (first[0].trial == one.trial(CELLS[0], one.arms[1], 0)) == starts
        assert len({row.trial.key for row in first}) == 2


def test_a_search_is_a_function_of_the_results_alone() -> None:
    first, again = (drive(programs_of(searching("once"), "quick", draw)[0][1]) for _ in range(2))
    assert first == again
    worse = drive(
        programs_of(searching("once"), "quick", draw)[0][1],
        lambda trial: Result("done", {**invented(trial).metrics, "val/acc": trial.lr}),
    )
    assert worse[1][0] == first[1][0]
    assert worse[1][-1] != first[1][-1]


def test_repeated_searches_are_compared_on_all_tuning_replicates() -> None:
    lines, _ = drive(programs_of(searching("once", searches=2, replicates=4), "quick", draw)[0][1])
    extra = range(TUNING_SEEDS, TUNING_SEEDS + TUNING_REPLICATES)
    for arm in ("batch", "lr alone"):
        tuned = [e for e in lines if e.arm == arm and e.role == "tune"]
        assert Counter(e.replicate for e in tuned) == {extra[0]: 5, extra[1]: 5}
        assert {setting(e.trial) for e in tuned if e.replicate == extra[0]} != {
            setting(e.trial) for e in tuned if e.replicate == extra[1]
        }
        best = set()
        for replicate in extra[:2]:
            ranked = sorted((e for e in tuned if e.replicate == replicate), key=lambda e: -e["val/acc"])
            best |= {setting(e.trial) for e in ranked[:SHORTLIST]}
        tried = [e for e in lines if e.arm == arm and e.role == "shortlist"]
        assert Counter(setting(e.trial) for e in tried) == dict.fromkeys(best, TUNING_REPLICATES)
        means = {one: sum(e["val/acc"] for e in tried if setting(e.trial) == one) for one in best}
        own = [e.trial for e in lines if e.arm == arm and e.role == "own"]
        assert [trial.data_seed for trial in own] == [0, 1, 2, 3]
        winner = max(means, key=lambda one: means[one])
        assert {setting(t).replace(score_on="val", curve_points=0) for t in own} == {winner}


def test_a_point_that_fails_is_never_chosen() -> None:
    def large_rates_fail(trial: Trial) -> Result:
        return Result("failed", reason="no") if trial.lr > 0.1 else invented(trial)

    lines, _ = drive(programs_of(searching("once"), "quick", draw)[0][1], large_rates_fail)
    assert any(e.result.status == "failed" for e in lines if e.role == "tune")
    assert all(e.trial.lr <= 0.1 for e in lines if e.role in ("shortlist", "own"))


def test_a_search_without_a_sampler_is_an_error() -> None:
    with pytest.raises(LookupError, match="no sampler"):
        drive(programs_of(searching("once"), "quick")[0][1])


@pytest.mark.parametrize("tuning", ["once", "per_replicate"])
def test_a_plan_of_searches_counts_what_they_may_ask_for(tuning: str) -> None:
    the_study = searching(tuning)
    asked = {row.trial.key for _, made in programs_of(the_study, "quick", draw) for row in drive(made)[0]}
    planned = len(planned_rows(the_study, "quick"))
    assert 0.8 * planned <= len(asked) <= planned
