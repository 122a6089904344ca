"""The verdict of a cell: every rule and every gate at its borders."""

import functools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bnbench.registry import BadInput
from bnbench.study import Cell, Table
from bnbench.study.claims import adjust, decide, family_sizes, judge
from tests.verdict_tables import (
    DELTA,
    GOOD,
    GRID,
    between,
    changed,
    effect,
    hypothesis,
    judge_one,
    row,
    rows,
    study,
)


@pytest.mark.parametrize(
    ("low", "high", "decision", "label"),
    [
        (-0.5, 0.5, "REFUTED", "negligible"),
        (0.1, 0.9, "REFUTED", "negligible"),
        (-0.99, 0.999, "REFUTED", "negligible"),
        (-1.0, 0.5, "REFUTED", ""),
        (-1.0, -0.001, "REFUTED", "reversed"),
        (-3.0, -2.0, "REFUTED", "reversed"),
        (-0.9, -0.1, "REFUTED", "negligible"),
        (-1.5, 0.0, "REFUTED", ""),
        (0.0, 2.0, "INCONCLUSIVE", ""),
        (-0.5, 1.0, "INCONCLUSIVE", ""),
        (-2.0, 2.0, "INCONCLUSIVE", ""),
        (0.001, 1.0, "SUPPORTED", "size_uncertain"),
        (0.5, 1.5, "SUPPORTED", "size_uncertain"),
        (1.0, 2.0, "SUPPORTED", "at_least_delta"),
        (1.5, 2.5, "SUPPORTED", "at_least_delta"),
    ],
)
def test_greater_is_decided_by_the_interval(low, high, decision, label):
    assert decide("greater", low, high, DELTA) == (decision, label)


@pytest.mark.parametrize(
    ("low", "high", "decision"),
    [
        (-0.5, 0.5, "SUPPORTED"),
        (-0.999, 0.999, "SUPPORTED"),
        (-1.0, 0.5, "INCONCLUSIVE"),
        (-0.5, 1.0, "INCONCLUSIVE"),
        (1.0, 2.0, "INCONCLUSIVE"),
        (1.001, 2.0, "REFUTED"),
        (-2.0, -1.0, "INCONCLUSIVE"),
        (-2.0, -1.001, "REFUTED"),
        (-2.0, 2.0, "INCONCLUSIVE"),
    ],
)
def test_equivalent_is_decided_by_the_interval(low, high, decision):
    assert decide("equivalent", low, high, DELTA) == (decision, "")


@pytest.mark.parametrize(
    ("center", "decision", "label"),
    [
        (0.0, "REFUTED", "negligible"),
        (0.5, "REFUTED", "negligible"),
        (1.0, "SUPPORTED", "size_uncertain"),
        (2.0, "SUPPORTED", "at_least_delta"),
        (-2.0, "REFUTED", "reversed"),
    ],
)
def test_a_verdict_follows_from_the_table_and_shows_its_numbers(center, decision, label):
    values = between(center - 0.4, center + 0.4)
    verdict = judge_one(values)
    assert (verdict.decision, verdict.label, verdict.gate) == (decision, label, "")
    assert (verdict.low, verdict.high) == pytest.approx((center - 0.4, center + 0.4))
    assert verdict.half_width == pytest.approx(0.4)
    assert verdict.estimate == pytest.approx(center)
    assert (verdict.n, verdict.level, verdict.family_size) == (10, 0.95, 1)
    assert verdict.p == pytest.approx(scipy_stats.ttest_1samp(values, 0).pvalue)
    assert verdict.d_z == pytest.approx(center / np.std(values, ddof=1))
    assert verdict.cliffs_delta == pytest.approx(np.mean(np.sign(values)), abs=1e-12)
    assert verdict.bca[0] < verdict.estimate < verdict.bca[1]
    assert verdict.values == tuple(values)
    assert verdict.allows == ("both",) * 10
    assert verdict.p_holm is None


def test_the_level_is_simultaneous_over_the_declared_family():
    values = between(1.1, 2.9, level=1 - 0.05 / 6)
    primary = judge_one(values, size=6)
    assert primary.level == 1 - 0.05 / 6
    assert (primary.low, primary.high) == pytest.approx((1.1, 2.9))
    exploratory = judge_one(values, the_hypothesis=hypothesis(primary=False), size=6)
    assert (exploratory.level, exploratory.family_size) == (0.95, 1)
    assert exploratory.high - exploratory.low < 1.8
    assert (primary.caveat, exploratory.caveat) == ("", "exploratory")


