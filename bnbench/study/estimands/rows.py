"""What estimands ask of single rows: which one to read, what it may show, whether it trained at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from bnbench.registry import BadInput, nearest
from bnbench.study.table import Entry, Replicate

Allows = Literal["both", "support", "refute", "neither"]
ConfirmedRole = Literal["own", "common"]

#: An arm trains at all where its accuracy is at least this many times that of guessing.
TRAINS_AT_ALL = 1.5
#: A row is stuck where its training loss is still this share of the loss of guessing.
STUCK_SHARE_OF_GUESSING = 0.9


def confirmed(replicate: Replicate, arm: str, role: str) -> Entry:
    """The arm's row that reads test data. Raises BadInput for a role that has none."""
    if role not in ("own", "common"):
        raise BadInput(f"an estimand reads no rows of role {role!r}{nearest(role, ('own', 'common'))}")
    return replicate.own(arm) if role == "own" else replicate.common(arm)


def best_of(replicate: Replicate, arms: Sequence[str], role: str) -> Entry:
    """The confirmed row of highest `val/acc` among these arms; ties go to the lower `val/loss`, then order.

    Raises BadInput where `arms` is no sequence of names.
    """
    if isinstance(arms, str) or not arms:
        raise BadInput(f"a group of arms is a tuple of names such as ('batch',), not {arms!r}")
    rows = [confirmed(replicate, arm, role) for arm in arms]
    return max(rows, key=lambda row: (row["val/acc"], -row["val/loss"]))


def allows(*, at_least: bool, at_most: bool) -> Allows:
    """What a value may show whose true counterpart is at least, or at most, as large."""
    if at_least and at_most:
        return "neither"
    if at_least:
        return "support"
    return "refute" if at_most else "both"


def allows_matched(entries: Iterable[Entry]) -> Allows:
    """What a comparison at a matched training loss may show: nothing where a row did not reach it.

    Its metrics were then read at another loss, and nobody knows in which direction they would have moved.
    """
    missed = any(entry.result.metrics.get("train/reached", 1.0) == 0 for entry in entries)
    return "neither" if missed else "both"


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
