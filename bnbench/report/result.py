"""What a report is made of: the results of studies, the verdicts on claims, and where they come from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnbench.study import Claim, Study, Table
from bnbench.study.claims import ClaimVerdict, Verdict
from bnbench.study.design import Design


@dataclass(frozen=True)
class StudyResult:
    """One definition of a study, its rows and its verdicts.

    `planned` is the number of rows that the preset asks for at most; `registered` holds the hash, the time
    (seconds since 1970) and the definition of every version that was ever registered, oldest first.
    """

    study: Study
    preset: str
    study_hash: str
    table: Table
    verdicts: tuple[Verdict, ...]
    planned: int
    registered: tuple[tuple[str, float, Mapping[str, Any]], ...] = ()

    @property
    def design(self) -> Design:
        """The design of the preset."""
        return self.study.design(self.preset)

    @property
    def recorded(self) -> int:
        """How many different rows are there."""
        return len({entry.trial.key for entry in self.table.entries})

    @property
    def complete(self) -> bool:
        """Whether nothing is missing. Two choices may be one row, so the number of rows does not say it."""
        if self.verdicts:
            return all(verdict.gate != "incomplete" for verdict in self.verdicts)
        own = {(e.cell, e.arm, e.replicate) for e in self.table.entries if e.role == "own"}
        wanted = len(self.design.cells) * len(self.design.arms) * self.design.replicates
        return self.recorded >= self.planned or len(own) >= wanted

    @property
    def seconds(self) -> float:
        """The training time of all rows together, in seconds."""
        times = {e.trial.key: e.result.metrics.get("time/total_s", 0.0) for e in self.table.entries}
        return sum(times.values())

    @property
    def command(self) -> str:
        """The command that makes these results again."""
        return f"bnbench run {shlex.quote(self.study.name)} --preset {self.preset}"


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    `claims` pairs every claim of the article with its verdict, which has no cells where no study speaks of
    it; `made` says in plain words where and with what it was made.
    """

    results: tuple[StudyResult, ...]
    claims: tuple[tuple[Claim, ClaimVerdict], ...]
    made: Mapping[str, str] = field(default_factory=dict)
    runs: Path = Path("runs")

    def study_of(self, verdict: Verdict) -> StudyResult | None:
        """The study that gave a verdict."""
        return next((result for result in self.results if result.study.name == verdict.study), None)

    def exploratory(self, claim: Claim) -> tuple[Verdict, ...]:
        """The verdicts on a claim's hypotheses that were declared as exploratory."""
        return tuple(v for r in self.results for v in r.verdicts if v.claim == claim.id and not v.primary)
