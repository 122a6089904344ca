"""What each rule decides at its borders: effects of 0, δ/2, δ and 2δ, censoring, no spread, divergence."""

import functools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bnbench.study import Cell, Table
from bnbench.study.claims import judge
from bnbench.study.estimands import accuracy_difference, log_steps_ratio, metric_slope
from bnbench.study.stats import sign_flip_p
from tests.verdict_tables import DELTA, GRID, between, curve, effect, hypothesis, judge_one, row, study

LARGE, UNCERTAIN, SMALL, REVERSED = "at_least_delta", "size_uncertain", "negligible", "reversed"
OPEN = ("INCONCLUSIVE", "")


@pytest.mark.parametrize(
    ("effect_in_deltas", "narrow", "wide"),
    [
        # The interval is the effect ± .4 δ, or ± 1.2 δ.
        (-2.0, ("REFUTED", REVERSED), ("REFUTED", REVERSED)),
        (-1.0, ("REFUTED", REVERSED), ("REFUTED", "")),
        (-0.5, ("REFUTED", SMALL), ("REFUTED", "")),
        (0.0, ("REFUTED", SMALL), OPEN),
        (0.5, ("REFUTED", SMALL), OPEN),
        (1.0, ("SUPPORTED", UNCERTAIN), OPEN),
        (2.0, ("SUPPORTED", LARGE), ("SUPPORTED", UNCERTAIN)),
    ],
)
def test_greater_over_effect_and_precision(effect_in_deltas, narrow, wide):
    for half, expected in ((0.4, narrow), (1.2, wide)):
        verdict = judge_one(between(effect_in_deltas - half, effect_in_deltas + half))
        assert (verdict.decision, verdict.label) == expected
        assert verdict.half_width == pytest.approx(half)


@pytest.mark.parametrize(
    ("effect_in_deltas", "narrow"),
    [
        (-2.0, "REFUTED"),
        (-1.0, "INCONCLUSIVE"),
        (-0.5, "SUPPORTED"),
        (0.0, "SUPPORTED"),
        (0.5, "SUPPORTED"),
        (1.0, "INCONCLUSIVE"),
        (2.0, "REFUTED"),
    ],
)
def test_equivalent_over_effect_and_precision(effect_in_deltas, narrow):
    for half, expected in ((0.4, narrow), (1.2, "INCONCLUSIVE")):
        values = between(effect_in_deltas - half, effect_in_deltas + half)
        verdict = judge_one(values, the_hypothesis=hypothesis(kind="equivalent"))
        assert (verdict.decision, verdict.label) == (expected, "")


NEAR = 1e-6


