"""Estimands of probes: what was measured inside the networks of two arms, compared."""

from __future__ import annotations

import math
from typing import Literal

from bnbench.probes import Trace
from bnbench.registry import BadInput, nearest
from bnbench.study.estimands.rows import confirmed
from bnbench.study.table import Entry, Replicate

#: Which row of an arm is read: a confirmed one, or of a sweep the one of best validation accuracy.
ProbedRole = Literal["own", "common", "best"]
_ROLES = ("own", "common", "best")


def probed_row(replicate: Replicate, arm: str, role: ProbedRole) -> Entry:
    """The arm's row of a role; "best" is that of highest `val/acc` in a grid, ties to the lower rate.

    Raises BadInput for another role, and LookupError where there is no such row.
    """
    if role not in _ROLES:
        raise BadInput(f"an estimand reads no rows of role {role!r}{nearest(role, _ROLES)}")
    if role != "best":
        return confirmed(replicate, arm, role)
    rows = replicate.grid(arm)
    if not rows:
        raise LookupError(f"cell {replicate.cell!r}, replicate {replicate.index}: no grid of {arm!r}")
    return max(rows, key=lambda row: row["val/acc"])


def trace_of_row(entry: Entry, probe: str) -> Trace:
    """What a probe measured in a row. Raises LookupError where the row has no such probe."""
    if probe not in entry.result.traces:
        raise LookupError(f"{entry.arm!r} has no trace of {probe!r}")
    return entry.result.traces[probe]


def probed(entry: Entry, probe: str, value: str, *, step: int) -> float:
    """The last finite reading of a probe up to a step: what it was before, in a network that has diverged.

    Raises LookupError where there is none.
    """
    trace = trace_of_row(entry, probe)
    readings = [trace.at(s).values[value] for s in trace.steps if s <= step]
    finite = [number for number in readings if math.isfinite(number)]
    if not finite:
        raise LookupError(f"{probe} of {entry.arm!r} has no finite {value} up to step {step}")
    return finite[-1]


def log_probe_ratio(
    replicate: Replicate,
    *,
    larger: str,
    smaller: str,
    probe: str,
    value: str,
    role: ProbedRole = "own",
    step: int | None = None,
    since: int = 0,
) -> float:
    """How many times larger a probe's value is in one arm than in another, as a natural logarithm.

    log(v_larger / v_smaller), v being the last reading up to `step`, or without one the geometric mean of the
    positive readings from `since` on: of an arithmetic mean a single reading can make the most, where some
    unit hardly varies. Raises LookupError where there is none.
    """
    logs = []
    for arm in (larger, smaller):
        trace = trace_of_row(probed_row(replicate, arm, role), probe)
        steps = [s for s in trace.steps if s <= step][-1:] if step is not None else trace.steps
        readings = [trace.at(s).values[value] for s in steps if s >= since]
        positive = [math.log(number) for number in readings if math.isfinite(number) and number > 0]
        if not positive:
            raise LookupError(f"{probe} of {arm!r} has no positive {value}")
        logs.append(math.fsum(positive) / len(positive))
    return logs[0] - logs[1]


def best_accuracy_difference(
    replicate: Replicate, *, better: str, other: str, metric: str = "val/acc"
) -> float:
    """The better arm's accuracy minus the other's, each at its best rate of a sweep: percentage points."""
    rows = [probed_row(replicate, arm, "best") for arm in (better, other)]
    return 100 * (rows[0][metric] - rows[1][metric])
