"""Rank statistics and steps to a target, against enumeration, scipy and published tables."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from bnbench.registry import BadInput
from bnbench.study import stats

numbers = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 6))


def test_page_trend_counts_rank_products():
    rows = [[1, 2, 3, 4], [1, 3, 2, 4], [2, 1, 3, 4]]
    level_of_column = range(1, 5)
    expected = sum(j * rank for row in rows for j, rank in zip(level_of_column, row, strict=True))
    statistic, p = stats.page_trend(rows)
    products = [
        sum(j * r for j, r in zip(level_of_column, row, strict=True))
        for row in itertools.permutations(range(1, 5))
    ]
    sums = [a + b + c for a in products for b in products for c in products]
    assert statistic == expected
    assert p == pytest.approx(np.mean(np.asarray(sums) >= expected))


def test_average_ranks_share_ties_and_put_the_highest_first():
    assert stats.average_ranks([[0.9, 0.8, 0.7], [0.5, 0.5, 0.1]]) == (1.25, 1.75, 3.0)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 6).flatmap(
        lambda k: st.lists(st.lists(numbers, min_size=k, max_size=k), min_size=1, max_size=6)
    )
)
def test_average_ranks_add_up(rows):
    k = len(rows[0])
    assert sum(stats.average_ranks(rows)) == pytest.approx(k * (k + 1) / 2)


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_critical_difference_uses_the_published_table(k, q):
    # Demšar 2006, table 5a: the two-tailed Nemenyi test at .05.
    assert stats.critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * 14)), abs=1e-3)


def test_friedman_p_is_that_of_the_rank_formula():
    rows = [[3.0, 2.0, 1.0], [9.0, 4.0, 2.0], [5.0, 1.0, 2.0], [8.0, 7.0, 3.0]]
    n, k = 4, 3
    ranks = np.asarray(stats.average_ranks(rows))
    chi2 = 12 * n / (k * (k + 1)) * (np.sum(ranks**2) - k * (k + 1) ** 2 / 4)
    assert stats.friedman_p(rows) == pytest.approx(scipy_stats.chi2.sf(chi2, k - 1))
    assert stats.friedman_p([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]) is None


@pytest.mark.parametrize("rows", [[], [[1.0, 2.0, 3.0], [1.0, 2.0]], [[1.0, 2.0]]])
def test_rank_tests_refuse_ragged_or_narrow_tables(rows):
    for function in (stats.page_trend, stats.friedman_p):
        with pytest.raises(BadInput, match="each with 3 columns or more"):
            function(rows)


def test_critical_difference_refuses_one_column():
    with pytest.raises(BadInput, match="2 columns"):
        stats.critical_difference(1, 10)


def mean_ranks_over_all_orders(sizes):
    """Each size's mean rank over every order that is possible, by listing all permutations of the sizes."""
    n = len(sizes)
    ranks = []
    for order in itertools.permutations(range(1, n + 1)):
        rank = dict(enumerate(order))
        possible = all(
            rank[i] < rank[j]
            for i, (size, bound) in enumerate(sizes)
            for j, (other, _) in enumerate(sizes)
            if not bound and i != j and (size < other or (size == other and sizes[j][1]))
        )
        if possible:
            ranks.append(order)
    return np.mean(ranks, axis=0)


sizes_with_bounds = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from(["both", "bound"]), st.sampled_from([1, -1])),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(sizes_with_bounds)
def test_censored_rank_p_flips_the_signs_of_mean_ranks(pairs):
    ranks = mean_ranks_over_all_orders([(size, allowed == "bound") for size, allowed, _ in pairs])
    signs = [sign for *_, sign in pairs]
    values = [float(sign * size) for size, _, sign in pairs]
    allows = [a if a == "both" else "support" if sign > 0 else "refute" for _, a, sign in pairs]
    observed = abs(np.dot(signs, ranks))
    flipped = [abs(np.dot(s, ranks)) for s in itertools.product((-1, 1), repeat=len(pairs))]
    expected = np.mean([total >= observed - 1e-9 for total in flipped])
    assert stats.censored_rank_p(values, allows) == pytest.approx(expected)


@pytest.mark.parametrize("n", [6, 11, 20])
def test_censored_rank_p_of_observed_values_is_wilcoxons_exact_p(n):
    values = np.random.default_rng(n).normal(0.4, 1.0, n)
    expected = scipy_stats.wilcoxon(values, method="exact").pvalue
    assert stats.censored_rank_p(values, ["both"] * n) == pytest.approx(expected, rel=1e-12)


def test_pairs_of_which_nobody_knows_who_was_first_leave_the_rank_test_alone():
    values, allows = [0.5, 0.9, -0.2, 0.7], ["support", "both", "both", "support"]
    p = stats.censored_rank_p(values, allows)
    unknown = [(0.0, "neither"), (5.0, "neither"), (-3.0, "support"), (3.0, "refute"), (0.0, "both")]
    for value, allowed in unknown:
        assert stats.censored_rank_p([*values, value], [*allows, allowed]) == p
    assert stats.censored_rank_p([0.0] * 10, ["neither"] * 10) == 1.0


