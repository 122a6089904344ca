"""What the judge does over many random tables: error rates, coverage, power, and invariances."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbench.study import Table
from bnbench.study.claims import judge
from tests.verdict_tables import DELTA, effect, hypothesis, judge_one, row, rows, study

small = st.floats(-3, 3).map(lambda x: round(x, 3))
draws = st.lists(small, min_size=5, max_size=12).filter(lambda v: max(v) - min(v) > 0.01)


@settings(deadline=None, max_examples=25)
@given(draws, st.sampled_from(["greater", "equivalent"]), st.sampled_from([0.25, 8.0]))
def test_a_verdict_does_not_depend_on_the_unit(values, kind, scale):
    one = judge_one(values, the_hypothesis=hypothesis(kind=kind), size=6)
    scaled = hypothesis(kind=kind, delta=DELTA * scale)
    other = judge_one([scale * v for v in values], the_hypothesis=scaled, size=6)
    assert (one.decision, one.label, one.gate) == (other.decision, other.label, other.gate)
    assert (other.low, other.high) == pytest.approx((scale * one.low, scale * one.high), rel=1e-9, abs=1e-9)
    assert (one.p, one.p_sign_flip) == pytest.approx((other.p, other.p_sign_flip))


@settings(deadline=None, max_examples=25)
@given(draws)
def test_equivalence_does_not_depend_on_the_sign(values):
    one = judge_one(values, the_hypothesis=hypothesis(kind="equivalent"))
    other = judge_one([-v for v in values], the_hypothesis=hypothesis(kind="equivalent"))
    assert (one.decision, one.p_sign_flip) == (other.decision, other.p_sign_flip)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(draws, st.randoms(use_true_random=False))
def test_a_verdict_depends_neither_on_the_order_of_replicates_nor_of_rows(values, random):
    one = judge_one(values)
    shuffled = random.sample(values, len(values))
    other = judge_one(shuffled)
    assert (one.low, one.high, one.p_sign_flip) == pytest.approx(
        (other.low, other.high, other.p_sign_flip), abs=1e-12
    )
    entries = list(rows(values))
    random.shuffle(entries)
    (mixed_up,) = judge(study(replicates=len(values)), "quick", Table(tuple(entries)), {"C": 1})
    assert mixed_up == one


def judge_many(draws, *, size=1, kind="greater"):
    """One verdict a line of draws (hypotheses x replicates), by one call of the real judge."""
    count, n = draws.shape
    hypotheses = [
        hypothesis(f"h{i}", kind=kind, estimand=functools.partial(effect, metric=f"e{i}"))
        for i in range(count)
    ]
    entries = [
        e
        for r in range(n)
        for e in (row("batch", r, **{f"e{i}": x for i, x in enumerate(draws[:, r])}), row("none", r))
    ]
    return judge(study(*hypotheses, replicates=n), "quick", Table(tuple(entries)), {"C": size})


MANY = 400


def test_with_no_effect_the_interval_misses_zero_at_its_nominal_rate():
    verdicts = judge_many(np.random.default_rng(1).normal(0, 0.8, (2 * MANY, 10)))
    assert 0.03 <= np.mean([v.low > 0 or v.high < 0 for v in verdicts]) <= 0.06
    assert np.mean([v.p_sign_flip <= 0.05 for v in verdicts]) <= 0.06
    assert np.mean([v.decision == "SUPPORTED" for v in verdicts]) <= 0.035


@pytest.mark.parametrize("n", [5, 10, 20])
def test_the_interval_covers_normal_differences_at_its_level(n):
    draws = np.random.default_rng(n).normal(0.7, 2.0, (MANY, n))
    covered = np.mean([v.low <= 0.7 <= v.high for v in judge_many(draws)])
    assert 0.93 <= covered <= 0.97


def test_the_interval_covers_skewed_and_tied_differences_somewhat_less():
    generator = np.random.default_rng(2)
    skewed = generator.exponential(1.0, (MANY, 10))
    assert 0.87 <= np.mean([v.low <= 1 <= v.high for v in judge_many(skewed)]) <= 0.93
    tied = generator.integers(-1, 2, (MANY, 10)).astype(float)
    assert 0.93 <= np.mean([v.low is not None and v.low <= 0 <= v.high for v in judge_many(tied)]) <= 0.98


def test_an_effect_of_twice_delta_is_supported_and_none_is_refuted_at_the_studies_noise():
    # Paired sd of .8 pp with tuning inside the replicate, delta 1 pp, 6 primary cells.
    generator = np.random.default_rng(3)
    supported = [v.decision for v in judge_many(generator.normal(2 * DELTA, 0.8, (200, 10)), size=6)]
    assert supported.count("SUPPORTED") >= 0.95 * 200
    refuted = [v.decision for v in judge_many(generator.normal(0, 0.8, (200, 20)), size=6)]
    assert refuted.count("REFUTED") >= 0.95 * 200
    assert refuted.count("SUPPORTED") <= 2
