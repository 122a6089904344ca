"""The statistics behind verdicts, against enumeration, scipy, statsmodels and published tables."""

import doctest
import inspect
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from bnbench.registry import BadInput
from bnbench.study import stats

numbers = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 6))
samples = st.lists(numbers, min_size=2, max_size=12)
spread_samples = samples.filter(lambda v: max(v) - min(v) > 1e-3)


def brute_force_sign_flip(values):
    """Every sign vector one by one, in exact integers (the values are multiples of 1e-6)."""
    x = [round(v * 1e6) for v in values]
    sums = [
        abs(sum(s * v for s, v in zip(signs, x, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(x))
    ]
    return sum(total >= abs(sum(x)) for total in sums) / len(sums)


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=1, max_size=9))
def test_sign_flip_p_is_the_share_of_all_sign_vectors(values):
    assert stats.sign_flip_p(values) == brute_force_sign_flip(values)


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (5, 0.0625), (8, 0.0078125), (10, 0.001953125)])
def test_smallest_sign_flip_p_is_two_sign_vectors_of_all(n, p):
    assert stats.sign_flip_p([1.0 + 0.1 * i for i in range(n)]) == p


def test_sign_flip_p_is_one_where_the_differences_sum_to_zero():
    assert stats.sign_flip_p([0.1, 0.2, -0.3]) == 1.0
    assert stats.sign_flip_p([0.0] * 10) == 1.0
    assert stats.sign_flip_p([1.1, -1.1, 2.3, -2.3, 0.7, -0.7, 0.1, -0.1]) == 1.0


def test_sign_flip_p_of_signed_ranks_is_wilcoxons_exact_p():
    ranks = [1, 2, -3, 4, 5, -6, 7, 8, 9, 10, 11, -12, 13, 14, 15, 16, 17, 18, 19, 20]
    expected = scipy_stats.wilcoxon(ranks, method="exact").pvalue
    assert stats.sign_flip_p(ranks) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "positive"), [(20, 15), (30, 22), (40, 27)])
def test_sign_flip_p_of_equal_sizes_is_the_sign_tests_p(n, positive):
    values = [1.0] * positive + [-1.0] * (n - positive)
    assert stats.sign_flip_p(values) == pytest.approx(scipy_stats.binomtest(positive, n).pvalue, rel=1e-12)


def test_sign_flip_p_counts_ties_that_rounding_hides():
    # 0.1 + 0.2 is above 0.3 by one bit, so sums that are equal on paper differ in floats.
    assert stats.sign_flip_p([0.1 + 0.2, -0.3, 1.0]) == 0.75 == brute_force_sign_flip([0.3, -0.3, 1.0])
    assert stats.sign_flip_p([0.1, 0.2, -0.3, 0.0]) == 1.0


@pytest.mark.parametrize("n", [0, 41])
def test_sign_flip_p_refuses_what_it_cannot_enumerate(n):
    with pytest.raises(BadInput, match=f"takes 1 to 40 values, not {n}"):
        stats.sign_flip_p([1.0] * n)


@settings(deadline=None, max_examples=60)
@given(spread_samples, st.permutations(range(12)), st.sampled_from([1e-6, 0.25, 3.0, 1e6]))
def test_sign_flip_p_ignores_sign_order_and_scale(values, order, scale):
    p = stats.sign_flip_p(values)
    shuffled = [values[i] for i in order if i < len(values)]
    assert stats.sign_flip_p([-v for v in values]) == p
    assert stats.sign_flip_p(shuffled) == p
    assert stats.sign_flip_p([scale * v for v in values]) == p
    assert 2 / 2 ** len(values) <= p <= 1


@settings(deadline=None, max_examples=60)
@given(spread_samples, st.sampled_from([0.5, 0.9, 0.95, 1 - 0.05 / 6, 0.999]))
def test_t_interval_and_p_are_scipys(values, level):
    test = scipy_stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(level)
    assert stats.paired_t_interval(values, level) == pytest.approx(
        (interval.low, interval.high), rel=1e-9, abs=1e-9
    )
    assert stats.paired_t_p(values) == pytest.approx(test.pvalue, rel=1e-9)
    assert stats.smallest_visible_effect(values, level) == pytest.approx((interval.high - interval.low) / 2)


@settings(deadline=None, max_examples=60)
@given(spread_samples, st.sampled_from([1e-3, 0.5, 40.0]))
def test_t_interval_turns_with_the_sign_and_scales_with_the_unit(values, scale):
    low, high = stats.paired_t_interval(values, 0.95)
    assert stats.paired_t_interval([-v for v in values], 0.95) == pytest.approx((-high, -low))
    assert stats.paired_t_interval([scale * v for v in values], 0.95) == pytest.approx(
        (scale * low, scale * high)
    )
    assert stats.d_z([scale * v for v in values]) == pytest.approx(stats.d_z(values))


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0], [0.1 + 0.2, 0.3], [0.0, 0.0]])
def test_too_few_values_or_no_spread_give_no_interval(values):
    assert stats.standard_deviation(values) == 0
    assert stats.paired_t_interval(values, 0.95) is None
    assert stats.paired_t_p(values) is None
    assert stats.smallest_visible_effect(values, 0.95) is None
    assert stats.bca_interval(values, seed=0) is None
    assert stats.d_z(values) is None
    assert stats.welch_p(values, [1.0, 2.0]) is None