def test_delta_may_be_a_constant_of_the_cell():
    cells = (Cell("mlp", constants={"delta": 3.0}),)
    verdict = judge_one(between(1.1, 2.9), the_hypothesis=hypothesis(delta="delta"), cells=cells)
    assert (verdict.delta, verdict.decision, verdict.label) == (3.0, "REFUTED", "negligible")


def test_verdicts_come_in_declared_order_and_only_for_the_named_cells():
    cells = (Cell("mlp"), Cell("cnn"))
    hypotheses = (hypothesis("C.b", cells=("cnn",)), hypothesis("C.a", half_width={"cnn": 0.7}))
    verdicts = judge(study(*hypotheses, cells=cells), "quick", Table(()), {"C": 3})
    assert [(v.hypothesis, v.cell) for v in verdicts] == [("C.b", "cnn"), ("C.a", "mlp"), ("C.a", "cnn")]
    assert [v.expected_half_width for v in verdicts] == [None, None, 0.7]


def test_family_sizes_count_primary_hypotheses_times_cells_over_all_studies():
    cells = (Cell("mlp"), Cell("cnn"))
    one = study(
        hypothesis("C.a"), hypothesis("C.b", primary=False), hypothesis("D.a", claim="D"), cells=cells
    )
    two = study(hypothesis("C.d", cells=("cnn",)), cells=cells)
    assert family_sizes([one, two], "quick") == {"C": 3, "D": 2}


def test_a_claim_without_a_family_size_is_refused():
    with pytest.raises(BadInput, match="no family size for claim 'C'; did you mean 'C0'"):
        judge(study(), "quick", Table(()), {"C0": 6})
    with pytest.raises(BadInput, match="no family size for claim 'C'"):
        adjust([judge_one(between(1, 2))], {})


def assert_incomplete(the_study, entries, n, reason):
    (verdict,) = judge(the_study, "quick", Table(tuple(entries)), {"C": 1})
    assert (verdict.decision, verdict.gate, verdict.n) == ("INCONCLUSIVE", "incomplete", n)
    assert reason in verdict.reason
    assert verdict.estimate is None and verdict.low is None and verdict.values == ()


def test_a_missing_replicate_makes_a_cell_incomplete_and_shows_only_n():
    assert_incomplete(study(), rows(GOOD)[:-2], 9, "replicate 9: no rows")
    assert_incomplete(study(), (), 0, "replicate 0: no rows (and 9 more replicates)")


def test_a_missing_row_of_one_arm_makes_a_cell_incomplete():
    assert_incomplete(
        study(), rows(GOOD)[:-1], 9, "replicate 9: cell 'mlp', replicate 9: 0 rows of 'none' as own"
    )


@pytest.mark.parametrize("arm", ["batch", "none"])
def test_a_failed_row_makes_a_cell_incomplete(arm):
    failed = {3: {"status": "failed", "reason": "out of memory"}}
    entries = rows(GOOD, **{"better" if arm == "batch" else "other": failed})
    assert_incomplete(study(), entries, 9, f"replicate 3: '{arm}' failed at lr 0.1: out of memory")


def test_a_failed_tuning_row_makes_a_cell_incomplete():
    tuning = [row("none", 4, role="tune", lr=lr, status="failed" if lr == 1 else "done") for lr in GRID]
    assert_incomplete(study(), (*rows(GOOD), *tuning), 9, "'none' failed at lr 1")


def test_half_a_grid_makes_a_cell_incomplete():
    tuning = [row("batch", 4, role="tune", lr=lr) for lr in GRID[:2]]
    assert_incomplete(study(), (*rows(GOOD), *tuning), 9, "'batch' has 2 of 3 points of its grid")


def test_a_failed_common_row_matters_only_where_it_is_read():
    failed = row("batch", 2, role="common", status="failed")
    assert judge(study(), "quick", Table((*rows(GOOD), failed)), {"C": 1})[0].decision == "SUPPORTED"
    reads_common = study(hypothesis(estimand=lambda r: r.common("batch")["effect"]))
    common = [row("batch", i, role="common", effect=2.0 + i) for i in range(10) if i != 2]
    assert_incomplete(reads_common, (*rows(GOOD), *common, failed), 9, "0 rows of 'batch' as common")