def test_the_rank_test_of_pairs_without_an_effect_keeps_its_level():
    """Both arms reach the target after log-normal steps, in a budget that ends 40 % of the trainings."""
    generator = np.random.default_rng(8)
    budget = np.exp(scipy_stats.norm.ppf(0.6))
    rejected = []
    for slow, fast in np.exp(generator.normal(size=(2000, 2, 10))):
        values = np.log(np.minimum(slow, budget) / np.minimum(fast, budget))
        over = np.stack([slow > budget, fast > budget])
        allows = ["neither" if a and b else "support" if a else "refute" if b else "both" for a, b in over.T]
        rejected.append(stats.censored_rank_p(values, allows) <= 0.05)
    assert 0.015 <= np.mean(rejected) <= 0.06


def test_censored_rank_p_refuses_notes_that_do_not_fit_and_too_many_values():
    with pytest.raises(BadInput, match="2 values do not go with 1 notes"):
        stats.censored_rank_p([1.0, 2.0], ["both"])
    with pytest.raises(BadInput, match="takes 1 to 40 values, not 0"):
        stats.censored_rank_p([], [])
    with pytest.raises(BadInput, match="takes 1 to 40 values, not 41"):
        stats.censored_rank_p([1.0] * 41, ["both"] * 41)


reached = st.lists(st.none() | st.floats(1, 200), min_size=1, max_size=10)


@given(reached)
def test_restricted_mean_is_the_area_under_the_share_that_has_not_yet_reached(steps):
    budget = 100.0
    found = sorted({min(s, budget) for s in steps if s is not None} | {0.0, budget})
    area = sum(
        (right - left) * np.mean([s is None or s > left for s in steps])
        for left, right in itertools.pairwise(found)
    )
    assert stats.restricted_mean(steps, budget) == pytest.approx(area)
    assert stats.success_rate(steps) == pytest.approx(1 - steps.count(None) / len(steps))


def test_no_rows_have_no_success_rate_and_no_restricted_mean():
    with pytest.raises(BadInput, match="one row or more"):
        stats.success_rate([])
    with pytest.raises(BadInput, match="one row or more"):
        stats.restricted_mean([], 100)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 6).flatmap(
        lambda k: st.lists(st.lists(st.integers(0, 4), min_size=k, max_size=k), min_size=1, max_size=6)
    )
)
def test_mean_rank_correlation_is_scipys_rho_and_zero_for_a_tied_row(rows):
    places = range(len(rows[0]))
    each = [scipy_stats.spearmanr(places, row).statistic if len(set(row)) > 1 else 0.0 for row in rows]
    assert stats.mean_rank_correlation(rows) == pytest.approx(np.mean(each), abs=1e-12)


def test_mean_rank_correlation_is_pages_statistic_on_another_scale():
    rows = np.random.default_rng(4).normal(size=(7, 5))
    n, k = rows.shape
    statistic, _ = stats.page_trend(rows.tolist())
    expected = 12 * statistic / (n * k * (k**2 - 1)) - 3 * (k + 1) / (k - 1)
    assert stats.mean_rank_correlation(rows.tolist()) == pytest.approx(expected)


def test_page_trend_refuses_one_replicate():
    with pytest.raises(BadInput, match="two rows or more"):
        stats.page_trend([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("ranks", "difference", "groups"),
    [
        ((1.0, 2.0, 3.0), 0.5, ()),
        ((1.0, 2.0, 3.0), 1.0, ((0, 1), (1, 2))),
        ((1.0, 2.0, 3.0), 2.0, ((0, 1, 2),)),
        ((3.0, 1.0, 2.0), 1.0, ((1, 2), (2, 0))),
        ((1.0, 1.2, 1.4, 3.0, 3.1), 0.5, ((0, 1, 2), (3, 4))),
        ((1.0, 1.5, 2.4, 2.5), 1.0, ((0, 1), (1, 2, 3))),
        ((2.5, 2.5), 0.0, ((0, 1),)),
        ((1.0,), 9.0, ()),
        ((), 1.0, ()),
    ],
)
def test_rank_groups_are_the_bars_of_the_diagram(ranks, difference, groups):
    assert stats.rank_groups(ranks, difference) == groups


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 12).map(lambda x: x / 2), min_size=1, max_size=6), st.sampled_from([0.5, 1, 2])
)
def test_rank_groups_are_all_maximal_sets_within_the_difference(ranks, difference):
    columns = range(len(ranks))
    near = [
        set(some)
        for size in range(2, len(ranks) + 1)
        for some in itertools.combinations(columns, size)
        if max(ranks[c] for c in some) - min(ranks[c] for c in some) <= difference
    ]
    maximal = [group for group in near if not any(group < other for other in near)]
    groups = stats.rank_groups(ranks, difference)
    assert len(groups) == len(maximal)
    assert all(set(group) in maximal for group in groups)
    for group in groups:
        assert [ranks[c] for c in group] == sorted(ranks[c] for c in group)
