"""Run studies: register their definitions, conduct their programs together, judge each when it ends."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bnbench.engine.back_ends import back_ends_of, check_back_end, on_back_end, program_on
from bnbench.engine.conduct import Observer, conduct
from bnbench.engine.rows import check_trial, module_arguments
from bnbench.engine.search import draw
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study.claims import adjust, family_sizes, judge
from bnbench.study.programs import Program, Results, Wanted, planned_rows, programs_of
from bnbench.study.space import most_levels, stand_in
from bnbench.study.spec import Study
from bnbench.study.table import Entry, Table
from bnbench.study.trial import Trial, trial_from
from bnbench.study.verdicts import Verdict, to_json


@dataclass(frozen=True)
class Job:
    """One study at one preset, checked: every row of it can be built.

    `rows` are those that are trained, on the back ends of their cells (`back_ends`, by name).
    """

    study: Study
    preset: str
    study_hash: str
    rows: tuple[Trial, ...]
    back_ends: Mapping[str, str] = field(default_factory=dict, kw_only=True)


def prepare(study: Study, preset: str, fleet: str = "off", on_gpu: bool = False) -> Job:
    """Expand a study's rows and check each distinct shape; `fleet` says which train in fleets.

    Raises BadInput that names cell and arm.
    """
    design = study.design(preset)
    for cell in design.cells:
        for arm in design.arms_in(cell.name):
            try:
                check_trial(design.trial(cell, arm, 0))
                check_back_end(design.trial(cell, arm, 0))
                space = arm.space_in(cell.name)
                for number in range(most_levels(space)):
                    check_trial(design.searched(cell, arm, 0, stand_in(space, number)))
            except BadInput as error:
                raise BadInput(
                    f"study {study.name!r}, cell {cell.name!r}, arm {arm.name!r}: {error}"
                ) from None
    back_ends = back_ends_of(design, fleet, on_gpu)
    rows = planned_rows(study, preset, lambda cell, row: on_back_end(row, back_ends[cell]))
    return Job(study, preset, study.hash(preset), tuple(rows), back_ends=back_ends)


def families(suite: Mapping[str, Study], job: Job) -> dict[str, int]:
    """The declared size of every claim's family: over the suite, or over a study that stands by itself."""
    own = suite.get(job.study.name)
    return family_sizes(suite.values() if own is job.study else [job.study], job.preset)


def judge_recorded(record: Record, job: Job, suite: Mapping[str, Study]) -> tuple[Table, tuple[Verdict, ...]]:
    """The table of a study as it is recorded, and its verdicts."""
    table = record.table(job.study_hash)
    sizes = families(suite, job)
    return table, adjust(judge(job.study, job.preset, table, sizes), sizes)


