"""Estimands of robustness: over how many decades of a setting an arm trains about as well as at its best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from bnbench.registry import BadInput
from bnbench.study.estimands.rows import TRAINS_AT_ALL, allows
from bnbench.study.spec import Estimate
from bnbench.study.table import Entry, Replicate

#: (log10 of the setting, the metric there).
Point = tuple[float, float]


def usable_lr_width(entries: Sequence[Entry], margin: float = 0.02, metric: str = "val/acc") -> float:
    """Decades of learning rate at which an arm trains about as well as at its own best one.

    The total length of log10(lr) over which the metric, linear in log10(lr) between the points of the grid,
    is at least max(best - margin, 1.5 x chance): an arm that trains nowhere has width 0. Raises LookupError
    where there are no rows.
    """
    return _width_over_lr(entries, margin, metric)[0]


def lr_width_difference(
    replicate: Replicate, *, better: str, other: str, margin: float = 0.02, metric: str = "val/acc"
) -> Estimate:
    """The better arm's :func:`usable_lr_width` minus the other's, in decades, from tuning or sweep rows.

    The grid cuts off a width whose first or last point is still usable. Only the better arm cut off: the
    true difference is at least this, so the estimate allows "support"; only the other arm: "refute"; both:
    "neither".
    """
    return _difference(*(_width_over_lr(_grid(replicate, arm), margin, metric) for arm in (better, other)))


def init_scale_width_difference(
    replicate: Replicate,
    *,
    better: tuple[tuple[str, float], ...],
    other: tuple[tuple[str, float], ...],
    margin: float = 0.02,
    metric: str = "val/acc",
    tuned: bool = True,
) -> Estimate:
    """Decades of initial scale over which one group of arms trains well, minus those of another group.

    A group is pairs (arm, scale). An arm counts with the best metric of its tuning or sweep rows; if not
    `tuned`, with the one at the learning rate (ties: the lowest) that is best at the group's scale 1. The
    width of a group is that of :func:`usable_lr_width`, over log10(scale) in place of log10(lr) and with the
    best of the group; what its ends cut off allows the same as in :func:`lr_width_difference`. Raises
    BadInput for a group of fewer than two scales, or without the scale 1 where that is needed.
    """
    return _difference(
        *(_width_over_scale(replicate, group, margin, metric, tuned) for group in (better, other))
    )


def _difference(better: tuple[float, bool], other: tuple[float, bool]) -> Estimate:
    """The difference of two widths, each with whether the ends of its grid cut it off."""
    return Estimate(better[0] - other[0], allows(at_least=better[1], at_most=other[1]))


def _grid(replicate: Replicate, arm: str) -> tuple[Entry, ...]:
    entries = replicate.grid(arm)
    if not entries:
        raise LookupError(f"cell {replicate.cell!r}, replicate {replicate.index}: no grid of {arm!r}")
    return entries


def _width_over_lr(entries: Sequence[Entry], margin: float, metric: str) -> tuple[float, bool]:
    if not entries:
        raise LookupError("no rows to take a usable width from")
    points = [(math.log10(entry.trial.lr), entry[metric]) for entry in entries]
    return _usable_width(points, margin, entries[0]["chance"])


def _width_over_scale(
    replicate: Replicate, group: Sequence[tuple[str, float]], margin: float, metric: str, tuned: bool
) -> tuple[float, bool]:
    if len({scale for _, scale in group}) < 2:
        raise BadInput(f"a width over initial scales needs two scales or more, not {list(group)}")
    lr = None if tuned else _best_rate_at_one(replicate, group, metric)
    points, chance = [], 0.0
    for arm, scale in group:
        entries = [entry for entry in _grid(replicate, arm) if lr is None or entry.trial.lr == lr]
        if not entries:
            raise LookupError(f"replicate {replicate.index}: {arm!r} has no row at lr {lr:g}")
        points.append((math.log10(scale), max(entry[metric] for entry in entries)))
        chance = entries[0]["chance"]
    return _usable_width(points, margin, chance)


def _best_rate_at_one(replicate: Replicate, group: Sequence[tuple[str, float]], metric: str) -> float:
    arms = [arm for arm, scale in group if scale == 1]
    if not arms:
        raise BadInput(f"one learning rate for all scales is that of scale 1, and it is not in {list(group)}")
    return max(_grid(replicate, arms[0]), key=lambda entry: (entry[metric], -entry.trial.lr)).trial.lr


def _usable_width(points: Sequence[Point], margin: float, chance: float) -> tuple[float, bool]:
    """The length over which the metric is usable, and whether the first or the last point still is."""
    points = sorted(points)
    threshold = max(max(value for _, value in points) - margin, TRAINS_AT_ALL * chance)
    width = sum(_length_above(left, right, threshold) for left, right in pairwise(points))
    return width, points[0][1] >= threshold or points[-1][1] >= threshold


def _length_above(left: Point, right: Point, threshold: float) -> float:
    """The length of the part of a straight line's base over which the line is at or above the threshold."""
    (x0, y0), (x1, y1) = left, right
    low, high = min(y0, y1), max(y0, y1)
    if low >= threshold:
        return x1 - x0
    if high < threshold:
        return 0.0
    return (x1 - x0) * (high - threshold) / (high - low)
