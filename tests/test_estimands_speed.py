"""Estimands of speed, against numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.study.estimands import (
    area_difference,
    area_under_curve,
    log_examples_ratio,
    log_examples_ratio_difference,
    log_steps_ratio,
    log_time_ratio,
    steps_to_target,
)
from tests.estimand_rows import FLAT, entry, reaching, replicate


def test_a_crossing_is_interpolated_linearly_in_accuracy_and_in_log_step():
    row = entry(curve=((1, 0.1), (10, 0.5), (100, 0.9)))
    assert steps_to_target(row, 0.7) == pytest.approx(10**1.5)
    assert steps_to_target(row, 0.2) == pytest.approx(10**0.25)
    assert steps_to_target(row, 0.5) == pytest.approx(10)
    assert steps_to_target(row, 0.9) == pytest.approx(100)
    assert steps_to_target(row, 0.91) is None


def test_a_target_reached_at_the_first_evaluation_gives_its_step():
    assert steps_to_target(entry(curve=((4, 0.95), (10, 0.99))), 0.9) == 4
    assert steps_to_target(entry(curve=((4, 0.9), (10, 0.99))), 0.9) == 4


def test_an_evaluation_before_training_is_no_point_of_the_curve():
    assert steps_to_target(entry(curve=((0, 0.1), (4, 0.95))), 0.9) == 4
    assert steps_to_target(entry(curve=((0, 0.95), (4, 0.1))), 0.9) is None


def test_the_first_of_several_crossings_counts():
    assert steps_to_target(entry(curve=((1, 0.1), (4, 0.9), (8, 0.2), (16, 0.9))), 0.9) == pytest.approx(4)


def test_a_diverged_row_never_reaches_the_target():
    assert steps_to_target(entry(curve=((1, 0.95), (4, 0.95)), status="diverged"), 0.9) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 1))
def test_steps_to_target_lie_on_the_curve_between_points_around_the_target(accuracies, target):
    curve = tuple((2.0**i, a) for i, a in enumerate(accuracies))
    steps = steps_to_target(entry(curve=curve), target)
    first = next((i for i, a in enumerate(accuracies) if a >= target), None)
    if first is None:
        assert steps is None
    else:
        assert 2.0 ** max(first - 1, 0) * (1 - 1e-9) <= steps <= 2.0**first * (1 + 1e-9)


def test_steps_ratio_is_positive_where_the_better_arm_is_faster():
    both = replicate(entry("batch", curve=reaching(20)), entry("none", curve=reaching(50)))
    estimate = log_steps_ratio(both, better="batch", other="none")
    assert estimate.value == pytest.approx(math.log(2.5))
    assert estimate.allows == "both"
    assert log_steps_ratio(both, better="none", other="batch").value == pytest.approx(-math.log(2.5))


@pytest.mark.parametrize(
    ("better", "other", "value", "allows"),
    [
        (reaching(20), FLAT, math.log(100 / 20), "support"),
        (FLAT, reaching(50), math.log(50 / 100), "refute"),
        (FLAT, FLAT, 0.0, "neither"),
    ],
)
def test_a_censored_arm_counts_its_budget_and_limits_what_may_be_shown(better, other, value, allows):
    both = replicate(entry("batch", curve=better), entry("none", curve=other))
    estimate = log_steps_ratio(both, better="batch", other="none")
    assert estimate.value == pytest.approx(value)
    assert estimate.allows == allows


def test_a_diverged_other_arm_is_censored_at_its_budget():
    both = replicate(entry("batch", curve=reaching(20)), entry("none", curve=reaching(5), status="diverged"))
    estimate = log_steps_ratio(both, better="batch", other="none")
    assert (estimate.value, estimate.allows) == (pytest.approx(math.log(5)), "support")


def test_reaching_the_target_at_the_last_step_is_not_censored():
    both = replicate(entry("batch", curve=reaching(20)), entry("none", curve=((50, 0.1), (100, 0.9))))
    estimate = log_steps_ratio(both, better="batch", other="none")
    assert (estimate.value, estimate.allows) == (pytest.approx(math.log(5)), "both")


@pytest.mark.parametrize(
    ("large", "small", "value", "allows"),
    [
        (reaching(20), reaching(50), math.log(20 * 256 / (50 * 64)), "both"),
        (FLAT, reaching(50), math.log(100 * 256 / (50 * 64)), "support"),
        (reaching(20), FLAT, math.log(20 * 256 / (100 * 64)), "refute"),
        (FLAT, FLAT, math.log(4), "neither"),
    ],
)
def test_examples_ratio_counts_steps_times_batch_size(large, small, value, allows):
    rows = replicate(entry("B256", curve=large, batch_size=256), entry("B64", curve=small, batch_size=64))
    estimate = log_examples_ratio(rows, large="B256", small="B64")
    assert estimate.value == pytest.approx(value)
    assert estimate.allows == allows


CENSORED_ALLOWS = [
    ((), "both"),
    (("large",), "support"),
    (("other_small",), "support"),
    (("large", "other_small"), "support"),
    (("small",), "refute"),
    (("other_large",), "refute"),
    (("small", "other_large"), "refute"),
    (("large", "small"), "neither"),
    (("large", "other_large"), "neither"),
    (("small", "other_small"), "neither"),
]


@pytest.mark.parametrize(("censored", "allows"), CENSORED_ALLOWS)
def test_difference_of_examples_ratios_and_what_each_censored_arm_does_to_it(censored, allows):
    steps = {"large": 20, "small": 50, "other_large": 10, "other_small": 80}
    sizes = {"large": 256, "small": 64, "other_large": 128, "other_small": 32}
    rows = replicate(
        *(
            entry(arm, curve=FLAT if arm in censored else reaching(steps[arm]), batch_size=sizes[arm])
            for arm in steps
        )
    )
    examples = {arm: (100 if arm in censored else steps[arm]) * sizes[arm] for arm in steps}
    estimate = log_examples_ratio_difference(rows, **{arm: arm for arm in steps})
    by_hand = math.log(examples["large"] / examples["small"]) - math.log(
        examples["other_large"] / examples["other_small"]
    )
    assert estimate.value == pytest.approx(by_hand)
    assert estimate.allows == allows


def test_time_ratio_multiplies_steps_by_the_duration_of_a_step_measured_alone():
    rows = replicate(
        entry("batch", curve=reaching(20), time_step_ms=99.0),
        entry("none", curve=reaching(50), time_step_ms=0.01),
        entry("batch", "timing", time_step_ms=0.75),
        entry("none", "timing", time_step_ms=0.5),
    )
    estimate = log_time_ratio(rows, better="batch", other="none")
    assert (estimate.value, estimate.allows) == (pytest.approx(math.log(50 * 0.5 / (20 * 0.75))), "both")
    assert log_time_ratio(rows, better="none", other="batch").value == pytest.approx(-estimate.value)


@pytest.mark.parametrize(
    ("better", "other", "allows"),
    [(reaching(20), FLAT, "support"), (FLAT, reaching(50), "refute"), (FLAT, FLAT, "neither")],
)
def test_a_time_ratio_is_censored_where_its_steps_are(better, other, allows):
    rows = [entry("batch", curve=better), entry("none", curve=other)]
    rows += [entry(arm, "timing", time_step_ms=0.5) for arm in ("batch", "none")]
    assert log_time_ratio(replicate(*rows), better="batch", other="none").allows == allows


def test_a_time_ratio_needs_the_timing_row_of_both_arms():
    rows = [entry("batch", curve=reaching(20)), entry("none", curve=reaching(50))]
    timed = entry("batch", "timing", time_step_ms=0.5)
    with pytest.raises(LookupError, match="'none' as timing"):
        log_time_ratio(replicate(*rows, timed), better="batch", other="none")


def test_the_area_under_a_curve_is_its_mean_over_steps():
    assert area_under_curve(entry(curve=((0, 0.0), (100, 1.0)))) == pytest.approx(0.5)
    assert area_under_curve(entry(curve=((10, 0.4), (20, 0.6), (100, 1.0)))) == pytest.approx(
        (10 * 0.5 + 80 * 0.8) / 90
    )


def test_the_last_point_of_a_curve_holds_to_the_budget():
    assert area_under_curve(entry(curve=((0, 0.2), (50, 0.8)))) == pytest.approx((50 * 0.5 + 50 * 0.8) / 100)
    assert area_under_curve(entry(curve=((40, 0.7),))) == pytest.approx(0.7)
    assert area_under_curve(entry(curve=((100, 0.7),))) == 0.7


def test_a_diverged_row_has_the_area_of_guessing():
    assert area_under_curve(entry(curve=((0, 0.9), (50, 0.9)), status="diverged")) == 0.1


def test_a_row_without_a_curve_has_no_area():
    with pytest.raises(LookupError, match="'batch' has no curve"):
        area_under_curve(entry())


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_the_area_is_numpys_trapezoid(accuracies):
    steps = np.geomspace(1, 100, len(accuracies))
    area = area_under_curve(entry(curve=tuple(zip(steps, accuracies, strict=True))))
    assert area == pytest.approx(np.trapezoid(accuracies, steps) / 99)


def test_an_area_difference_is_in_points_and_never_censored():
    rows = replicate(
        entry("batch", curve=((0, 0.5), (100, 0.7))), entry("none", curve=((0, 0.1), (100, 0.5)))
    )
    assert area_difference(rows, better="batch", other="none") == pytest.approx(30)
    assert area_difference(rows, better="none", other="batch", points=1) == pytest.approx(-0.3)
