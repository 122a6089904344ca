"""The table of a study: its rows with what was measured, and one replicate of it, as estimands read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bnbench.probes import Trace
from bnbench.study.trial import Trial

Status = Literal["done", "diverged", "failed"]
#: Why a row was trained: to tune an arm, to compare the best points of its searches on the same data, to
#: confirm the arm's own choice, to confirm at the baseline's learning rate, as a point of a fixed grid, or to
#: measure the time of a step with nothing beside it.
Role = Literal["tune", "shortlist", "own", "common", "sweep", "timing"]


@dataclass(frozen=True)
class Result:
    """What one training gave.

    `metrics` are numbers by name (`val/acc`, `test/loss`, ...); `curve` holds equally long series, the
    optimizer step among them (`step`); `traces` are what probes measured, by the name of the probe;
    `provenance` says where and when, and is never compared.
    """

    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    traces: Mapping[str, Trace] = field(default_factory=dict, kw_only=True)
    reason: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def brief(self) -> str:
        """The reason in one line; of a traceback its last one, which says what went wrong."""
        lines = self.reason.strip().splitlines()
        return lines[-1] if self.reason.startswith("Traceback") else " ".join(" ".join(lines).split())

    def measured(self) -> dict[str, float]:
        """The metrics that a repetition must reproduce to the bit: all but times and memory."""
        return {k: v for k, v in self.metrics.items() if not k.startswith(("time/", "memory/"))}

    def has_same_numbers(self, other: Result) -> bool:
        """Whether two trainings of a row gave the same to the bit: what is measured, curve and traces.

        A NaN equals itself.
        """
        return self._numbers() == other._numbers()

    def _numbers(self) -> str:
        # As text, where a NaN equals itself and -0.0 is not 0.0.
        curve = {name: list(series) for name, series in self.curve.items()}
        return json.dumps([self.measured(), curve, self.plain_traces()], sort_keys=True)

    def plain_traces(self) -> dict[str, Any]:
        """The traces as plain values for JSON."""
        return {probe: trace.to_json() for probe, trace in self.traces.items()}


def read_traces(found: Mapping[str, Any]) -> dict[str, Trace]:
    """The traces that :meth:`Result.plain_traces` gave."""
    return {probe: Trace.from_json(trace) for probe, trace in found.items()}


@dataclass(frozen=True)
class Entry:
    """One line of the table: a row in its place in the study, with its result."""

    cell: str
    arm: str
    replicate: int
    role: Role
    trial: Trial
    result: Result

    def __getitem__(self, metric: str) -> float:
        return self.result.metrics[metric]


@dataclass(frozen=True)
class Replicate:
    """All rows of one cell and one replicate: what an estimand is given.

    `constants` are the cell's registered numbers, such as the target accuracy.
    """

    cell: str
    index: int
    constants: Mapping[str, float]
    entries: tuple[Entry, ...]

    def own(self, arm: str) -> Entry:
        """The arm's confirmed row at its own best learning rate."""
        return self._one(arm, "own")

    def common(self, arm: str) -> Entry:
        """The arm's confirmed row at the best learning rate of the baseline arm."""
        return self._one(arm, "common")

    def timing(self, arm: str) -> Entry:
        """The arm's row whose `time/step_ms` was measured with nothing beside it."""
        return self._one(arm, "timing")

    def grid(self, arm: str) -> tuple[Entry, ...]:
        """The arm's tuning or sweep rows, by rising learning rate."""
        rows = [e for e in self.entries if e.arm == arm and e.role in ("tune", "sweep")]
        return tuple(sorted(rows, key=lambda e: e.trial.lr))

    def _one(self, arm: str, role: Role) -> Entry:
        rows = [e for e in self.entries if e.arm == arm and e.role == role]
        if len(rows) != 1:
            raise LookupError(
                f"cell {self.cell!r}, replicate {self.index}: {len(rows)} rows of {arm!r} as {role}"
            )
        return rows[0]


@dataclass(frozen=True)
class Table:
    """All rows of one study that are there."""

    entries: tuple[Entry, ...]

    def replicates(self, cell: str, constants: Mapping[str, float]) -> tuple[Replicate, ...]:
        """The replicates of a cell by rising number, each with its rows."""
        groups: dict[int, list[Entry]] = {}
        for entry in self.entries:
            if entry.cell == cell:
                groups.setdefault(entry.replicate, []).append(entry)
        return tuple(Replicate(cell, r, constants, tuple(groups[r])) for r in sorted(groups))

    def of(
        self, *, cell: str | None = None, arm: str | None = None, roles: Iterable[Role] = ()
    ) -> tuple[Entry, ...]:
        """The lines of a cell, an arm or some roles."""
        wanted = tuple(roles)
        return tuple(
            e
            for e in self.entries
            if (cell is None or e.cell == cell)
            and (arm is None or e.arm == arm)
            and (not wanted or e.role in wanted)
        )
