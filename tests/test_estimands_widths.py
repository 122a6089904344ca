"""Usable widths of learning rate and of initial scale, against numbers worked out by hand."""

import math

import pytest

from bnbench.registry import BadInput
from bnbench.study.estimands import init_scale_width_difference, lr_width_difference, usable_lr_width
from tests.estimand_rows import entry, replicate, sweep


def test_usable_width_interpolates_both_sides_of_the_peak():
    # Over log10 lr from −2: .80, .90, .80. Above .88 for 1 − .8 = .2 decades on each side of the peak.
    rows = sweep("batch", [(0.01, 0.80), (0.1, 0.90), (1.0, 0.80)])
    assert usable_lr_width(rows, margin=0.02) == pytest.approx(0.4)
    assert usable_lr_width(rows, margin=0.05) == pytest.approx(1.0)
    assert usable_lr_width(rows, margin=0.10) == pytest.approx(2.0)
    assert usable_lr_width(rows[::-1], margin=0.02) == pytest.approx(0.4)


def test_usable_width_adds_separate_stretches():
    rows = sweep("batch", [(0.01, 0.9), (0.1, 0.8), (1.0, 0.9)])
    assert usable_lr_width(rows, margin=0.02) == pytest.approx(0.4)


def test_usable_width_of_a_plateau_is_the_plateau_and_its_flanks():
    rows = sweep("batch", [(0.001, 0.1), (0.01, 0.9), (0.1, 0.9), (1.0, 0.89), (10.0, 0.1)])
    left, right = 0.02 / 0.8, (0.89 - 0.88) / (0.89 - 0.1)
    assert usable_lr_width(rows) == pytest.approx(left + 2 + right)
    assert usable_lr_width(rows, margin=0) == pytest.approx(1)


def test_an_arm_that_never_trains_has_no_usable_width():
    assert usable_lr_width(sweep("none", [(0.01, 0.1), (0.1, 0.11), (1.0, 0.1)])) == 0
    # 1.5 x chance is the border: here all but a flank of the lower half lies below it.
    assert usable_lr_width(sweep("none", [(0.1, 0.14), (1.0, 0.16)])) == pytest.approx(0.5)


def test_usable_width_reads_the_metric_that_it_is_told():
    rows = [entry("batch", "tune", lr=lr, val_acc=0.5, val_acc_precise=a) for lr, a in ((0.1, 0.9), (1, 0.8))]
    assert usable_lr_width(rows, metric="val/acc_precise") == pytest.approx(0.2)


@pytest.mark.parametrize("role", ["tune", "sweep"])
def test_width_difference_is_in_decades_and_signed(role):
    wide = sweep("batch", [(0.01, 0.5), (0.1, 0.9), (1.0, 0.9), (10.0, 0.5)], role)
    narrow = sweep("none", [(0.01, 0.5), (0.1, 0.9), (1.0, 0.5), (10.0, 0.1)], role)
    rows = replicate(*wide, *narrow)
    estimate = lr_width_difference(rows, better="batch", other="none")
    assert (estimate.value, estimate.allows) == (pytest.approx(1.0), "both")
    assert lr_width_difference(rows, better="none", other="batch").value == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("better", "other", "allows"),
    [
        ((0.5, 0.9, 0.9), (0.5, 0.9, 0.5), "support"),
        ((0.9, 0.9, 0.5), (0.5, 0.9, 0.5), "support"),
        ((0.5, 0.9, 0.5), (0.5, 0.9, 0.89), "refute"),
        ((0.9, 0.9, 0.9), (0.9, 0.9, 0.5), "neither"),
        ((0.9, 0.9, 0.9), (0.1, 0.1, 0.1), "support"),
    ],
)
def test_a_width_that_reaches_an_end_of_the_grid_is_censored(better, other, allows):
    lrs = (0.01, 0.1, 1.0)
    arms = [sweep(name, zip(lrs, acc, strict=True)) for name, acc in (("batch", better), ("none", other))]
    rows = replicate(*arms[0], *arms[1])
    assert lr_width_difference(rows, better="batch", other="none").allows == allows


SCALES = (0.1, 1.0, 10.0)


def scaled(kind, accuracies):
    """The arms of one kind at rising initial scales, each with its best accuracy at lr .1 of two rates."""
    arms = tuple((f"{kind} x{scale:g}", scale) for scale in SCALES[: len(accuracies)])
    grids = [
        sweep(arm, [(0.01, acc - 0.05), (0.1, acc)], "tune")
        for (arm, _), acc in zip(arms, accuracies, strict=True)
    ]
    return arms, [row for grid in grids for row in grid]


def scale_widths(better, other, **options):
    good, rows = scaled("batch", better)
    bad, more = scaled("none", other)
    return init_scale_width_difference(replicate(*rows, *more), better=good, other=bad, **options)