@pytest.mark.parametrize(
    ("low", "high", "greater", "equivalent"),
    [
        # The upper end at δ.
        (-0.5, DELTA - NEAR, ("REFUTED", SMALL), "SUPPORTED"),
        (-0.5, DELTA + NEAR, OPEN, "INCONCLUSIVE"),
        (0.5, DELTA - NEAR, ("REFUTED", SMALL), "SUPPORTED"),
        (0.5, DELTA + NEAR, ("SUPPORTED", UNCERTAIN), "INCONCLUSIVE"),
        # The lower end at 0 and at δ.
        (-NEAR, 1.5, OPEN, "INCONCLUSIVE"),
        (NEAR, 1.5, ("SUPPORTED", UNCERTAIN), "INCONCLUSIVE"),
        (DELTA - NEAR, 2.5, ("SUPPORTED", UNCERTAIN), "INCONCLUSIVE"),
        (DELTA + NEAR, 2.5, ("SUPPORTED", LARGE), "REFUTED"),
        # The lower end at −δ, the upper one at 0 and at −δ.
        (-DELTA + NEAR, 0.5, ("REFUTED", SMALL), "SUPPORTED"),
        (-DELTA - NEAR, 0.5, ("REFUTED", ""), "INCONCLUSIVE"),
        (-DELTA - NEAR, -NEAR, ("REFUTED", REVERSED), "INCONCLUSIVE"),
        (-DELTA - NEAR, NEAR, ("REFUTED", ""), "INCONCLUSIVE"),
        (-2.5, -DELTA - NEAR, ("REFUTED", REVERSED), "REFUTED"),
        (-2.5, -DELTA + NEAR, ("REFUTED", REVERSED), "INCONCLUSIVE"),
    ],
)
def test_an_interval_that_ends_just_beside_a_border(low, high, greater, equivalent):
    verdict = judge_one(between(low, high))
    assert (verdict.decision, verdict.label) == greater
    assert judge_one(between(low, high), the_hypothesis=hypothesis(kind="equivalent")).decision == equivalent


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("true_effect", [0.0, 0.5, 1.0, 2.0])
def test_simulated_effects_are_decided_as_often_as_the_noncentral_t_says(true_effect, size):
    """At the studies' noise, .8 δ: the rates of an upper end below δ and of a lower end above 0."""
    many, n, sd = 500, 10, 0.8
    draws = np.random.default_rng(11).normal(true_effect, sd, (many, n))
    hypotheses = [
        hypothesis(f"h{i}", estimand=functools.partial(effect, metric=f"e{i}")) for i in range(many)
    ]
    entries = [
        line
        for r in range(n)
        for line in (row("batch", r, **{f"e{i}": x for i, x in enumerate(draws[:, r])}), row("none", r))
    ]
    table = Table(tuple(entries))
    verdicts = judge(study(*hypotheses, replicates=n), "quick", table, {"C": size}, bootstrap=False)
    critical = scipy_stats.t.ppf(1 - 0.05 / size / 2, n - 1)
    scale = math.sqrt(n) / sd
    refuted = scipy_stats.nct.cdf(-critical, n - 1, (true_effect - DELTA) * scale)
    above_zero = scipy_stats.nct.sf(critical, n - 1, true_effect * scale)
    # An interval above 0 supports unless it lies below δ as well, which is part of what refutes.
    for decided, least, most in (
        ([v.decision == "REFUTED" for v in verdicts], refuted, refuted),
        ([v.low > 0 for v in verdicts], above_zero, above_zero),
        ([v.decision == "SUPPORTED" for v in verdicts], above_zero - refuted, above_zero),
    ):
        share = np.mean(decided)
        slack = 4 * math.sqrt(max(share * (1 - share), 2e-3) / many)
        assert least - slack <= share <= most + slack


BUDGET, TARGET = 100, 0.9
STEPS_CELL = (Cell("mlp", steps=BUDGET, constants={"target": TARGET}),)
FASTER = (20, 22, 18, 25, 21, 19, 24, 20, 23, 17)
SLOWER = (50, 60, 45, 70, 52, 48, 66, 51, 58, 44)


def judge_steps(better, other, status="done"):
    """The verdict on steps to the target; None is a row that never reaches it, `status` that of such rows."""
    entries = [
        row(arm, index, steps=BUDGET, curve=curve(steps, BUDGET, TARGET), status="done" if steps else status)
        for arm, all_steps in (("batch", better), ("none", other))
        for index, steps in enumerate(all_steps)
    ]
    estimand = functools.partial(log_steps_ratio, better="batch", other="none")
    the_study = study(hypothesis(estimand=estimand, delta=math.log(1.25)), cells=STEPS_CELL)
    (verdict,) = judge(the_study, "quick", Table(tuple(entries)), {"C": 1})
    return verdict


def test_steps_that_are_all_observed_are_decided_without_a_rank_test():
    verdict = judge_steps(FASTER, SLOWER)
    assert (verdict.decision, verdict.label, verdict.p_rank) == ("SUPPORTED", LARGE, None)
    assert verdict.values == pytest.approx(np.log(np.divide(SLOWER, FASTER)))
    assert judge_steps(SLOWER, FASTER).label == REVERSED


@pytest.mark.parametrize("status", ["done", "diverged"])
@pytest.mark.parametrize("count", [1, 5, 10])
def test_an_other_arm_that_never_reaches_the_target_may_support(count, status):
    verdict = judge_steps(FASTER, (*[None] * count, *SLOWER[count:]), status)
    assert (verdict.decision, verdict.label, verdict.gate) == ("SUPPORTED", LARGE, "")
    assert verdict.allows.count("support") == count
    assert verdict.p_rank == 2 / 2**10


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("status", ["done", "diverged"])
def test_a_better_arm_that_never_reaches_the_target_may_not_support(count, status):
    verdict = judge_steps((*[None] * count, *FASTER[count:]), SLOWER, status)
    assert (verdict.decision, verdict.gate) == ("INCONCLUSIVE", "censored")
    assert verdict.low > 0
    # The bounds are smaller than all that was observed, so each of them may be anywhere in the order.
    observed = [rank / (11 - count) for rank in range(1, 11 - count)]
    assert verdict.p_rank == sign_flip_p([*observed, *[-0.5] * count])


