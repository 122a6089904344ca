"""Programs: generators that yield the rows they need, are sent their results, and return lines of the table.

A program knows nothing of workers, records or time, so a study is a pure function of its rows' results.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bnbench.study.design import TUNING_REPLICATES, Arm, Cell, Design
from bnbench.study.space import Point, Sampler, point_of, stand_in
from bnbench.study.spec import Study
from bnbench.study.table import Entry, Result, Role
from bnbench.study.trial import Trial

Results = Mapping[str, Result]

#: Data seeds of the tuning replicates start here, so that none of them is a replicate that is judged.
TUNING_SEEDS = 1_000_000
#: So many of the best points of each repeated search are tried on all tuning replicates.
SHORTLIST = 2


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


def turns(rows: Iterable[Wanted]) -> Iterator[tuple[Wanted, int]]:
    """Each row of a request with its number among those of the same cell, arm, replicate and role."""
    numbers: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        place = (row.cell, row.arm, row.replicate, row.role)
        yield row, numbers[place]
        numbers[place] += 1


Program = Generator[list[Wanted], Results, list[Entry]]


def measure(wanted: list[Wanted]) -> Program:
    """Ask for rows, if any, and return their lines."""
    if not wanted:
        return []
    results = yield wanted
    return [row.measured(results) for row in wanted]


def grid_of(design: Design, cell: Cell, replicate: int, role: Role) -> list[Wanted]:
    """Every arm without a space at every learning rate of the grid, on validation data.

    A sweep, whose rows nobody confirms, has the probes on them.
    """
    probes = design.probes_of(replicate) if role == "sweep" else {}
    return [
        Wanted(cell.name, arm.name, replicate, role, design.trial(cell, arm, replicate, lr=lr, probes=probes))
        for arm in design.arms_in(cell.name)
        if not arm.space_in(cell.name)
        for lr in design.lr
    ]


def setting(trial: Trial) -> Trial:
    """A row without its seeds: what is chosen, whatever replicate it was tried on."""
    return trial.replace(seed=0, data_seed=0)


def rank(entries: Iterable[Entry]) -> list[Trial]:
    """The settings of some rows, the best first: by mean validation accuracy over replicates.

    Settings that reach the row's training loss (`until_train_nll`) more often come first. Ties go to the
    lower validation loss, then to the lower learning rate; settings of which a row failed are out.
    """
    by_setting: dict[Trial, list[Entry]] = {}
    for entry in entries:
        by_setting.setdefault(setting(entry.trial), []).append(entry)
    ranked = [
        (
            -statistics.fmean(e.result.metrics.get("train/reached", 1.0) for e in rows),
            -statistics.fmean(e["val/acc"] for e in rows),
            statistics.fmean(e["val/loss"] for e in rows),
            chosen.lr,
            chosen.key,
            chosen,
        )
        for chosen, rows in by_setting.items()
        if all(e.result.status != "failed" for e in rows)
    ]
    return [chosen for *_, chosen in sorted(ranked, key=lambda place: place[:-1])]


def choose(entries: Iterable[Entry]) -> Trial | None:
    """The best setting of some rows; None where none is left."""
    ranked = rank(entries)
    return ranked[0] if ranked else None


def confirmed_at(
    study: Study, design: Design, cell: Cell, replicate: int, chosen: Mapping[str, Trial | None]
) -> list[Wanted]:
    """Every arm at its own choice, reading test data, and those on the grid at the baseline's rate too."""
    wanted: list[Wanted] = []
    common = chosen[study.baseline]
    for arm in design.arms_in(cell.name):
        own = chosen[arm.name]
        rows: list[tuple[Role, Trial]] = []
        if own is not None:
            rows.append(("own", confirmation(design, own, replicate)))
        if design.common and common is not None and not arm.space_in(cell.name):
            at_common = design.trial(cell, arm, replicate, lr=common.lr)
            rows.append(("common", confirmation(design, at_common, replicate)))
        wanted += [Wanted(cell.name, arm.name, replicate, role, trial) for role, trial in rows]
    return wanted


def confirmation(design: Design, chosen: Trial, replicate: int) -> Trial:
    """The row that reads test data with a chosen setting."""
    seeds = design.seeds(replicate)
    probes = design.probes_of(replicate)
    return chosen.replace(score_on="test", curve_points=design.curve_points, probes=probes, **seeds)


