"""Estimands, against numbers worked out by hand."""

import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.registry import BadInput
from bnbench.study import Entry, Replicate, Result, Trial, estimands
from bnbench.study.estimands import (
    accuracy_difference,
    log_examples_ratio,
    log_examples_ratio_difference,
    log_steps_ratio,
    lr_width_difference,
    steps_to_target,
    stuck,
    stuck_share,
    usable_lr_width,
)


def entry(arm="batch", role="own", curve=(), status="done", steps=100, batch_size=64, lr=0.1, **metrics):
    metrics = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    series = {"step": tuple(s for s, _ in curve), "val/acc": tuple(a for _, a in curve)}
    trial = Trial(steps=steps, batch_size=batch_size, lr=lr)
    return Entry("cell", arm, 0, role, trial, Result(status, {"chance": 0.1, **metrics}, series))


def replicate(*entries, target=0.9):
    return Replicate("cell", 0, {"target": target}, entries)


def reaching(steps):
    """A curve whose crossing of .9 lies at exactly this step."""
    return ((steps / 2, 0.5), (steps, 0.9), (100, 0.95))


FLAT = ((1, 0.2), (100, 0.5))


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


def test_the_role_picks_own_or_common_rows():
    rows = replicate(
        entry("batch", curve=reaching(20), test_acc=0.9),
        entry("none", curve=reaching(40), test_acc=0.8),
        entry("batch", "common", curve=reaching(30), test_acc=0.85),
        entry("none", "common", curve=reaching(40), test_acc=0.84),
    )
    arms = {"better": "batch", "other": "none"}
    assert log_steps_ratio(rows, **arms).value == pytest.approx(math.log(2))
    assert log_steps_ratio(rows, **arms, role="common").value == pytest.approx(math.log(4 / 3))
    assert accuracy_difference(rows, **arms) == pytest.approx(10)
    assert accuracy_difference(rows, **arms, role="common") == pytest.approx(1)
    with pytest.raises(BadInput, match="did you mean 'common'"):
        accuracy_difference(rows, **arms, role="commmon")


def test_accuracy_difference_reads_any_metric_in_any_unit():
    rows = replicate(entry("batch", val_acc=0.75, test_loss=0.5), entry("none", val_acc=0.70, test_loss=0.8))
    assert accuracy_difference(rows, better="batch", other="none", metric="val/acc") == pytest.approx(5)
    nats = accuracy_difference(rows, better="none", other="batch", metric="test/loss", points=1)
    assert nats == pytest.approx(0.3)


def test_a_missing_row_raises_lookup_error_that_names_it():
    with pytest.raises(LookupError, match="'none' as own"):
        accuracy_difference(replicate(entry("batch", test_acc=0.9)), better="batch", other="none")
    with pytest.raises(LookupError, match="no grid of 'batch'"):
        lr_width_difference(replicate(), better="batch", other="none")
    with pytest.raises(LookupError, match="no rows"):
        usable_lr_width([])
    with pytest.raises(LookupError, match="no rows"):
        stuck_share([])


def sweep(arm, points, role="sweep", chance=0.1):
    rows = [entry(arm, role, lr=lr, val_acc=accuracy) for lr, accuracy in points]
    for row in rows:
        row.result.metrics["chance"] = chance
    return rows


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


@pytest.mark.parametrize(
    ("loss", "chance", "status", "expected"),
    [
        (math.log(10), 0.1, "done", True),
        (0.9 * math.log(10) + 1e-9, 0.1, "done", True),
        (0.9 * math.log(10) - 1e-9, 0.1, "done", False),
        (math.log(2), 0.5, "done", True),
        (math.log(2), 0.1, "done", False),
        (math.log(10), 0.1, "diverged", False),
    ],
)
def test_a_row_is_stuck_at_nine_tenths_of_the_loss_of_guessing(loss, chance, status, expected):
    row = entry(status=status, train_loss=loss)
    row.result.metrics["chance"] = chance
    assert stuck(row) is expected


def test_stuck_share_counts_rows():
    rows = [entry(train_loss=loss) for loss in (2.3, 2.3, 0.1, 0.2)]
    assert stuck_share(rows) == 0.5


def test_every_public_estimand_works_through_partial_and_says_its_unit():
    names = [n for n in dir(estimands) if n.startswith(("log_", "accuracy_", "lr_"))]
    assert len(names) == 5
    rows = replicate(
        *(entry(arm, curve=reaching(20), test_acc=0.9) for arm in ("batch", "none")),
        *(row for arm in ("batch", "none") for row in sweep(arm, [(0.1, 0.5), (1, 0.9)])),
    )
    arguments = {"better": "batch", "other": "none", "large": "batch", "small": "none"}
    arguments |= {"other_large": "batch", "other_small": "none"}
    for name in names:
        function = getattr(estimands, name)
        needed = {
            k: v
            for k, v in arguments.items()
            if k in function.__kwdefaults__ or k in function.__annotations__
        }
        estimate = functools.partial(function, **needed)(rows)
        assert getattr(estimate, "value", estimate) == 0
        assert any(unit in function.__doc__ for unit in ("logarithm", "percentage points", "decades"))