def test_a_row_of_an_arm_that_is_not_read_may_fail():
    extra = row("other", 2, status="failed")
    assert judge(study(), "quick", Table((*rows(GOOD), extra)), {"C": 1})[0].decision == "SUPPORTED"


def test_a_metric_that_is_not_there_is_named():
    misspelt = study(hypothesis(estimand=functools.partial(effect, metric="efect")))
    assert_incomplete(misspelt, rows(GOOD), 0, "replicate 0: nothing is named 'efect'")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_a_number_that_is_not_finite_makes_a_cell_incomplete(value):
    assert_incomplete(study(), rows([*GOOD[:-1], value]), 9, "the estimand gave")


def test_an_estimand_that_takes_a_logarithm_of_zero_makes_a_cell_incomplete():
    logarithm = study(hypothesis(estimand=lambda r: math.log(max(0.0, r.own("batch")["effect"]))))
    assert_incomplete(logarithm, rows([*GOOD[:-1], 0.0]), 9, "replicate 9: ")


def test_replicates_beyond_the_declared_ones_are_not_read():
    the_study = study(replicates=10)
    extra = rows([*GOOD, -1000.0, 1000.0])
    tuning = tuple(row("batch", 1000, role="tune", lr=lr) for lr in GRID)
    (verdict,) = judge(the_study, "quick", Table((*extra, *tuning)), {"C": 1})
    assert (verdict.n, verdict.decision, verdict.values) == (10, "SUPPORTED", tuple(GOOD))


@pytest.mark.parametrize(("n", "gate"), [(1, "low_power"), (2, "low_power"), (4, "low_power"), (5, "")])
def test_fewer_than_five_replicates_carry_no_verdict(n, gate):
    values = between(1.5, 2.5, n=n) if n > 1 else [2.0]
    verdict = judge_one(values)
    assert verdict.gate == gate
    assert verdict.decision == ("INCONCLUSIVE" if gate else "SUPPORTED")
    assert verdict.estimate == pytest.approx(2.0)
    assert (verdict.low is None) == (n == 1)


@pytest.mark.parametrize("value", [0.0, 2.0, 0.1])
def test_no_spread_gives_no_verdict(value):
    verdict = judge_one([value] * 10)
    assert (verdict.decision, verdict.gate, verdict.low, verdict.bca) == (
        "INCONCLUSIVE",
        "no_spread",
        None,
        None,
    )
    assert verdict.estimate == pytest.approx(value)
    assert verdict.p_sign_flip == (1.0 if value == 0 else 2 / 1024)


def test_more_replicates_than_the_exact_test_takes_leave_its_p_out():
    verdict = judge_one(between(1.5, 2.5, n=41))
    assert (verdict.decision, verdict.p_sign_flip) == ("SUPPORTED", None)
    assert adjust([verdict], {"C": 1}) == (verdict,)


@pytest.mark.parametrize(("count", "gate"), [(0, ""), (2, ""), (3, "diverged"), (10, "diverged")])
def test_divergence_of_the_better_arm_is_a_gate_above_one_fifth(count, gate):
    verdict = judge_one(GOOD, better=changed(count, status="diverged"))
    assert verdict.gate == gate
    assert verdict.decision == ("INCONCLUSIVE" if gate else "SUPPORTED")
    assert verdict.n_diverged == {"batch": count, "none": 0}
    assert (verdict.low, verdict.high) == pytest.approx((1.5, 2.5))


def test_divergence_of_the_other_arm_is_the_effect():
    verdict = judge_one(GOOD, other=changed(10, status="diverged"))
    assert (verdict.gate, verdict.decision, verdict.n_diverged["none"]) == ("", "SUPPORTED", 10)


@pytest.mark.parametrize("arm", ["better", "other"])
@pytest.mark.parametrize(
    ("low", "high", "gate"), [(2, 0, ""), (1, 1, ""), (3, 0, "tuning_edge"), (2, 1, "tuning_edge")]
)
def test_choices_at_an_end_of_the_grid_are_a_gate_above_one_fifth(arm, low, high, gate):
    ends = {i: {"lr": GRID[0] if i < low else GRID[-1]} for i in range(low + high)}
    verdict = judge_one(GOOD, **{arm: ends})
    assert verdict.gate == gate
    assert verdict.edge["batch" if arm == "better" else "none"] == (low + high) / 10
    assert verdict.low == pytest.approx(1.5)