def test_a_better_arm_that_never_reaches_the_target_may_refute():
    verdict = judge_steps([None] * 10, SLOWER)
    assert (verdict.decision, verdict.label) == ("REFUTED", REVERSED)
    assert verdict.p_rank == 2 / 2**10
    assert judge_steps([None] * 10, SLOWER, "diverged").gate == "diverged"


@pytest.mark.parametrize("count", [1, 10])
def test_pairs_censored_in_both_arms_decide_nothing(count):
    never = [None] * count
    verdict = judge_steps((*never, *FASTER[count:]), (*never, *SLOWER[count:]))
    assert (verdict.decision, verdict.gate) == ("INCONCLUSIVE", "censored")
    assert verdict.reason.startswith(f"{count} of 10 replicates are censored")
    # Nine pairs of which all were won by one arm, or none of which anybody knows who was first.
    assert verdict.p_rank == (2 / 2**9 if count == 1 else 1.0)


def test_one_pair_censored_on_each_side_decides_nothing():
    verdict = judge_steps((None, *FASTER[1:]), (SLOWER[0], None, *SLOWER[2:]))
    assert (verdict.decision, verdict.gate) == ("INCONCLUSIVE", "censored")
    assert {"support", "refute"} <= set(verdict.allows)


def test_too_many_replicates_for_the_exact_test_have_no_rank_test():
    verdict = judge_one(between(1.5, 2.5, n=41), allows={0: "support"})
    assert (verdict.decision, verdict.p_sign_flip, verdict.p_rank) == ("SUPPORTED", None, None)


def judge_accuracy(better, other, diverged_better=0, diverged_other=0):
    """The verdict on test accuracy, where the first rows of an arm diverged and score chance."""
    entries = []
    for arm, accuracies, diverged in (("batch", better, diverged_better), ("none", other, diverged_other)):
        for index, accuracy in enumerate(accuracies):
            status, scored = ("diverged", 0.1) if index < diverged else ("done", accuracy)
            entries.append(row(arm, index, status=status, test_acc=scored))
    estimand = functools.partial(accuracy_difference, better="batch", other="none")
    (verdict,) = judge(study(hypothesis(estimand=estimand)), "quick", Table(tuple(entries)), {"C": 1})
    return verdict


GOOD_ACC = tuple(0.90 + 0.001 * i for i in range(10))
FLAT_ACC = (0.88,) * 10


def test_an_arm_that_diverges_counts_with_its_chance_score():
    """One or two diverging rows of ten cost the better arm its verdict by their spread, three by the gate."""
    assert judge_accuracy(GOOD_ACC, FLAT_ACC).decision == "SUPPORTED"
    one = judge_accuracy(GOOD_ACC, FLAT_ACC, diverged_better=1)
    assert (one.decision, one.gate, one.values[0]) == ("INCONCLUSIVE", "", pytest.approx(10 - 88))
    assert judge_accuracy(GOOD_ACC, FLAT_ACC, diverged_better=2).gate == ""
    three = judge_accuracy(GOOD_ACC, FLAT_ACC, diverged_better=3)
    assert (three.gate, three.n_diverged) == ("diverged", {"batch": 3, "none": 0})
    assert three.estimate is not None


def test_another_arm_that_diverges_in_all_replicates_is_the_effect():
    verdict = judge_accuracy(GOOD_ACC, FLAT_ACC, diverged_other=10)
    assert (verdict.decision, verdict.label, verdict.gate) == ("SUPPORTED", LARGE, "")
    assert verdict.estimate == pytest.approx(100 * (np.mean(GOOD_ACC) - 0.1))