def test_expected_half_width_agrees_with_the_pilots_arithmetic():
    # sd .8 pp: .9 pp for 6 cells at n = 10, 1.0 for 12 cells; .55 for 6 cells at n = 20.
    assert stats.expected_half_width(0.8, 10, 1 - 0.05 / 6) == pytest.approx(0.9, abs=0.05)
    assert stats.expected_half_width(0.8, 10, 1 - 0.05 / 12) == pytest.approx(1.0, abs=0.05)
    assert stats.expected_half_width(0.8, 20, 1 - 0.05 / 6) == pytest.approx(0.55, abs=0.05)
    assert stats.expected_half_width(1.0, 10, 0.95) == pytest.approx(2.262157 / math.sqrt(10), rel=1e-6)


@pytest.mark.parametrize(("n", "level"), [(1, 0.95), (10, 0.0), (10, 1.0), (10, 95)])
def test_expected_half_width_refuses_one_replicate_and_levels_in_percent(n, level):
    with pytest.raises(BadInput):
        stats.expected_half_width(1.0, n, level)


# statsmodels takes 50 ms a call, so a few examples must do.
@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels_holm(p_values):
    expected = multipletests(p_values, method="holm")[1]
    assert stats.holm(p_values, len(p_values)) == pytest.approx(tuple(expected))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 5))
def test_holm_counts_members_without_a_p_as_one(p_values, undeclared):
    filled = [1.0 if p is None else p for p in p_values] + [1.0] * undeclared
    expected = multipletests(filled, method="holm")[1]
    for got, p, wanted in zip(stats.holm(p_values, len(filled)), p_values, expected, strict=False):
        assert (got is None) if p is None else got == pytest.approx(wanted)


def test_holm_refuses_a_family_smaller_than_its_members():
    with pytest.raises(BadInput, match="3 p-values cannot belong to a declared family of 2"):
        stats.holm([0.1, 0.2, None], 2)


def test_holm_over_sign_flip_p_keeps_the_familys_error_rate():
    families = np.random.default_rng(6).normal(size=(1500, 6, 10))
    smallest = [min(stats.holm([stats.sign_flip_p(x) for x in family], 6)) for family in families]
    assert np.mean(np.asarray(smallest) <= 0.05) <= 0.06


def test_welch_p_is_that_of_the_formula():
    one, two = [1.0, 2.0, 4.0, 3.5], [5.0, 9.0, 4.0]
    a, b = np.var(one, ddof=1) / 4, np.var(two, ddof=1) / 3
    t, freedom = (np.mean(one) - np.mean(two)) / np.sqrt(a + b), (a + b) ** 2 / (a**2 / 3 + b**2 / 2)
    assert stats.welch_p(one, two) == pytest.approx(2 * scipy_stats.t.cdf(-abs(t), freedom))


def test_bca_interval_repeats_with_its_seed_and_brackets_the_mean():
    values = [0.3, 1.2, 0.8, -0.4, 2.5, 0.9, 1.1, 0.2, 0.7, 1.6]
    low, high = stats.bca_interval(values, seed=3)
    assert stats.bca_interval(values, seed=3) == (low, high)
    assert stats.bca_interval(values, seed=4) != (low, high)
    assert low < np.mean(values) < high
    # The mean's bootstrap distribution is near normal with the n-denominator standard error.
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / math.sqrt(10), rel=0.1)


def test_bca_interval_covers_about_nine_in_ten_at_ten_replicates():
    draws = np.random.default_rng(5).normal(size=(400, 10))
    covered = [low <= 0 <= high for low, high in (stats.bca_interval(x, seed=0) for x in draws)]
    assert 0.85 <= np.mean(covered) <= 0.94


def test_bca_interval_is_none_where_the_bootstrap_degenerates():
    interval = stats.bca_interval([0.0, 1e-9], seed=0)
    assert interval is None or all(math.isfinite(end) for end in interval)


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=1, max_size=8), st.lists(numbers, min_size=1, max_size=8))
def test_cliffs_delta_is_what_mann_whitney_counts(better, other):
    u = scipy_stats.mannwhitneyu(better, other).statistic
    delta = stats.cliffs_delta(better, other)
    assert delta == pytest.approx(2 * u / (len(better) * len(other)) - 1)
    assert stats.cliffs_delta(other, better) == pytest.approx(-delta)


def test_cliffs_delta_of_differences_against_zero_counts_signs():
    assert stats.cliffs_delta([1.0, 2.0, -1.0, 0.0], (0.0,)) == 0.25
    with pytest.raises(BadInput):
        stats.cliffs_delta([], (0.0,))


def test_the_examples_in_the_docstrings_give_what_they_say():
    found = doctest.testmod(stats)
    assert found.attempted >= 8 and found.failed == 0


def test_the_exported_names_are_all_that_is_public():
    public = [n for n, x in vars(stats).items() if not n.startswith("_") and inspect.isfunction(x)]
    assert sorted(public) == sorted(n for n in stats.__all__ if inspect.isfunction(getattr(stats, n)))
    assert all(getattr(stats, name).__doc__ for name in public)
