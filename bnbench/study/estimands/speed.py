"""Estimands of speed: steps, examples and time to a target accuracy, and the area under the curve."""

from __future__ import annotations

import math
from itertools import pairwise

from bnbench.study.estimands.rows import ConfirmedRole, allows, confirmed
from bnbench.study.spec import Estimate
from bnbench.study.table import Entry, Replicate


def steps_to_target(entry: Entry, target: float) -> float | None:
    """Steps until validation accuracy first reaches the target, or None where the budget ends before.

    Accuracy a is taken as linear in log(step) between two evaluations (s0, a0) and (s1, a1) with
    a0 < target <= a1:  log T = log s0 + (log s1 - log s0) (target - a0) / (a1 - a0).
    A target that is reached at the first evaluation gives the step of that evaluation. A diverged row never
    reaches it. Unit: optimizer steps.
    """
    if entry.result.status == "diverged":
        return None
    steps, accuracies = entry.result.curve["step"], entry.result.curve["val/acc"]
    # The logarithm has no place for an evaluation before the first step.
    points = [(s, a) for s, a in zip(steps, accuracies, strict=True) if s >= 1]
    if points and points[0][1] >= target:
        return float(points[0][0])
    for (s0, a0), (s1, a1) in pairwise(points):
        if a0 < target <= a1:
            share = (target - a0) / (a1 - a0)
            return math.exp(math.log(s0) + share * (math.log(s1) - math.log(s0)))
    return None


def log_steps_ratio(
    replicate: Replicate, *, better: str, other: str, role: ConfirmedRole = "own"
) -> Estimate:
    """How many times more steps the other arm needs to the cell's target accuracy, as a natural logarithm.

    log(min(T_other, τ) / min(T_better, τ)), with T from :func:`steps_to_target`, the target from
    `constants["target"]` and τ the row's budget. Only the other arm censored: the true value is at least
    this, so the estimate allows "support"; only the better arm: "refute"; both: "neither".
    """
    slow, slow_censored = _log_steps(replicate, other, role)
    fast, fast_censored = _log_steps(replicate, better, role)
    return Estimate(slow - fast, allows(at_least=slow_censored, at_most=fast_censored))


def log_steps_allowance(
    replicate: Replicate, *, better: str, other: str, times: float, role: ConfirmedRole = "own"
) -> Estimate:
    """By how much an arm keeps to `times` the steps of another, as a natural logarithm.

    log(times T_other / T_better), above 0 where it does; censored as :func:`log_steps_ratio`.
    """
    steps = log_steps_ratio(replicate, better=better, other=other, role=role)
    return Estimate(steps.value + math.log(times), steps.allows)


def log_examples_ratio(
    replicate: Replicate, *, large: str, small: str, role: ConfirmedRole = "own"
) -> Estimate:
    """How many times more examples the large-batch arm reads to the target, as a natural logarithm.

    log(E_large / E_small), E = min(T, τ) x batch_size; see :func:`log_steps_ratio`. Only the large-batch
    arm censored allows "support", only the small-batch arm "refute", both "neither".
    """
    more, more_censored = _log_examples(replicate, large, role)
    fewer, fewer_censored = _log_examples(replicate, small, role)
    return Estimate(more - fewer, allows(at_least=more_censored, at_most=fewer_censored))


def log_examples_ratio_difference(
    replicate: Replicate,
    *,
    large: str,
    small: str,
    other_large: str,
    other_small: str,
    role: ConfirmedRole = "own",
) -> Estimate:
    """By how much a large batch costs one kind of arm more than another: a difference of two logarithms.

    log(E_large / E_small) - log(E_other_large / E_other_small); see :func:`log_examples_ratio`. Censored
    terms with a plus sign (large, other_small) allow "support", those with a minus sign "refute", one of
    each sign "neither".
    """
    plus = [_log_examples(replicate, arm, role) for arm in (large, other_small)]
    minus = [_log_examples(replicate, arm, role) for arm in (small, other_large)]
    value = sum(v for v, _ in plus) - sum(v for v, _ in minus)
    return Estimate(value, allows(at_least=any(c for _, c in plus), at_most=any(c for _, c in minus)))


def log_time_ratio(replicate: Replicate, *, better: str, other: str, role: ConfirmedRole = "own") -> Estimate:
    """How many times longer the other arm takes to the cell's target accuracy, as a natural logarithm.

    log(min(T_other, τ) d_other) - log(min(T_better, τ) d_better): steps as in :func:`log_steps_ratio`, which
    says what a censored arm allows, times the duration d of a step, `time/step_ms` of the arm's timing row,
    which ran with nothing beside it.
    """
    steps = log_steps_ratio(replicate, better=better, other=other, role=role)
    slow, fast = (replicate.timing(arm)["time/step_ms"] for arm in (other, better))
    return Estimate(steps.value + math.log(slow / fast), steps.allows)


def area_under_curve(entry: Entry, metric: str = "val/acc") -> float:
    """The mean of a metric over the training budget: the area under its curve a step, in its own unit.

    Trapezoids over the optimizer steps, from the first point of the curve to the budget, up to which the last
    point holds. A diverged row has the accuracy of guessing. Raises LookupError where there is no curve.
    """
    if entry.result.status == "diverged":
        return entry["chance"]
    points = list(zip(entry.result.curve["step"], entry.result.curve[metric], strict=True))
    if not points:
        raise LookupError(f"{entry.arm!r} has no curve")
    points.append((max(points[-1][0], float(entry.trial.steps)), points[-1][1]))
    length = points[-1][0] - points[0][0]
    area = math.fsum((s1 - s0) * (a0 + a1) / 2 for (s0, a0), (s1, a1) in pairwise(points))
    return area / length if length else points[0][1]


def area_difference(
    replicate: Replicate,
    *,
    better: str,
    other: str,
    metric: str = "val/acc",
    role: ConfirmedRole = "own",
    points: float = 100.0,
) -> float:
    """The better arm's :func:`area_under_curve` minus the other's, times `points`: percentage points.

    It needs no target, and so nothing is censored.
    """
    areas = [area_under_curve(confirmed(replicate, arm, role), metric) for arm in (better, other)]
    return points * (areas[0] - areas[1])


def _log_steps(replicate: Replicate, arm: str, role: str) -> tuple[float, bool]:
    """log(min(T, τ)), and whether it is censored."""
    entry = confirmed(replicate, arm, role)
    steps = steps_to_target(entry, replicate.constants["target"])
    return math.log(entry.trial.steps if steps is None else steps), steps is None


def _log_examples(replicate: Replicate, arm: str, role: str) -> tuple[float, bool]:
    log_steps, censored = _log_steps(replicate, arm, role)
    return log_steps + math.log(confirmed(replicate, arm, role).trial.batch_size), censored