def test_scale_width_is_in_decades_of_scale_around_the_groups_best():
    # Above .88: 2 x .02/.08 decades against 2 x .02/.8.
    estimate = scale_widths((0.82, 0.90, 0.82), (0.1, 0.9, 0.1))
    assert (estimate.value, estimate.allows) == (pytest.approx(0.5 - 0.05), "both")
    wider = scale_widths((0.82, 0.90, 0.82), (0.1, 0.9, 0.1), margin=0.04)
    assert wider.value == pytest.approx(1.0 - 0.1)
    assert scale_widths((0.1, 0.9, 0.1), (0.82, 0.90, 0.82)).value == pytest.approx(-0.45)


def test_scale_width_reads_the_best_rate_or_that_of_scale_1():
    good, rows = scaled("batch", (0.5, 0.9, 0.5))
    bad, more = scaled("none", (0.5, 0.9, 0.5))
    # At the lower rate, which is not the best at scale 1, one more scale trains as well as the best one.
    rows[0].result.metrics["val/acc"] = 0.89
    table = replicate(*rows, *more)
    tuned = init_scale_width_difference(table, better=good, other=bad)
    fixed = init_scale_width_difference(table, better=good, other=bad, tuned=False)
    slope = 0.02 / 0.4
    # Tuned: (.89, .9, .5) against (.5, .9, .5). At the rate of scale 1: (.5, .9, .5) for both.
    assert (tuned.value, tuned.allows) == (pytest.approx(1 + slope - 2 * slope), "support")
    assert (fixed.value, fixed.allows) == (pytest.approx(0.0), "both")
    # On a tie the lower rate is read, where both scales train.
    rows[2].result.metrics["val/acc"] = 0.9
    fixed = init_scale_width_difference(table, better=good, other=bad, tuned=False)
    assert fixed.value == pytest.approx(1 + 0.02 / 0.45 - 2 * slope)


@pytest.mark.parametrize(
    ("better", "other", "allows"),
    [
        ((0.9, 0.9, 0.5), (0.5, 0.9, 0.5), "support"),
        ((0.5, 0.9, 0.5), (0.5, 0.9, 0.89), "refute"),
        ((0.9, 0.9, 0.9), (0.9, 0.9, 0.5), "neither"),
        ((0.9, 0.9, 0.9), (0.1, 0.1, 0.1), "support"),
    ],
)
def test_a_scale_width_that_reaches_an_end_is_censored(better, other, allows):
    assert scale_widths(better, other).allows == allows


def test_scales_at_which_nothing_trains_have_no_width():
    estimate = scale_widths((0.9, 0.9, 0.9), (0.1, 0.14, 0.1))
    assert estimate.value == pytest.approx(math.log10(SCALES[-1] / SCALES[0]))


def test_scales_may_come_in_any_order():
    good, rows = scaled("batch", (0.82, 0.90, 0.82))
    bad, more = scaled("none", (0.1, 0.9, 0.1))
    estimate = init_scale_width_difference(
        replicate(*rows, *more), better=good[::-1], other=bad[1:] + bad[:1]
    )
    assert estimate.value == pytest.approx(0.45)


def test_a_missing_scale_or_rate_is_named_and_one_scale_is_refused():
    good, rows = scaled("batch", (0.5, 0.9, 0.5))
    bad, more = scaled("none", (0.5, 0.9, 0.5))
    with pytest.raises(LookupError, match=r"'batch x0\.1' has no row at lr 0\.1"):
        init_scale_width_difference(
            replicate(*(row for row in rows if row is not rows[1]), *more),
            better=good,
            other=bad,
            tuned=False,
        )
    with pytest.raises(BadInput, match="that of scale 1, and it is not in"):
        init_scale_width_difference(replicate(*rows, *more), better=good[::2], other=bad[::2], tuned=False)
    with pytest.raises(LookupError, match="no grid of 'none x1'"):
        init_scale_width_difference(replicate(*rows), better=good, other=(("none x1", 1.0), ("none x2", 2.0)))
    with pytest.raises(BadInput, match="needs two scales or more"):
        init_scale_width_difference(replicate(*rows), better=good, other=good[:1])


def test_scale_width_reads_the_metric_that_it_is_told():
    arms = {"a": (0.9, 0.2), "b": (0.9, 0.9), "c": (0.9, 0.2)}
    rows = [entry(a, "tune", val_acc=x, val_acc_precise=y) for a, (x, y) in arms.items()]
    group = (("a", 0.1), ("b", 1.0), ("c", 10.0))
    flat = (("c", 0.1), ("a", 1.0))
    estimate = init_scale_width_difference(
        replicate(*rows), better=group, other=flat, metric="val/acc_precise"
    )
    # 2 x .02/.7 decades against the whole single decade of a flat .2.
    assert (estimate.value, estimate.allows) == (pytest.approx(2 * 0.02 / 0.7 - 1), "refute")