def timed_at(design: Design, cell: Cell, replicate: int, chosen: Mapping[str, Trial | None]) -> list[Wanted]:
    """Every arm's choice as a short row that is trained alone, where the design measures steps."""
    return [
        Wanted(cell.name, arm.name, replicate, "timing", timing(design, own, replicate))
        for arm in design.arms_in(cell.name)
        if design.times(replicate) and (own := chosen[arm.name]) is not None
    ]


def timing(design: Design, chosen: Trial, replicate: int) -> Trial:
    """The row that measures the time of a step with a chosen setting, whatever its rate and length.

    At the grid's smallest rate, so that nothing diverges; nothing is evaluated on the way.
    """
    return chosen.replace(
        lr=design.lr[0],
        steps=design.timing_steps,
        schedule="constant",
        until_train_nll=None,
        alone=True,
        **design.seeds(replicate),
    )


def search_spaces(
    study: Study, design: Design, cell: Cell, replicates: Iterable[int], sampler: Sampler
) -> Program:
    """Search the space of every arm that has one, on each replicate by itself.

    Points are drawn a batch at a time, in all searches of the cell at once, each batch from what the earlier
    ones scored. A request repeats the rows of the earlier ones, so that it is always whole.
    """
    searches: dict[tuple[str, int], list[Wanted]] = {
        (arm.name, replicate): []
        for replicate in replicates
        for arm in design.arms_in(cell.name)
        if arm.space_in(cell.name)
    }
    arms = {arm.name: arm for arm in design.arms_in(cell.name)}
    scored: dict[str, float | None] = {}
    entries: list[Entry] = []
    for batch, start in enumerate(range(0, design.trials_in(cell.name), design.batch)):
        count = min(design.batch, design.trials_in(cell.name) - start)
        for (name, replicate), rows in searches.items():
            rows += _drawn(study, design, cell, arms[name], replicate, rows, scored, count, batch, sampler)
        entries = yield from measure([row for rows in searches.values() for row in rows])
        scored = {
            e.trial.key: None if e.result.status == "failed" else e.result.metrics["val/acc"] for e in entries
        }
    return entries


def _drawn(
    study: Study,
    design: Design,
    cell: Cell,
    arm: Arm,
    replicate: int,
    rows: list[Wanted],
    scored: Mapping[str, float | None],
    count: int,
    batch: int,
    sampler: Sampler,
) -> list[Wanted]:
    """The next batch of one search; smaller where its space has nothing new left.

    A search starts at the arm's own row, where that is a point of its space.
    """
    space = arm.space_in(cell.name)
    keys = {row.trial.key for row in rows}

    def row_of(point: Point) -> Trial:
        return design.searched(cell, arm, replicate, point)

    history = [(point_of(space, row.trial), scored[row.trial.key]) for row in rows]
    first = [] if rows else _start(design, cell, arm, replicate)
    taken = keys | {row_of(point).key for point in first}
    seed = (study.name, cell.name, arm.name, replicate, batch)
    others = sampler(space, history, count - len(first), seed, lambda point: row_of(point).key not in taken)
    trials = {trial.key: trial for trial in map(row_of, [*first, *others])}
    return [
        Wanted(cell.name, arm.name, replicate, "tune", trial)
        for key, trial in trials.items()
        if key not in keys
    ]


def _start(design: Design, cell: Cell, arm: Arm, replicate: int) -> list[Point]:
    """The point of the arm's own row, if its space has one."""
    try:
        return [point_of(arm.space_in(cell.name), design.trial(cell, arm, replicate))]
    except LookupError:
        return []


def try_everywhere(design: Design, cell: Cell, tuned: Iterable[Entry]) -> Program:
    """Try the best points of every repeated search on all tuning replicates, to compare them fairly."""
    searches: dict[str, dict[int, list[Entry]]] = {}
    for entry in tuned:
        searches.setdefault(entry.arm, {}).setdefault(entry.replicate, []).append(entry)
    wanted = []
    for arm, by_replicate in searches.items():
        best = dict.fromkeys(one for rows in by_replicate.values() for one in rank(rows)[:SHORTLIST])
        wanted += [
            Wanted(cell.name, arm, replicate, "shortlist", chosen.replace(**design.seeds(replicate)))
            for chosen in best
            for replicate in _TUNING
        ]
    return (yield from measure(wanted))


