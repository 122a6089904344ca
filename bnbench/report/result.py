"""What a report is made of: the results of studies, the verdicts on claims, and where they come from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnbench.study import Claim, Hypothesis, Study, Table
from bnbench.study.design import Design
from bnbench.study.verdicts import ClaimVerdict, Verdict


@dataclass(frozen=True)
class StudyResult:
    """One definition of a study, its rows and its verdicts.

    `planned` is the number of rows that the preset asks for at most; `registered` holds the hash, the time
    (seconds since 1970) and the definition of every version that was ever registered, oldest first. `links`
    has, by the key of a row, the address of the page that shows its training, where there is one.
    """

    study: Study
    preset: str
    study_hash: str
    table: Table
    verdicts: tuple[Verdict, ...]
    planned: int
    registered: tuple[tuple[str, float, Mapping[str, Any]], ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)

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
        design = self.design
        wanted = sum(len(design.arms_in(c.name)) * design.replicates_in(c.name) for c in design.cells)
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
        """The study, at the preset at which it was judged, that gave a verdict."""
        return next((result for result in self.results if verdict in result.verdicts), None)

    def studies_of(self, verdict: ClaimVerdict) -> tuple[StudyResult, ...]:
        """The studies that a claim's verdict rests on, in the report's order."""
        found = [self.study_of(cell) for cell in verdict.cells]
        return tuple(result for result in self.results if any(result is other for other in found))

    def hypotheses_of(self, verdict: ClaimVerdict) -> list[tuple[Hypothesis | None, tuple[Verdict, ...]]]:
        """A claim's primary hypotheses with their cells, each hypothesis by itself."""
        groups: dict[tuple[str, str], list[Verdict]] = {}
        for cell in verdict.cells:
            groups.setdefault((cell.study, cell.hypothesis), []).append(cell)
        return [(self._hypothesis(cells[0]), tuple(cells)) for cells in groups.values()]

    def _hypothesis(self, verdict: Verdict) -> Hypothesis | None:
        result = self.study_of(verdict)
        declared = result.study.hypotheses if result else ()
        return next((h for h in declared if h.name == verdict.hypothesis), None)

    def condition(self, verdict: ClaimVerdict) -> str:
        """What sets the cells that support a claim apart from those that refute it, or nothing.

        A field of the rows, first of all the network and the data, whose values on the two sides share none:
        `the network (mlp against cnn)`.
        """
        sides = [
            [self._settings(cell) for cell in verdict.cells if cell.on_claim == decision]
            for decision in ("SUPPORTED", "REFUTED")
        ]
        if not all(sides):
            return ""
        names = dict.fromkeys(("model", "data", *(name for side in sides for row in side for name in row)))
        for name in names:
            here, there = (list(dict.fromkeys(row.get(name, "default") for row in side)) for side in sides)
            if not set(here) & set(there):
                words = _FIELD_WORDS.get(name, name.replace("_", " "))
                return f"the {words} ({', '.join(here)} against {', '.join(there)})"
        return ""

    def _settings(self, verdict: Verdict) -> dict[str, str]:
        """What a cell changes, by field; the network and the data always."""
        result = self.study_of(verdict)
        if result is None:
            return {}
        cell = result.design.cell(verdict.cell)
        row = {"model": result.design.base.model, "data": result.design.base.data, **cell.changes}
        return {name: as_words(value) for name, value in row.items() if name != "steps"}

    def exploratory(self, claim: Claim) -> tuple[Verdict, ...]:
        """The verdicts on a claim's hypotheses that were declared as exploratory."""
        return tuple(v for r in self.results for v in r.verdicts if v.claim == claim.id and not v.primary)


_FIELD_WORDS = {"model": "network", "n_train": "number of training examples"}


def as_words(value: Any) -> str:
    """A plain value for people: `ghost_size=16` for options."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={part}" for name, part in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
