"""Estimands: what a hypothesis measures, as one number a replicate signed in the claim's direction.

Study files bind the arms with `functools.partial(log_steps_ratio, better="batch", other="none")`. A row that
is missing raises LookupError; the judge then calls the cell incomplete.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from bnbench.registry import BadInput, nearest
from bnbench.study.spec import Estimate
from bnbench.study.table import Entry, Replicate

ConfirmedRole = Literal["own", "common"]

#: An arm trains at all where its accuracy is at least this many times that of guessing.
TRAINS_AT_ALL = 1.5
#: A row is stuck where its training loss is still this share of the loss of guessing.
STUCK_SHARE_OF_GUESSING = 0.9


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
    return Estimate(slow - fast, _allows(at_least=slow_censored, at_most=fast_censored))


def log_examples_ratio(
    replicate: Replicate, *, large: str, small: str, role: ConfirmedRole = "own"
) -> Estimate:
    """How many times more examples the large-batch arm reads to the target, as a natural logarithm.

    log(E_large / E_small), E = min(T, τ) x batch_size; see :func:`log_steps_ratio`. Only the large-batch
    arm censored allows "support", only the small-batch arm "refute", both "neither".
    """
    more, more_censored = _log_examples(replicate, large, role)
    fewer, fewer_censored = _log_examples(replicate, small, role)
    return Estimate(more - fewer, _allows(at_least=more_censored, at_most=fewer_censored))


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
    return Estimate(value, _allows(at_least=any(c for _, c in plus), at_most=any(c for _, c in minus)))


def accuracy_difference(
    replicate: Replicate,
    *,
    better: str,
    other: str,
    metric: str = "test/acc",
    role: ConfirmedRole = "own",
    points: float = 100.0,
) -> float:
    """The better arm's metric minus the other's, times `points`: percentage points for an accuracy."""
    return points * (_confirmed(replicate, better, role)[metric] - _confirmed(replicate, other, role)[metric])


def usable_lr_width(entries: Sequence[Entry], margin: float = 0.02, metric: str = "val/acc") -> float:
    """Decades of learning rate at which an arm trains about as well as at its own best one.

    The total length of log10(lr) over which the metric, linear in log10(lr) between the points of the grid,
    is at least max(best - margin, 1.5 x chance): an arm that trains nowhere has width 0. Raises LookupError
    where there are no rows.
    """
    points, threshold = _grid_points(entries, margin, metric)
    return sum(_length_above(left, right, threshold) for left, right in pairwise(points))


def lr_width_difference(
    replicate: Replicate, *, better: str, other: str, margin: float = 0.02, metric: str = "val/acc"
) -> Estimate:
    """The better arm's :func:`usable_lr_width` minus the other's, in decades, from tuning or sweep rows.

    The grid cuts off a width whose first or last point is still usable. Only the better arm cut off: the
    true difference is at least this, so the estimate allows "support"; only the other arm: "refute"; both:
    "neither".
    """
    widths, cut_off = [], []
    for arm in (better, other):
        entries = replicate.grid(arm)
        if not entries:
            raise LookupError(f"cell {replicate.cell!r}, replicate {replicate.index}: no grid of {arm!r}")
        points, threshold = _grid_points(entries, margin, metric)
        widths.append(usable_lr_width(entries, margin, metric))
        cut_off.append(points[0][1] >= threshold or points[-1][1] >= threshold)
    return Estimate(widths[0] - widths[1], _allows(at_least=cut_off[0], at_most=cut_off[1]))


def stuck(entry: Entry) -> bool:
    """Whether a row ended where it began: training loss at least 0.9 x log(1 / chance), yet not diverged."""
    guessing = math.log(1 / entry["chance"])
    return entry.result.status != "diverged" and entry["train/loss"] >= STUCK_SHARE_OF_GUESSING * guessing


def stuck_share(entries: Iterable[Entry]) -> float:
    """The share of rows that are stuck, from 0 to 1. Raises LookupError where there are no rows."""
    states = [stuck(entry) for entry in entries]
    if not states:
        raise LookupError("no rows to take the share of stuck ones from")
    return sum(states) / len(states)


def _confirmed(replicate: Replicate, arm: str, role: str) -> Entry:
    if role not in ("own", "common"):
        raise BadInput(f"an estimand reads no rows of role {role!r}{nearest(role, ('own', 'common'))}")
    return replicate.own(arm) if role == "own" else replicate.common(arm)


def _log_steps(replicate: Replicate, arm: str, role: str) -> tuple[float, bool]:
    """log(min(T, τ)), and whether it is censored."""
    entry = _confirmed(replicate, arm, role)
    steps = steps_to_target(entry, replicate.constants["target"])
    return math.log(entry.trial.steps if steps is None else steps), steps is None


def _log_examples(replicate: Replicate, arm: str, role: str) -> tuple[float, bool]:
    log_steps, censored = _log_steps(replicate, arm, role)
    return log_steps + math.log(_confirmed(replicate, arm, role).trial.batch_size), censored


def _allows(*, at_least: bool, at_most: bool) -> Literal["both", "support", "refute", "neither"]:
    """What a value may show whose true counterpart is at least, or at most, as large."""
    if at_least and at_most:
        return "neither"
    if at_least:
        return "support"
    return "refute" if at_most else "both"


def _grid_points(
    entries: Sequence[Entry], margin: float, metric: str
) -> tuple[list[tuple[float, float]], float]:
    """(log10 lr, metric) by rising learning rate, and the metric from which on a point is usable."""
    if not entries:
        raise LookupError("no rows to take a usable width from")
    points = sorted((math.log10(entry.trial.lr), entry[metric]) for entry in entries)
    best = max(value for _, value in points)
    return points, max(best - margin, TRAINS_AT_ALL * entries[0]["chance"])


def _length_above(left: tuple[float, float], right: tuple[float, float], threshold: float) -> float:
    """The length of the part of a straight line's base over which the line is at or above the threshold."""
    (x0, y0), (x1, y1) = left, right
    low, high = min(y0, y1), max(y0, y1)
    if low >= threshold:
        return x1 - x0
    if high < threshold:
        return 0.0
    return (x1 - x0) * (high - threshold) / (high - low)