def test_both_arms_diverging_everywhere_is_gated_by_the_better_one():
    verdict = judge_accuracy(GOOD_ACC, FLAT_ACC, diverged_better=10, diverged_other=10)
    assert (verdict.gate, verdict.decision, verdict.estimate) == ("diverged", "INCONCLUSIVE", 0.0)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["greater", "equivalent"])
def test_equal_replicates_decide_nothing_wherever_they_lie(value, kind):
    verdict = judge_one([value] * 10, the_hypothesis=hypothesis(kind=kind))
    assert (verdict.decision, verdict.gate, verdict.low) == ("INCONCLUSIVE", "no_spread", None)
    assert verdict.d_z is None and verdict.p is None


def test_equal_replicates_that_are_all_bounds_have_a_rank_test_and_no_interval():
    verdict = judge_one([2.0] * 10, allows=dict.fromkeys(range(10), "support"))
    assert (verdict.decision, verdict.gate, verdict.p_rank) == ("INCONCLUSIVE", "no_spread", 2 / 2**10)


DOSES = (("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", 4.0))


def judge_slope(losses, doses=DOSES, **bound):
    """The verdict on a slope of the loss over doses; `losses` has one line a replicate, one column an arm."""
    names = [name for name, _ in doses]
    entries = [
        row(arm, index, lr=GRID[1], train_loss=loss)
        for index, line in enumerate(losses)
        for arm, loss in zip(names, line, strict=True)
    ]
    estimand = functools.partial(metric_slope, doses=doses, metric="train/loss", **bound)
    slope = hypothesis(estimand=estimand, delta=0.1, better=tuple(names), other=())
    the_study = study(slope, replicates=len(losses), arms=(*names, "none"))
    (verdict,) = judge(the_study, "quick", Table(tuple(entries)), {"C": 1})
    return verdict


def test_a_slope_shows_its_trend_over_the_doses():
    generator = np.random.default_rng(5)
    doses = np.array([dose for _, dose in DOSES])
    losses = 0.5 * doses + generator.normal(0, 0.5, (10, 4))
    verdict = judge_slope(losses.tolist())
    expected = [np.polyfit(doses, line, 1)[0] for line in losses]
    assert verdict.values == pytest.approx(expected)
    by_dose = losses[:, np.argsort(doses)]
    assert verdict.page_p == pytest.approx(scipy_stats.page_trend_test(by_dose).pvalue)
    rho = np.mean([scipy_stats.spearmanr(doses, line).statistic for line in losses])
    assert verdict.dose_rho == pytest.approx(rho)
    assert (verdict.decision, verdict.page_p < 0.01) == ("SUPPORTED", True)
    falling = judge_slope(losses.tolist(), sign=-1.0)
    assert (falling.label, falling.page_p > 0.99) == (REVERSED, True)
    assert falling.dose_rho == pytest.approx(-rho)


def test_two_doses_or_another_estimand_have_no_trend():
    losses = np.random.default_rng(5).normal(1, 0.1, (10, 4)).tolist()
    two = judge_slope([line[:2] for line in losses], doses=DOSES[:2])
    assert two.estimate is not None and (two.page_p, two.dose_rho) == (None, None)
    same = judge_slope([line[:3] for line in losses], doses=(("a", 1.0), ("b", 2.0), ("c", 2.0)))
    assert (same.page_p, same.dose_rho) == (None, None)
    assert judge_one(between(1.5, 2.5)).page_p is None


def test_a_slope_with_a_row_that_missed_its_training_loss_decides_nothing():
    losses = 0.5 * np.array([dose for _, dose in DOSES]) + np.random.default_rng(5).normal(0, 0.1, (10, 4))
    names = [name for name, _ in DOSES]
    entries = [
        row(arm, r, train_loss=losses[r, column], train_reached=float((r, arm) != (3, "b")))
        for r in range(10)
        for column, arm in enumerate(names)
    ]
    estimand = functools.partial(metric_slope, doses=DOSES, metric="train/loss")
    slope = hypothesis(estimand=estimand, delta=0.1, better=tuple(names), other=())
    (verdict,) = judge(study(slope, arms=(*names, "none")), "quick", Table(tuple(entries)), {"C": 1})
    assert (verdict.decision, verdict.gate) == ("INCONCLUSIVE", "censored")
    assert verdict.reason.startswith("1 of 10 replicates are censored")
