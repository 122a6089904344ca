"""What the judge does over many random tables: error rates, coverage, power, and invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from bnbench.study import Table
from bnbench.study.claims import judge
from bnbench.study.error_rates import PROMISES, World, draw, measure_rates, outcomes, pool_twice
from tests.verdict_tables import DELTA, hypothesis, judge_one, rows, study

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


def decide_by_arrays(world, tables, seed=0):
    """Bounds and decisions of whole arrays of tables at once, written without the judge."""
    accuracies = draw(world, tables, seed)
    differences = accuracies[..., 1] - accuracies[..., 0]
    mean, sd = differences.mean(-1), differences.std(-1, ddof=1)
    n = world.replicates
    half = scipy_stats.t.ppf(1 - 0.025 / world.cells, n - 1) * sd / np.sqrt(n)
    low, high = mean - half, mean + half
    if world.kind == "greater":
        supported, refuted = (low > 0) & (high >= 1), high < 1
    else:
        supported, refuted = (low > -1) & (high < 1), (low > 1) | (high < -1)
    spread = sd > 1e-9
    return (
        np.where(spread, low, -np.inf),
        np.where(spread, high, np.inf),
        supported & spread,
        refuted & spread,
    )


def family_misses(world, tables):
    """How often any interval of a table misses its truth."""
    low, high, _, _ = decide_by_arrays(world, tables)
    truth = np.asarray(world.truth)
    return ((low > truth) | (high < truth)).any(1).mean()


@pytest.mark.parametrize(
    "world",
    [
        World(cells=4),
        World((1.0, 2.0), replicates=5, shape="tied", cells=3),
        World((2.0, 0.0), sd=0.5),
        World((0.0, 1.0, 3.0), sd=0.4, kind="equivalent", shape="exponential", cells=3),
    ],
    ids=str,
)
def test_the_judge_decides_as_a_computation_over_whole_arrays_does(world):
    found = list(outcomes(world, 40, seed=0))
    low, high, supported, refuted = decide_by_arrays(world, 40)
    for table, outcome in enumerate(found):
        for cell, verdict in enumerate(outcome.verdicts):
            decision = "SUPPORTED" if supported[table, cell] else "REFUTED" if refuted[table, cell] else ""
            assert verdict.decision == (decision or "INCONCLUSIVE")
            if verdict.low is None:
                assert np.isinf(low[table, cell])
            else:
                assert (verdict.low, verdict.high) == pytest.approx((low[table, cell], high[table, cell]))
    assert len({v.decision for outcome in found for v in outcome.verdicts}) > 1


MANY = 40_000
SHAPES = ("normal", "gamma", "exponential", "tied")


@pytest.mark.parametrize("cells", [1, 4, 6, 12])
@pytest.mark.parametrize("n", [5, 10, 20])
def test_a_family_of_independent_cells_errs_as_often_as_bonferroni_says(cells, n):
    world = World(cells=cells, replicates=n)
    assert family_misses(world, MANY) == pytest.approx(1 - (1 - 0.05 / cells) ** cells, abs=0.0035)


@pytest.mark.parametrize(
    "world",
    [
        *(World(shape=shape, replicates=n) for shape in SHAPES[1:] for n in (5, 10, 20)),
        World(correlation=0.5),
        World(correlation=0.9),
    ],
    ids=str,
)
def test_the_same_arm_twice_differs_no_more_often_than_that_whatever_its_noise(world):
    assert 0.01 <= family_misses(world, MANY) <= 0.053


SKEWED = [promise for promise in PROMISES if promise.world.skewed]


@pytest.mark.parametrize("promise", SKEWED, ids=lambda promise: str(promise.world))
def test_what_an_interval_is_known_to_miss_is_about_what_it_misses(promise):
    assert promise.bound - 0.013 <= family_misses(promise.world, MANY) <= promise.bound + 0.003


@pytest.mark.parametrize("effect", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("n", [5, 10, 20])
def test_power_is_that_of_the_noncentral_t(effect, n):
    world = World((effect,), replicates=n)
    low, _, _, _ = decide_by_arrays(world, MANY // 4)
    border = scipy_stats.t.ppf(1 - 0.025 / world.cells, n - 1)
    power = scipy_stats.nct.sf(border, n - 1, effect / world.sd * np.sqrt(n))
    assert (low > 0).mean() == pytest.approx(power, abs=0.01)


def test_an_effect_of_twice_delta_is_found_nearly_always_at_the_noise_of_the_studies():
    _, _, supported, _ = decide_by_arrays(World((2.0,)), MANY)
    assert supported.mean() >= 0.99


@pytest.mark.parametrize("tables", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_judge_keeps_all_its_promises(tables):
    rates = measure_rates(PROMISES, tables)
    rates = (*rates, pool_twice(rates))
    assert [rate for rate in rates if not rate.is_kept] == []
    assert {promise.world.cells for promise in PROMISES} >= {1, 4, 6, 12}
    assert {promise.world.replicates for promise in PROMISES} == {5, 10, 20}