def run_jobs(
    jobs: Sequence[Job],
    suite: Mapping[str, Study],
    record: Record,
    executor: Executor,
    *,
    width: int,
    data: Path,
    observer: Observer,
    on_asked: Callable[[Job, list[Wanted]], None],
    on_told: Callable[[Job, list[Entry]], None],
    on_cell: Callable[[Job, str, Table, tuple[Verdict, ...]], None],
    on_study: Callable[[Job, Table, tuple[Verdict, ...]], None],
    cost_of: Callable[[Trial], float],
    deadline: float | None = None,
) -> list[Job]:
    """Run the programs of all jobs; returns those that a deadline cut off.

    Cells come by their cost (`cost_of`, the seconds of a row), those of a later preset after all of an
    earlier one: so verdicts come one by one, the cheapest first, and cells of two studies that share rows
    follow each other. A definition is registered before its first trial. `on_asked` is told which rows a
    program needs, `on_told` gets the lines of each such request when the program does, `on_cell` the study's
    table and the verdicts of a cell whose last program has ended, `on_study` the table and all verdicts of a
    study whose last cell has.
    """
    left: Counter[tuple[str, str]] = Counter()
    programs = []
    by_hash = {job.study_hash: job for job in jobs}
    for study_hash, job in by_hash.items():
        record.register(study_hash, job.study.definition(job.preset))
        for cell, program in programs_of(job.study, job.preset, draw):
            program = overheard(program_on(program, job.back_ends[cell]), partial(on_told, job))
            programs.append(((study_hash, cell), program))
            left[study_hash, cell] += 1
    presets = list(dict.fromkeys(job.preset for job in jobs))

    def place(name: tuple[str, str]) -> tuple[int, float]:
        job = by_hash[name[0]]
        design = job.study.design(job.preset)
        cell = design.cell(name[1])
        rows = (design.trial(cell, arm, 0) for arm in design.arms_in(cell.name))
        return presets.index(job.preset), sum(
            cost_of(on_back_end(row, job.back_ends[cell.name])) for row in rows
        )

    places = {name: place(name) for name in left}
    programs.sort(key=lambda named: places[named[0]])

    def asked(name: tuple[str, str], wanted: list[Wanted]) -> None:
        record.enroll(name[0], wanted)
        on_asked(by_hash[name[0]], wanted)

    def done(name: tuple[str, str], entries: list[Entry]) -> None:
        left[name] -= 1
        if left[name]:
            return
        study_hash, cell = name
        job = by_hash[study_hash]
        table, verdicts = judge_recorded(record, job, suite)
        record.keep_verdicts(study_hash, [to_json(v) for v in verdicts])
        on_cell(job, cell, table, tuple(v for v in verdicts if v.cell == cell))
        if not any(count for (other, _), count in left.items() if other == study_hash):
            keep_best_weights(record.path.parent, job, table)
            on_study(job, table, verdicts)

    cut_off = conduct(
        programs,
        executor,
        record,
        width=width,
        data=data,
        observer=observer,
        asked=asked,
        done=done,
        deadline=deadline,
    )
    return [by_hash[study_hash] for study_hash in dict.fromkeys(study_hash for study_hash, _ in cut_off)]


def overheard(program: Program, told: Callable[[list[Entry]], None]) -> Program:
    """The same program; `told` gets the lines of each request as soon as the program does."""
    results: Results | None = None
    while True:
        try:
            wanted = next(program) if results is None else program.send(results)
        except StopIteration as stop:
            entries: list[Entry] = stop.value
            return entries
        results = yield wanted
        told([row.measured(results) for row in wanted])


def keep_best_weights(runs: Path, job: Job, table: Table) -> None:
    """Keep each cell's and arm's best confirmed model as `runs/models/<study>/<preset>/<cell>/<arm>/`.

    The best is that of the highest validation accuracy (ties: the lowest replicate). Where its weights have
    been dropped, because another study trained the row, they are copied from the model that was kept then;
    if that was another row, there is no model.
    """
    kept = {
        trial_from(json.loads(path.read_text()), str(path)).key: path.parent
        for path in (runs / "models").glob("*/*/*/*/trial.json")
    }
    for cell in job.study.design(job.preset).cells:
        for arm in job.study.design(job.preset).arms_in(cell.name):
            rows = [
                e for e in table.of(cell=cell.name, arm=arm.name, roles=["own"]) if e.result.status == "done"
            ]
            folder = runs / "models" / job.study.name / job.preset / cell.name / arm.name
            if not rows:
                continue
            best = max(rows, key=lambda e: (e["val/acc"], -e.replicate)).trial
            weights = runs / "weights" / f"{best.key}.safetensors"
            source = weights if weights.exists() else kept.get(best.key, runs) / "model.safetensors"
            if source == folder / "model.safetensors":
                continue
            shutil.rmtree(folder, ignore_errors=True)
            if source.exists():
                folder.mkdir(parents=True)
                shutil.copyfile(source, folder / "model.safetensors")
                for name, values in (("module.json", module_arguments(best)), ("trial.json", best.as_dict())):
                    (folder / name).write_text(json.dumps(values, indent=1) + "\n")


def drop_weights(runs: Path, record: Record, jobs: Sequence[Job]) -> None:
    """Delete the weights of rows of finished studies; the best have been kept."""
    for job in jobs:
        for entry in record.table(job.study_hash).of(roles=["own", "common"]):
            (runs / "weights" / f"{entry.trial.key}.safetensors").unlink(missing_ok=True)
