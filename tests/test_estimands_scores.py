"""Estimands of final metrics, against numbers worked out by hand or by numpy."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.registry import BadInput
from bnbench.study.estimands import (
    accuracy_difference,
    best_difference,
    interaction,
    interior_gain,
    metric_change,
    metric_slope,
    spread_shrinkage,
)
from tests.estimand_rows import entry, replicate


def scores(**arms):
    """Own rows by arm with (validation accuracy, test accuracy)."""
    rows = [entry(arm, val_acc=v, val_loss=1 - v, test_acc=t) for arm, (v, t) in arms.items()]
    return replicate(*rows)


def test_accuracy_difference_reads_any_metric_in_any_unit():
    rows = replicate(entry("batch", val_acc=0.75, test_loss=0.5), entry("none", val_acc=0.70, test_loss=0.8))
    acc = accuracy_difference(rows, better="batch", other="none", metric="val/acc")
    assert (acc.value, acc.allows) == (pytest.approx(5), "both")
    # A loss is better where it is lower, so the arm of lower loss comes out positive.
    nats = accuracy_difference(rows, better="batch", other="none", metric="test/loss", points=-1)
    assert nats.value == pytest.approx(0.3)


def test_the_best_of_a_group_is_chosen_by_validation_and_read_on_test():
    rows = scores(a=(0.80, 0.90), b=(0.85, 0.70), c=(0.60, 0.65), d=(0.61, 0.50))
    assert best_difference(rows, better=("a", "b"), other=("c", "d")).value == pytest.approx(20)
    assert best_difference(rows, better=("a",), other=("c",)).value == pytest.approx(25)
    nats = best_difference(rows, better=("a", "b"), other=("c", "d"), metric="val/loss", points=-1)
    assert nats.value == pytest.approx(0.39 - 0.15)


def test_ties_of_validation_accuracy_go_to_the_lower_loss_and_then_to_the_first():
    rows = replicate(
        entry("a", val_acc=0.8, val_loss=0.5, test_acc=0.1),
        entry("b", val_acc=0.8, val_loss=0.4, test_acc=0.2),
        entry("c", val_acc=0.8, val_loss=0.4, test_acc=0.3),
        entry("zero", val_acc=0.8, val_loss=0.4, test_acc=0.0),
    )
    best = functools.partial(best_difference, rows, other=("zero",))
    assert best(better=("a", "b", "c")).value == pytest.approx(20)
    assert best(better=("c", "b", "a")).value == pytest.approx(30)


@pytest.mark.parametrize("group", ["batch", ()])
def test_a_group_that_is_no_tuple_of_names_is_refused(group):
    with pytest.raises(BadInput, match="a group of arms is a tuple of names"):
        best_difference(scores(batch=(0.8, 0.9)), better=group, other=("batch",))


def test_a_missing_arm_of_a_group_is_named():
    with pytest.raises(LookupError, match="'b' as own"):
        best_difference(scores(a=(0.8, 0.9)), better=("a", "b"), other=("a",))


def test_an_interaction_is_a_difference_of_differences_of_the_best_arms():
    rows = scores(
        none=(0.70, 0.60), none_p1=(0.75, 0.66), none_p2=(0.74, 0.99), bn=(0.80, 0.81), bn_p1=(0.81, 0.82)
    )
    value = interaction(
        rows, treated=("none_p1", "none_p2"), plain=("none",), other_treated=("bn_p1",), other_plain=("bn",)
    ).value
    assert value == pytest.approx((66 - 60) - (82 - 81))


def test_interior_gain_is_the_best_inner_arm_over_the_better_end():
    rows = scores(b4=(0.5, 0.51), b16=(0.8, 0.83), b64=(0.7, 0.99), b256=(0.6, 0.64))
    assert interior_gain(rows, arms=("b4", "b16", "b64", "b256")).value == pytest.approx(83 - 64)
    assert interior_gain(rows, arms=("b16", "b4", "b64")).value == pytest.approx(51 - 83)
    with pytest.raises(BadInput, match="three ordered arms or more"):
        interior_gain(rows, arms=("b4", "b16"))


def test_a_metrics_change_is_within_one_row():
    rows = replicate(entry("batch", test_acc=0.79, test_acc_precise=0.85), entry("none", test_acc=0.5))
    change = metric_change(rows, arm="batch", metric="test/acc_precise", minus="test/acc")
    assert (change.value, change.allows) == (pytest.approx(6), "both")
    with pytest.raises(KeyError, match="test/acc_precise"):
        metric_change(rows, arm="none", metric="test/acc_precise", minus="test/acc")


doses = st.lists(st.tuples(st.integers(-6, 6), st.floats(-10, 10)), min_size=2, max_size=7)


@given(doses.filter(lambda pairs: len({x for x, _ in pairs}) > 1), st.sampled_from([1.0, -1.0]))
def test_a_slope_is_numpys_least_squares(pairs, sign):
    rows = replicate(*(entry(f"arm {i}", train_loss=y) for i, (_, y) in enumerate(pairs)))
    arms = tuple((f"arm {i}", float(x)) for i, (x, _) in enumerate(pairs))
    xs, ys = zip(*pairs, strict=True)
    expected = np.linalg.lstsq(np.stack([xs, np.ones(len(xs))], 1), np.array(ys), rcond=None)[0][0]
    estimate = metric_slope(rows, doses=arms, metric="train/loss", sign=sign)
    assert estimate.value == pytest.approx(sign * expected, abs=1e-9)
    assert estimate.allows == "both"


def test_a_slope_over_noise_doses_is_positive_where_more_noise_keeps_the_loss_higher():
    losses = {"NBS 64": 0.1, "NBS 16": 0.3, "NBS 4": 0.5}
    rows = replicate(*(entry(arm, train_loss=loss) for arm, loss in losses.items()))
    minus_log2 = tuple((arm, -math.log2(int(arm.split()[1]))) for arm in losses)
    assert metric_slope(rows, doses=minus_log2, metric="train/loss").value == pytest.approx(0.1)


@pytest.mark.parametrize("pairs", [(("a", 1.0),), (("a", 1.0), ("b", 1.0)), ()])
def test_a_slope_over_one_dose_is_refused(pairs):
    rows = replicate(entry("a", test_acc=0.5), entry("b", test_acc=0.6))
    with pytest.raises(BadInput, match="two doses or more"):
        metric_slope(rows, doses=pairs, metric="test/acc")


STARTS = (("g.1", 0.1), ("g1", 1.0), ("g10", 10.0))


@pytest.mark.parametrize(
    ("ends", "decades"),
    [
        ((0.1, 1.0, 10.0), 0.0),
        ((0.5, 0.5, 0.5), 2.0),
        ((1.0, 2.0, 10.0), 1.0),
        ((10.0, 1.0, 0.1), 0.0),
        ((0.01, 1.0, 100.0), -2.0),
    ],
)
def test_spread_shrinks_by_decades_of_range(ends, decades):
    rows = replicate(*(entry(arm, norm_gamma=y) for (arm, _), y in zip(STARTS, ends, strict=True)))
    assert spread_shrinkage(rows, starts=STARTS).value == pytest.approx(decades)


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_a_range_in_decades_needs_positive_numbers(value):
    rows = replicate(*(entry(arm, norm_gamma=value) for arm, _ in STARTS))
    with pytest.raises(ValueError, match="above 0, but norm/gamma has"):
        spread_shrinkage(rows, starts=STARTS)
    with pytest.raises(ValueError, match="above 0, but starts has"):
        spread_shrinkage(rows, starts=(("g.1", value), ("g1", 1.0)))


READS = {
    "accuracy": functools.partial(accuracy_difference, better="a", other="b"),
    "best": functools.partial(best_difference, better=("a",), other=("b",)),
    "interaction": functools.partial(
        interaction, treated=("a",), plain=("b",), other_treated=("c",), other_plain=("d",)
    ),
    "interior": functools.partial(interior_gain, arms=("b", "a", "b")),
    "change": functools.partial(metric_change, arm="a", metric="test/acc", minus="val/acc"),
    "slope": functools.partial(metric_slope, doses=(("a", 0.0), ("b", 1.0)), metric="test/acc"),
    "shrinkage": functools.partial(spread_shrinkage, starts=(("a", 1.0), ("b", 2.0)), metric="test/acc"),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize(
    ("reached", "allows"),
    [({"a": 0.0}, "neither"), ({"a": 1.0}, "both"), ({"unread": 0.0}, "both"), ({}, "both")],
)
def test_a_row_that_missed_its_training_loss_lets_a_comparison_show_nothing(name, reached, allows):
    metrics = {"val_acc": 0.7, "val_loss": 0.3, "test_acc": 0.6}
    rows = [
        entry(arm, **metrics, **({"train_reached": reached[arm]} if arm in reached else {}))
        for arm in ("a", "b", "c", "d", "unread")
    ]
    assert READS[name](replicate(*rows)).allows == allows


def test_only_the_row_that_is_chosen_from_a_group_must_have_reached_its_loss():
    rows = [
        entry(arm, val_acc=v, val_loss=0.1, test_acc=v) for arm, v in (("a", 0.9), ("b", 0.5), ("c", 0.4))
    ]
    rows[1].result.metrics["train/reached"] = 0.0
    assert best_difference(replicate(*rows), better=("a", "b"), other=("c",)).allows == "both"
    rows[0].result.metrics["train/reached"] = 0.0
    assert best_difference(replicate(*rows), better=("a", "b"), other=("c",)).allows == "neither"
