"""Verdicts as values: what a cell and a claim say, with the numbers behind it, and their JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bnbench.registry import BadInput, nearest

Decision = Literal["SUPPORTED", "REFUTED", "INCONCLUSIVE"]
Gate = Literal[
    "", "incomplete", "low_power", "diverged", "under_trained", "tuning_edge", "censored", "no_spread"
]
Label = Literal["", "negligible", "reversed", "at_least_delta", "size_uncertain"]


@dataclass(frozen=True)
class Verdict:
    """What one cell says about one hypothesis, with the numbers behind it.

    `low` and `high` bound the mean at `level`; `p` is Student's, `p_sign_flip` exact, `p_holm` the latter
    adjusted in the claim's family (primary hypotheses only, filled by :func:`~bnbench.study.claims.adjust`),
    all two-sided and against 0. `p_rank` is the exact signed-rank test that takes bounds for what they are,
    and is there only where something is censored (:func:`~bnbench.study.stats.censored_rank_p`). A slope over
    three doses or more also has `page_p`, Page's one-sided p for a rise with the dose in the claim's
    direction, and `dose_rho`, the mean of the replicates' Spearman's ρ. `bca` is a bootstrap interval at .95;
    `cliffs_delta` is within pairs. `values` are the replicates' numbers and `allows` what censoring lets them
    show. `n_diverged` counts an arm's diverged own rows (of a sweep: grid rows), `edge` is the share of
    replicates that picked an end of the grid. `reason` says in words why the gate closed. `against` marks a
    hypothesis whose sentence contradicts its claim.
    """

    study: str
    hypothesis: str
    claim: str
    cell: str
    kind: Literal["greater", "equivalent"]
    delta: float
    unit: str
    primary: bool
    level: float
    family_size: int
    n: int
    decision: Decision = "INCONCLUSIVE"
    label: Label = ""
    gate: Gate = ""
    reason: str = ""
    tuning: Literal["per_replicate", "once", ""] = ""
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    half_width: float | None = None
    expected_half_width: float | None = None
    p: float | None = None
    p_sign_flip: float | None = None
    p_holm: float | None = None
    p_rank: float | None = None
    page_p: float | None = None
    dose_rho: float | None = None
    bca: tuple[float, float] | None = None
    d_z: float | None = None
    cliffs_delta: float | None = None
    values: tuple[float, ...] = ()
    allows: tuple[str, ...] = ()
    n_diverged: Mapping[str, int] = field(default_factory=dict)
    edge: Mapping[str, float] = field(default_factory=dict)
    against: bool = False

    @property
    def on_claim(self) -> Decision:
        """What the cell says of the claim: its decision, turned round where `against`."""
        turned: dict[Decision, Decision] = {"SUPPORTED": "REFUTED", "REFUTED": "SUPPORTED"}
        return turned.get(self.decision, self.decision) if self.against else self.decision

    @property
    def caveat(self) -> str:
        """What must be said beside the decision, or nothing."""
        parts = ["conditional on one tuning"] if self.tuning == "once" else []
        return ", ".join(parts if self.primary else ["exploratory", *parts])


@dataclass(frozen=True)
class ClaimVerdict:
    """What all primary cells of a claim say together.

    `n_cells` counts the declared ones; `cells` are those that were judged; `n_supported` and `n_refuted`
    count what they say on the claim. `condition` names where a MIXED claim holds and where it does not.
    """

    claim: str
    decision: Literal["SUPPORTED", "REFUTED", "MIXED", "INCONCLUSIVE"]
    n_cells: int
    n_supported: int
    n_refuted: int
    condition: str
    cells: tuple[Verdict, ...]


def to_json(verdict: Verdict | ClaimVerdict) -> dict[str, Any]:
    """A verdict as plain values for JSON; every number is finite and keeps all its digits."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(verdict):
        value = getattr(verdict, f.name)
        if isinstance(value, tuple):
            value = [to_json(item) if isinstance(item, Verdict) else item for item in value]
        values[f.name] = dict(value) if isinstance(value, Mapping) else value
    return values


def from_json(values: Mapping[str, Any]) -> Verdict | ClaimVerdict:
    """The verdict that :func:`to_json` wrote. Raises BadInput for a field that no verdict has."""
    kind: type[Verdict] | type[ClaimVerdict] = ClaimVerdict if "cells" in values else Verdict
    known = [f.name for f in dataclasses.fields(kind)]
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise BadInput(f"a {kind.__name__} has no field {name!r}{nearest(name, known)}")
        if isinstance(value, list | tuple):
            value = tuple(from_json(item) if isinstance(item, Mapping) else item for item in value)
        plain[name] = value
    return kind(**plain)
