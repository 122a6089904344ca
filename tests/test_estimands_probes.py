"""Estimands that read probes: against numbers put in by hand, and the theory against its table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bnbench.probes import Trace
from bnbench.registry import BadInput
from bnbench.study import Entry, Replicate, Result, Trial
from bnbench.study.estimands import (
    best_accuracy_difference,
    flow_against_theory,
    flow_gain,
    flow_repair,
    log_probe_ratio,
    log_steps_allowance,
    log_steps_ratio,
    mean_field_factor,
)
from bnbench.study.estimands.probes import probed, probed_row


def trace(**values: tuple[float, ...]) -> Trace:
    return Trace(steps=(0, 10, 100), values=values)


def entry(arm: str, role: str = "own", acc: float = 0.5, batch_size: int = 64, **traces: Trace) -> Entry:
    trial = Trial(batch_size=batch_size, lr=acc, steps=100)
    curve = {"step": (10.0, 100.0), "val/acc": (0.2, 0.8)}
    return Entry("cell", arm, 0, role, trial, Result("done", {"val/acc": acc}, curve, traces=traces))  # type: ignore[arg-type]


def replicate(*entries: Entry) -> Replicate:
    return Replicate("cell", 0, {"target": 0.5}, entries)


def flow(factors: tuple[float, float, float]) -> Trace:
    return trace(log_factor=tuple(map(math.log, factors)))


@pytest.mark.parametrize(
    ("batch_size", "factor"),
    [(4, 1.756), (8, 1.337), (16, 1.261), (32, 1.234), (128, 1.216), (512, 1.213)],
)
def test_the_mean_field_factor_is_that_of_the_published_table(batch_size: int, factor: float) -> None:
    assert mean_field_factor(batch_size) == pytest.approx(factor, abs=6e-4)


def test_the_mean_field_factor_falls_to_its_limit() -> None:
    factors = [mean_field_factor(2**k) for k in range(2, 24)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), rel=1e-6)
    with pytest.raises(BadInput, match="4 samples or more"):
        mean_field_factor(3)


def test_the_kernel_of_the_theory_is_a_mean_over_two_gaussians() -> None:
    """J(c) = 2 E[relu(u) relu(v)] and J′(c) = 2 P(u > 0, v > 0) for unit Gaussians of correlation c.

    In polar coordinates: E r² = 2, and the angle is uniform.
    """
    b = 8
    angle = (np.arange(400_000) + 0.5) * 2 * np.pi / 400_000
    u, v = np.cos(angle), np.cos(angle - np.arccos(-1 / (b - 1)))
    kernel = 2 * 2 * (np.maximum(u, 0) * np.maximum(v, 0)).mean()
    slope = 2 * ((u > 0) & (v > 0)).mean()
    rate = (b - 1) * (slope + b - 1) / ((b - 3) * (b - 1) * (1 - kernel)) - 1 / (b - 3)
    assert mean_field_factor(b) ** 2 == pytest.approx(rate, rel=1e-4)


def test_a_gain_is_how_much_closer_to_one_a_factor_is_in_either_direction() -> None:
    found = replicate(
        entry("batch", "sweep", gradient_flow=flow((1.2, 1.1, 1.0))),
        entry("he", "sweep", gradient_flow=flow((1.01, 1.0, 1.0))),
        entry("torch", "sweep", gradient_flow=flow((0.4, 0.5, 0.8))),
    )
    gain = flow_gain(found, better="batch", other="torch")
    assert gain == pytest.approx(math.log(1 / 0.4) - math.log(1.2))
    assert flow_gain(found, better="batch", other="he") == pytest.approx(math.log(1.01) - math.log(1.2))
    assert flow_gain(found, better="batch", other="torch", step=100) == pytest.approx(math.log(1 / 0.8))
    assert flow_repair(found, arm="batch", late=100) == pytest.approx(math.log(1.2))
    assert flow_repair(found, arm="torch", early=10, late=100) == pytest.approx(math.log(0.8 / 0.5))


def test_theory_is_taken_at_the_batch_size_of_the_row() -> None:
    measured = mean_field_factor(16) * 1.01
    row = entry("batch", "sweep", batch_size=16, gradient_flow=flow((measured, 1.0, 1.0)))
    assert flow_against_theory(replicate(row), arm="batch") == pytest.approx(math.log(1.01))


def test_the_best_row_of_a_sweep_is_that_of_highest_validation_accuracy_and_lower_rate() -> None:
    rows = [entry("a", "sweep", acc) for acc in (0.3, 0.9, 0.5)]
    assert probed_row(replicate(*rows), "a", "best") is rows[1]
    assert best_accuracy_difference(
        replicate(*rows, entry("b", "sweep", 0.2)), better="a", other="b"
    ) == pytest.approx(70)
    with pytest.raises(LookupError, match="no grid of 'c'"):
        probed_row(replicate(*rows), "c", "best")
    with pytest.raises(BadInput, match="did you mean 'best'"):
        probed_row(replicate(*rows), "a", "bets")  # type: ignore[arg-type]


def test_a_ratio_of_geometric_means_leaves_out_readings_without_a_logarithm_or_too_early() -> None:
    found = replicate(
        entry("a", drift=trace(input_mean=(0.0, 2.0, 8.0))),
        entry("b", drift=trace(input_mean=(math.nan, 1.0, 1.0))),
    )
    ratio = {"larger": "a", "smaller": "b", "probe": "drift", "value": "input_mean"}
    assert log_probe_ratio(found, **ratio) == pytest.approx(math.log(4))  # type: ignore[arg-type]
    assert log_probe_ratio(found, **ratio, since=50) == pytest.approx(math.log(8))  # type: ignore[arg-type]
    assert log_probe_ratio(found, **ratio, step=10) == pytest.approx(math.log(2))  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="no positive"):
        log_probe_ratio(found, **ratio, step=0)  # type: ignore[arg-type]
    assert log_probe_ratio(found, **ratio, step=99) == pytest.approx(math.log(2))  # type: ignore[arg-type]


def test_a_missing_trace_is_a_missing_row() -> None:
    with pytest.raises(LookupError, match="no trace of 'drift'"):
        probed(entry("a"), "drift", "input_mean", step=0)


def test_of_a_network_that_has_diverged_the_last_finite_reading_is_taken() -> None:
    lost = entry("he", "sweep", gradient_flow=trace(log_factor=(0.2, math.nan, math.inf)))
    assert probed(lost, "gradient_flow", "log_factor", step=100) == 0.2
    never = entry("he", "sweep", gradient_flow=trace(log_factor=(math.nan, math.nan, 1.0)))
    with pytest.raises(LookupError, match="no finite log_factor up to step 10"):
        probed(never, "gradient_flow", "log_factor", step=10)


def test_an_allowance_shifts_the_ratio_of_steps_and_keeps_what_it_may_show() -> None:
    found = replicate(entry("a"), entry("b"))
    ratio = log_steps_ratio(found, better="a", other="b")
    allowed = log_steps_allowance(found, better="a", other="b", times=1.25)
    assert allowed.value == pytest.approx(ratio.value + math.log(1.25))
    assert allowed.allows == ratio.allows