@pytest.mark.parametrize(("accuracy", "gate"), [(0.75, "tuning_edge"), (0.749, ""), (0.5, "")])
def test_an_arm_that_does_not_train_at_all_may_pick_an_end(accuracy, gate):
    verdict = judge_one(GOOD, other=changed(10, lr=GRID[0], val_acc=accuracy, chance=0.5))
    assert (verdict.gate, verdict.edge["none"]) == (gate, 1.0)


def test_the_median_says_whether_an_arm_trains_at_all():
    ends = {i: {"lr": GRID[0], "val_acc": 0.9 if i < 4 else 0.1} for i in range(10)}
    assert judge_one(GOOD, other=ends).gate == ""
    ends |= {4: ends[0], 5: ends[0]}
    assert judge_one(GOOD, other=ends).gate == "tuning_edge"


@pytest.mark.parametrize(("accuracy", "gate"), [(0.95, ""), (0.949, "under_trained")])
def test_training_accuracy_below_the_cells_constant_is_a_gate(accuracy, gate):
    cells = (Cell("mlp", constants={"min_train_acc": 0.95}),)
    assert judge_one(GOOD, cells=cells, other=changed(10, train_acc=accuracy)).gate == gate
    assert judge_one(GOOD, cells=cells, better=changed(10, train_acc=accuracy)).gate == ""
    alone = hypothesis(other=())
    assert (
        judge_one(GOOD, cells=cells, the_hypothesis=alone, better=changed(10, train_acc=accuracy)).gate
        == gate
    )


@pytest.mark.parametrize(
    ("allows", "low", "high", "decision", "gate", "label"),
    [
        # Some replicates allow support only: an upper bound is not to be had.
        (["support"], 0.5, 1.5, "SUPPORTED", "", "size_uncertain"),
        (["support"] * 10, 1.5, 2.5, "SUPPORTED", "", "at_least_delta"),
        (["support"], -0.5, 0.5, "INCONCLUSIVE", "censored", ""),
        (["support"], -2.5, -1.5, "INCONCLUSIVE", "censored", ""),
        (["support"], -0.5, 1.5, "INCONCLUSIVE", "", ""),
        # Some allow refutation only: a lower bound is not to be had.
        (["refute"], -2.5, -1.5, "REFUTED", "", "reversed"),
        (["refute"], -0.5, 0.5, "REFUTED", "", ""),
        (["refute"] * 10, 1.5, 2.5, "INCONCLUSIVE", "censored", ""),
        (["refute"], 0.5, 1.5, "INCONCLUSIVE", "censored", ""),
        # Both kinds, or both members of one pair: nothing is to be had.
        (["neither"], 1.5, 2.5, "INCONCLUSIVE", "censored", ""),
        (["neither"], -2.5, -1.5, "INCONCLUSIVE", "censored", ""),
        (["support", "refute"], 1.5, 2.5, "INCONCLUSIVE", "censored", ""),
        (["support", "refute"], -0.5, 0.5, "INCONCLUSIVE", "censored", ""),
        (["neither"] * 10, -0.5, 0.5, "INCONCLUSIVE", "censored", ""),
        (["neither"], -0.5, 1.5, "INCONCLUSIVE", "censored", ""),
        (["support", "refute"], -0.5, 1.5, "INCONCLUSIVE", "censored", ""),
    ],
)
def test_censored_replicates_limit_what_a_cell_may_show(allows, low, high, decision, gate, label):
    verdict = judge_one(between(low, high), allows=dict(enumerate(allows)))
    assert (verdict.decision, verdict.gate, verdict.label) == (decision, gate, label)
    assert verdict.low == pytest.approx(low)
    assert verdict.allows[: len(allows)] == tuple(allows)


@pytest.mark.parametrize(
    ("allows", "low", "high", "decision", "gate"),
    [
        ("support", -0.5, 0.5, "INCONCLUSIVE", "censored"),
        ("refute", -0.5, 0.5, "INCONCLUSIVE", "censored"),
        ("support", 1.5, 2.5, "REFUTED", ""),
        ("refute", 1.5, 2.5, "INCONCLUSIVE", "censored"),
        ("support", -2.5, -1.5, "INCONCLUSIVE", "censored"),
        ("refute", -2.5, -1.5, "REFUTED", ""),
        ("support", 0.5, 1.5, "INCONCLUSIVE", ""),
    ],
)
def test_equivalence_needs_both_bounds(allows, low, high, decision, gate):
    verdict = judge_one(between(low, high), the_hypothesis=hypothesis(kind="equivalent"), allows={3: allows})
    assert (verdict.decision, verdict.gate) == (decision, gate)


