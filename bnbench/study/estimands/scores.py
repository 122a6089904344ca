"""Estimands of final metrics: differences, interactions and slopes over confirmed rows.

All of them read any metric and give `points` times its unit: the default 100 makes percentage points of an
accuracy, and -1 turns a loss, which is better where it is lower. Where a row was to stop at a training loss
and did not reach it (`train/reached` is 0), the estimate allows "neither".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from bnbench.registry import BadInput
from bnbench.study.estimands.rows import ConfirmedRole, allows_matched, best_of, confirmed
from bnbench.study.spec import Estimate
from bnbench.study.table import Entry, Replicate


def accuracy_difference(
    replicate: Replicate,
    *,
    better: str,
    other: str,
    metric: str = "test/acc",
    role: ConfirmedRole = "own",
    points: float = 100.0,
) -> Estimate:
    """The better arm's metric minus the other's, times `points`: percentage points for an accuracy."""
    plus, minus = confirmed(replicate, better, role), confirmed(replicate, other, role)
    return _contrast([plus], [minus], metric, points)


def best_difference(
    replicate: Replicate,
    *,
    better: tuple[str, ...],
    other: tuple[str, ...],
    metric: str = "test/acc",
    role: ConfirmedRole = "own",
    points: float = 100.0,
) -> Estimate:
    """The metric of the best arm of one group minus that of the best of another, times `points`.

    The best arm of a group is that of highest validation accuracy (ties: lower validation loss, then the
    order given), so the choice reads no test data. Percentage points for an accuracy.
    """
    plus, minus = best_of(replicate, better, role), best_of(replicate, other, role)
    return _contrast([plus], [minus], metric, points)


def interaction(
    replicate: Replicate,
    *,
    treated: tuple[str, ...],
    plain: tuple[str, ...],
    other_treated: tuple[str, ...],
    other_plain: tuple[str, ...],
    metric: str = "test/acc",
    role: ConfirmedRole = "own",
    points: float = 100.0,
) -> Estimate:
    """By how much a treatment does more to one kind of arm than to another, times `points`.

    (treated - plain) - (other_treated - other_plain), each the best of its group as in
    :func:`best_difference`. Percentage points for an accuracy.
    """
    plus = [best_of(replicate, arms, role) for arms in (treated, other_plain)]
    minus = [best_of(replicate, arms, role) for arms in (plain, other_treated)]
    return _contrast(plus, minus, metric, points)


def interior_gain(
    replicate: Replicate,
    *,
    arms: tuple[str, ...],
    metric: str = "test/acc",
    role: ConfirmedRole = "own",
    points: float = 100.0,
) -> Estimate:
    """By how much the best interior arm of an ordered series beats the better of its two ends.

    Positive where the series has its optimum inside; both are chosen as in :func:`best_difference`. Raises
    BadInput for fewer than three arms. Percentage points for an accuracy.
    """
    if len(arms) < 3:
        raise BadInput(f"an interior needs three ordered arms or more, not {arms!r}")
    ends = (arms[0], arms[-1])
    return best_difference(replicate, better=arms[1:-1], other=ends, metric=metric, role=role, points=points)


def metric_change(
    replicate: Replicate,
    *,
    arm: str,
    metric: str,
    minus: str,
    role: ConfirmedRole = "own",
    points: float = 100.0,
) -> Estimate:
    """One metric of a row minus another of the same row, times `points`: percentage points for accuracies."""
    row = confirmed(replicate, arm, role)
    return Estimate(points * (row[metric] - row[minus]), allows_matched([row]))


def metric_slope(
    replicate: Replicate,
    *,
    doses: tuple[tuple[str, float], ...],
    metric: str,
    sign: float = 1.0,
    role: ConfirmedRole = "own",
) -> Estimate:
    """The least-squares slope of a metric on the dose of its arm, times `sign`, in metric units a dose.

    sign x sum((x - mean x)(y - mean y)) / sum((x - mean x)^2) over the pairs (arm, dose x). Logarithms of
    doses are given as such: `("NBS 8", -3.0)` for -log2 8. Raises BadInput for fewer than two doses.
    """
    xs = _doses(doses)
    rows = [confirmed(replicate, arm, role) for arm, _ in doses]
    x_mean, y_mean = fmean(xs), fmean(row[metric] for row in rows)
    rise = math.fsum((x - x_mean) * (row[metric] - y_mean) for x, row in zip(xs, rows, strict=True))
    slope = rise / math.fsum((x - x_mean) ** 2 for x in xs)
    return Estimate(sign * slope, allows_matched(rows))


def rising_doses(
    replicate: Replicate,
    *,
    doses: tuple[tuple[str, float], ...],
    metric: str,
    sign: float = 1.0,
    role: ConfirmedRole = "own",
) -> tuple[float, ...]:
    """The numbers under a :func:`metric_slope`: sign x metric by rising dose, of equal doses their mean."""
    found: dict[float, list[float]] = {}
    for arm, dose in doses:
        found.setdefault(dose, []).append(sign * confirmed(replicate, arm, role)[metric])
    return tuple(fmean(found[dose]) for dose in sorted(found))


def spread_shrinkage(
    replicate: Replicate,
    *,
    starts: tuple[tuple[str, float], ...],
    metric: str = "norm/gamma",
    role: ConfirmedRole = "own",
) -> Estimate:
    """By how many decades the arms' starting values of a quantity lie further apart than its final ones.

    log10(max start / min start) - log10(max y / min y) over the pairs (arm, start), y the arm's metric: the
    whole range of the starts where all arms end at one value, 0 where the range stays. Raises BadInput for
    fewer than two starts, ValueError where a number is not above 0.
    """
    rows = [confirmed(replicate, arm, role) for arm, _ in starts]
    before, after = _doses(starts), [row[metric] for row in rows]
    for what, values in (("starts", before), (metric, after)):
        if min(values) <= 0:
            raise ValueError(f"a range in decades needs numbers above 0, but {what} has {min(values):g}")
    shrinkage = math.log10(max(before) / min(before)) - math.log10(max(after) / min(after))
    return Estimate(shrinkage, allows_matched(rows))


def _contrast(plus: Sequence[Entry], minus: Sequence[Entry], metric: str, points: float) -> Estimate:
    value = sum(row[metric] for row in plus) - sum(row[metric] for row in minus)
    return Estimate(points * value, allows_matched((*plus, *minus)))


def _doses(doses: Sequence[tuple[str, float]]) -> list[float]:
    values = [dose for _, dose in doses]
    if len(set(values)) < 2:
        raise BadInput(f"two doses or more that differ are needed, not {values}")
    return values