def search_replicate(study: Study, design: Design, cell: Cell, replicate: int, sampler: Sampler) -> Program:
    """Tune every arm on the replicate's validation data, then confirm the choices."""
    tuned = yield from measure(grid_of(design, cell, replicate, "tune"))
    tuned += yield from search_spaces(study, design, cell, [replicate], sampler)
    chosen = _choices(design, tuned)
    confirmed = yield from measure(
        confirmed_at(study, design, cell, replicate, chosen) + timed_at(design, cell, replicate, chosen)
    )
    return tuned + confirmed


def search_once(study: Study, design: Design, cell: Cell, sampler: Sampler) -> Program:
    """Tune every arm on three replicates of their own, then confirm the choices on all replicates."""
    grids = yield from measure([row for seed in _TUNING for row in grid_of(design, cell, seed, "tune")])
    searched = yield from search_spaces(study, design, cell, _TUNING[: design.searches], sampler)
    shortlist = yield from try_everywhere(design, cell, searched)
    chosen = _choices(design, grids + shortlist)
    confirmed = yield from measure(
        [
            row
            for replicate in range(design.replicates_in(cell.name))
            for row in (
                *confirmed_at(study, design, cell, replicate, chosen),
                *timed_at(design, cell, replicate, chosen),
            )
        ]
    )
    return grids + searched + shortlist + confirmed


def _choices(design: Design, tuned: Iterable[Entry]) -> dict[str, Trial | None]:
    rows = list(tuned)
    return {arm.name: choose(e for e in rows if e.arm == arm.name) for arm in design.arms}


_TUNING = range(TUNING_SEEDS, TUNING_SEEDS + TUNING_REPLICATES)


def _tunes_once(study: Study, design: Design) -> bool:
    return study.program == "search" and design.tuning == "once"


def no_sampler(*_: object) -> list[Point]:
    """Stands for a sampler where no arm has a space. Raises LookupError where one has."""
    raise LookupError("an arm has a space to search, and no sampler was given")


def programs_of(study: Study, preset: str, sampler: Sampler = no_sampler) -> list[tuple[str, Program]]:
    """The programs of a preset, each with its cell's name."""
    design = study.design(preset)
    if _tunes_once(study, design):
        return [(cell.name, search_once(study, design, cell, sampler)) for cell in design.cells]
    return [
        (
            cell.name,
            search_replicate(study, design, cell, replicate, sampler)
            if study.program == "search"
            else measure(grid_of(design, cell, replicate, "sweep")),
        )
        for replicate in range(max(design.replicates_in(cell.name) for cell in design.cells))
        for cell in design.cells
        if replicate < design.replicates_in(cell.name)
    ]


def planned_rows(
    study: Study, preset: str, changed: Callable[[str, Trial], Trial] = lambda cell, row: row
) -> list[Trial]:
    """The rows that a study will train: exactly known for grids, stand-ins where results decide.

    A row may stand for another learning rate or point than the one that is chosen, so use this for counts
    and times only. Rows that appear twice are listed once. `changed` makes of a cell's name and a row the row
    that is trained in its place.
    """
    design = study.design(preset)
    rows = [changed(cell.name, row) for cell in design.cells for row in _planned_in(study, design, cell)]
    return list({trial.key: trial for trial in rows}.values())


def _planned_in(study: Study, design: Design, cell: Cell) -> Iterable[Trial]:
    once = _tunes_once(study, design)
    replicates = range(design.replicates_in(cell.name))
    tuned = _TUNING if once else replicates
    for replicate in tuned:
        for wanted in grid_of(design, cell, replicate, "tune" if study.program == "search" else "sweep"):
            yield wanted.trial
    middle = design.lr[len(design.lr) // 2]
    for arm in design.arms_in(cell.name):
        if space := arm.space_in(cell.name):
            trials = design.trials_in(cell.name)
            searches = _TUNING[: design.searches] if once else tuned
            shortlisted = min(SHORTLIST, trials) * (len(_TUNING) - 1) if once else 0
            numbers = [*range(trials), *(trials + n for n in range(shortlisted))]
            for replicate in searches:
                for number in numbers:
                    yield design.searched(cell, arm, replicate, stand_in(space, number))
            chosen = [design.searched(cell, arm, 0, stand_in(space, 0))]
        else:
            other = design.lr[0] if arm.name != study.baseline else middle
            rates = (middle, other) if design.common else (middle,)
            chosen = [design.trial(cell, arm, 0, lr=lr) for lr in rates]
        if study.program == "search":
            for replicate in replicates:
                for one in chosen:
                    yield confirmation(design, one, replicate)
                if design.times(replicate):
                    yield timing(design, chosen[0], replicate)
