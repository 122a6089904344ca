"""What holds for all estimands, and what they ask of single rows."""

import dataclasses
import functools
import inspect
import json
import math

import pytest

from bnbench.probes import Trace
from bnbench.registry import BadInput
from bnbench.study import estimands
from bnbench.study.estimands import (
    accuracy_difference,
    log_steps_ratio,
    lr_width_difference,
    stuck,
    stuck_share,
    usable_lr_width,
)
from tests.estimand_rows import entry, reaching, replicate, sweep
from tests.verdict_tables import hypothesis, study


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
    assert accuracy_difference(rows, **arms).value == pytest.approx(10)
    assert accuracy_difference(rows, **arms, role="common").value == pytest.approx(1)
    with pytest.raises(BadInput, match="did you mean 'common'"):
        accuracy_difference(rows, **arms, role="commmon")


def test_a_missing_row_raises_lookup_error_that_names_it():
    with pytest.raises(LookupError, match="'none' as own"):
        accuracy_difference(replicate(entry("batch", test_acc=0.9)), better="batch", other="none")
    with pytest.raises(LookupError, match="no grid of 'batch'"):
        lr_width_difference(replicate(), better="batch", other="none")
    with pytest.raises(LookupError, match="no rows"):
        usable_lr_width([])
    with pytest.raises(LookupError, match="no rows"):
        stuck_share([])


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


PAIR = {"better": "batch", "other": "none"}
GROUPS = {"better": ("batch",), "other": ("none",)}
SCALED = (("batch", 0.1), ("none", 1.0))
BOUND = {
    "accuracy_difference": PAIR,
    "area_difference": PAIR,
    "best_accuracy_difference": PAIR,
    "best_difference": GROUPS,
    "flow_against_theory": {"arm": "batch"},
    "flow_gain": PAIR,
    "flow_repair": {"arm": "batch", "late": 100},
    "init_scale_width_difference": {"better": SCALED, "other": SCALED},
    "interaction": {
        "treated": ("batch",),
        "plain": ("none",),
        "other_treated": ("batch",),
        "other_plain": ("none",),
    },
    "interior_gain": {"arms": ("batch", "none", "batch")},
    "log_examples_ratio": {"large": "batch", "small": "none"},
    "log_examples_ratio_difference": {
        "large": "batch",
        "small": "none",
        "other_large": "none",
        "other_small": "batch",
    },
    "log_probe_ratio": {
        "larger": "batch",
        "smaller": "none",
        "probe": "gradient_flow",
        "value": "factor",
    },
    "log_steps_allowance": {**PAIR, "times": 1.0},
    "log_steps_ratio": PAIR,
    "log_time_ratio": PAIR,
    "lr_width_difference": PAIR,
    "metric_change": {"arm": "batch", "metric": "test/acc", "minus": "val/acc"},
    "metric_slope": {"doses": SCALED, "metric": "test/acc"},
    "spread_shrinkage": {"starts": SCALED, "metric": "test/acc"},
}
UNITS = ("logarithm", "percentage points", "decades", "metric units a dose")


def test_the_table_below_names_every_estimand():
    public = [getattr(estimands, name) for name in estimands.__all__]
    functions = [f for f in public if callable(f) and "replicate" in inspect.signature(f).parameters]
    # What a slope reads is a series, no estimate.
    functions.remove(estimands.rising_doses)
    assert sorted(f.__name__ for f in functions) == sorted(BOUND)


@pytest.mark.parametrize("name", BOUND)
def test_every_estimand_takes_names_only_says_its_unit_and_gives_zero_for_equal_arms(name):
    function = getattr(estimands, name)
    first, *others = inspect.signature(function).parameters.values()
    assert first.name == "replicate" and all(p.kind is p.KEYWORD_ONLY for p in others)
    assert any(unit in " ".join(function.__doc__.lower().split()) for unit in UNITS)
    metrics = {"test_acc": 0.9, "val_acc": 0.9, "val_loss": 0.5, "time_step_ms": 1.0}
    rows = replicate(
        *(
            entry(arm, role, curve=reaching(20), **metrics)
            for arm in ("batch", "none")
            for role in ("own", "timing")
        ),
        *(row for arm in ("batch", "none") for row in sweep(arm, [(0.1, 0.5), (1, 0.9)])),
    )
    factor = estimands.mean_field_factor(64)
    values = {"factor": (factor,) * 2, "log_factor": (math.log(factor),) * 2}
    traces = {"gradient_flow": Trace(steps=(0, 100), values=values)}
    rows = dataclasses.replace(
        rows,
        entries=tuple(
            dataclasses.replace(e, result=dataclasses.replace(e.result, traces=traces)) for e in rows.entries
        ),
    )
    estimate = function(rows, **BOUND[name])
    expected = 1.0 if name == "spread_shrinkage" else 0.0
    assert getattr(estimate, "value", estimate) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["metric_slope", "interaction", "init_scale_width_difference"])
def test_groups_and_doses_that_are_bound_are_plain_json_in_a_definition(name):
    estimand = functools.partial(getattr(estimands, name), **BOUND[name])
    definition = study(hypothesis(estimand=estimand)).definition("quick")
    assert json.loads(json.dumps(definition)) == definition
    bound = definition["hypotheses"]["C.a"]["estimand"][-1]
    assert set(bound) == set(BOUND[name])
    other = functools.partial(estimand, metric="val/loss")
    assert study(hypothesis(estimand=other)).hash("quick") != study(hypothesis(estimand=estimand)).hash(
        "quick"
    )