def test_the_first_gate_of_the_documented_order_is_named():
    cells = (Cell("mlp", constants={"min_train_acc": 0.95}),)
    faults = {"status": "diverged", "lr": GRID[0], "train_acc": 0.5}
    all_faults = {"better": changed(10, **faults), "other": changed(10, **faults), "cells": cells}
    neither = dict.fromkeys(range(10), "neither")
    order = []
    same = [2.0] * 10
    order.append(judge_one(same[:4], allows=neither, **all_faults).gate)
    order.append(judge_one(same, allows=neither, **all_faults).gate)
    milder = {k: changed(10, lr=GRID[0], train_acc=0.5) for k in ("better", "other")}
    order.append(judge_one(same, allows=neither, cells=cells, **milder).gate)
    order.append(judge_one(same, allows=neither, **milder).gate)
    order.append(judge_one(same, allows=neither).gate)
    order.append(judge_one(same).gate)
    assert order == ["low_power", "diverged", "under_trained", "tuning_edge", "censored", "no_spread"]


def sweep_effect(replicate):
    return replicate.grid("batch")[1]["effect"]


def sweep_rows(values, status="done", role="sweep"):
    return [
        row(arm, index, role=role, lr=lr, effect=value, status=status)
        for index, value in enumerate(values)
        for arm in ("batch", "none")
        for lr in GRID
    ]


def test_in_a_sweep_divergence_and_grid_ends_are_no_gates():
    the_study = study(hypothesis(estimand=sweep_effect), program="sweep")
    (verdict,) = judge(the_study, "quick", Table(tuple(sweep_rows(GOOD, "diverged"))), {"C": 1})
    assert (verdict.decision, verdict.gate, verdict.tuning, verdict.edge) == ("SUPPORTED", "", "", {})
    assert verdict.n_diverged == {"batch": 30, "none": 30}


def test_a_sweep_without_its_whole_grid_is_incomplete():
    the_study = study(hypothesis(estimand=sweep_effect), program="sweep")
    assert_incomplete(the_study, sweep_rows(GOOD)[:-1], 9, "'none' has 2 of 3 points of its grid")


def test_tuning_rows_in_the_table_leave_the_verdict_alone():
    (bare,) = judge(study(), "quick", Table(rows(GOOD)), {"C": 1})
    tuned = Table((*rows(GOOD), *sweep_rows(GOOD, role="tune")))
    assert judge(study(), "quick", tuned, {"C": 1}) == (bare,)


def test_one_tuning_for_all_is_said_beside_the_verdict():
    (verdict,) = judge(study(tuning="once"), "quick", Table(rows(GOOD)), {"C": 1})
    assert (verdict.tuning, verdict.caveat) == ("once", "conditional on one tuning")
    (verdict,) = judge(study(hypothesis(primary=False), tuning="once"), "quick", Table(rows(GOOD)), {})
    assert verdict.caveat == "exploratory, conditional on one tuning"


def test_a_smoke_run_has_no_verdict():
    the_study = study()
    (verdict,) = judge(the_study, "smoke", Table(rows([2.0])), {"C": 1})
    assert (verdict.gate, verdict.n, verdict.estimate) == ("low_power", 1, 2.0)


def test_a_cell_is_judged_by_its_own_number_of_replicates():
    cells = (Cell("mlp", replicates=12), Cell("cnn", model="cnn"))
    the_study = study(cells=cells, replicates=10)
    table = Table((*rows(between(1.5, 2.5, n=12)), *rows(between(1.5, 2.5, n=12), cell="cnn")))
    mlp, cnn = judge(the_study, "quick", table, {"C": 1})
    assert (mlp.n, mlp.decision, cnn.n) == (12, "SUPPORTED", 10)
    few = Table((*rows(GOOD), *rows(GOOD, cell="cnn")))
    mlp, cnn = judge(the_study, "quick", few, {"C": 1})
    assert mlp.gate == "incomplete" and "replicate 10" in mlp.reason
    assert cnn.gate != "incomplete"
