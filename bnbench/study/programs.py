"""Programs: generators that yield the rows they need, are sent their results, and return lines of the table.

A program knows nothing of workers, records or time, so a study is a pure function of its rows' results.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

from bnbench.study.spec import Arm, Cell, Design, Study
from bnbench.study.table import Entry, Result, Role
from bnbench.study.trial import Trial

Results = Mapping[str, Result]

#: Where arms are tuned once for all replicates, this many replicates of their own choose.
TUNING_REPLICATES = 3
#: Data seeds of those start here, so that none of them is a replicate that is judged.
TUNING_SEEDS = 1_000_000


@dataclass(frozen=True)
class Wanted:
    """A row in its place in the table, before it is measured."""

    cell: str
    arm: str
    replicate: int
    role: Role
    trial: Trial

    def measured(self, results: Results) -> Entry:
        """The line of the table."""
        return Entry(self.cell, self.arm, self.replicate, self.role, self.trial, results[self.trial.key])


Program = Generator[list[Wanted], Results, list[Entry]]


def measure(wanted: list[Wanted]) -> Program:
    """Ask for rows, and return their lines."""
    results = yield wanted
    return [row.measured(results) for row in wanted]


def grid_of(design: Design, cell: Cell, replicate: int, role: Role) -> list[Wanted]:
    """Every arm at every learning rate of the grid, on validation data."""
    return [
        Wanted(cell.name, arm.name, replicate, role, design.trial(cell, arm, replicate, lr=lr))
        for arm in design.arms
        for lr in design.lr
    ]


def choose(entries: Iterable[Entry]) -> float | None:
    """The learning rate of the highest mean validation accuracy over replicates.

    Ties go to the lower validation loss, then to the lower learning rate; rates of which a row failed are
    out. None where nothing is left.
    """
    by_rate: dict[float, list[Entry]] = {}
    for entry in entries:
        by_rate.setdefault(entry.trial.lr, []).append(entry)
    ranked = [
        (-statistics.fmean(e["val/acc"] for e in rows), statistics.fmean(e["val/loss"] for e in rows), lr)
        for lr, rows in by_rate.items()
        if all(e.result.status != "failed" for e in rows)
    ]
    return min(ranked)[2] if ranked else None


def confirmed_at(
    study: Study, design: Design, cell: Cell, replicate: int, chosen: Mapping[str, float | None]
) -> list[Wanted]:
    """Every arm at its own choice and at the baseline's, reading test data; none where nothing was chosen."""
    wanted: list[Wanted] = []
    for arm in design.arms:
        rates: tuple[tuple[Role, float | None], ...] = (
            ("own", chosen[arm.name]),
            ("common", chosen[study.baseline]),
        )
        wanted += [
            Wanted(cell.name, arm.name, replicate, role, confirmation(design, cell, arm, replicate, lr))
            for role, lr in rates
            if lr is not None
        ]
    return wanted


def confirmation(design: Design, cell: Cell, arm: Arm, replicate: int, lr: float) -> Trial:
    """The row that reads test data at a learning rate."""
    return design.trial(cell, arm, replicate, lr=lr, score_on="test", curve_points=design.curve_points)


def search_replicate(study: Study, design: Design, cell: Cell, replicate: int) -> Program:
    """Tune every arm on the replicate's validation data, then confirm the choices."""
    tuned = yield from measure(grid_of(design, cell, replicate, "tune"))
    confirmed = yield from measure(confirmed_at(study, design, cell, replicate, _choices(design, tuned)))
    return tuned + confirmed


def search_once(study: Study, design: Design, cell: Cell) -> Program:
    """Tune every arm on three replicates of their own, then confirm the choices on all replicates."""
    seeds = _tuned_replicates(study, design)
    tuned = yield from measure([row for seed in seeds for row in grid_of(design, cell, seed, "tune")])
    chosen = _choices(design, tuned)
    confirmed = yield from measure(
        [
            row
            for replicate in range(design.replicates)
            for row in confirmed_at(study, design, cell, replicate, chosen)
        ]
    )
    return tuned + confirmed


def _choices(design: Design, tuned: Iterable[Entry]) -> dict[str, float | None]:
    rows = list(tuned)
    return {arm.name: choose(e for e in rows if e.arm == arm.name) for arm in design.arms}


def _tunes_once(study: Study, design: Design) -> bool:
    return study.program == "search" and design.tuning == "once"


def _tuned_replicates(study: Study, design: Design) -> range:
    """The replicates that train the grid: those that are judged, or others that choose for all."""
    if _tunes_once(study, design):
        return range(TUNING_SEEDS, TUNING_SEEDS + TUNING_REPLICATES)
    return range(design.replicates)


def programs_of(study: Study, preset: str) -> list[tuple[str, Program]]:
    """The programs of a preset, each with its cell's name."""
    design = study.design(preset)
    if _tunes_once(study, design):
        return [(cell.name, search_once(study, design, cell)) for cell in design.cells]
    return [
        (
            cell.name,
            search_replicate(study, design, cell, replicate)
            if study.program == "search"
            else measure(grid_of(design, cell, replicate, "sweep")),
        )
        for replicate in range(design.replicates)
        for cell in design.cells
    ]


def planned_rows(study: Study, preset: str) -> list[Trial]:
    """The rows that a study will train: exactly known for grids; a confirmation counts at the grid's middle.

    A row may stand for another learning rate than the one that is chosen, so use this for counts and times
    only. Rows that appear twice are listed once.
    """
    design = study.design(preset)
    middle = design.lr[len(design.lr) // 2]
    rows: dict[str, Trial] = {}
    for cell in design.cells:
        for replicate in _tuned_replicates(study, design):
            for wanted in grid_of(design, cell, replicate, "tune"):
                rows[wanted.trial.key] = wanted.trial
        if study.program == "search":
            for replicate in range(design.replicates):
                for arm in design.arms:
                    other = design.lr[0] if arm.name != study.baseline else middle
                    for lr in (middle, other):
                        trial = confirmation(design, cell, arm, replicate, lr)
                        rows[trial.key] = trial
    return list(rows.values())
