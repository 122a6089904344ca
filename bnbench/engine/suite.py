"""Run studies: register their definitions, conduct their programs together, judge each when it ends."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from bnbench.engine.conduct import Observer, conduct
from bnbench.engine.train import check_trial, module_arguments
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study.claims import Verdict, adjust, family_sizes, judge, to_json
from bnbench.study.programs import Wanted, planned_rows, programs_of
from bnbench.study.spec import Study
from bnbench.study.table import Entry, Table
from bnbench.study.trial import Trial


@dataclass(frozen=True)
class Job:
    """One study at one preset, checked: every row of it can be built."""

    study: Study
    preset: str
    study_hash: str
    rows: tuple[Trial, ...]


def prepare(study: Study, preset: str) -> Job:
    """Expand a study's rows and check each distinct shape. Raises BadInput that names cell and arm."""
    design = study.design(preset)
    for cell in design.cells:
        for arm in design.arms:
            try:
                check_trial(design.trial(cell, arm, 0))
            except BadInput as error:
                raise BadInput(
                    f"study {study.name!r}, cell {cell.name!r}, arm {arm.name!r}: {error}"
                ) from None
    return Job(study, preset, study.hash(preset), tuple(planned_rows(study, preset)))


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
    on_cell: Callable[[Job, str, Table, tuple[Verdict, ...]], None],
    on_study: Callable[[Job], None],
    deadline: float | None = None,
) -> list[str]:
    """Run the programs of all jobs, earlier jobs first; returns the names of studies that a deadline cut off.

    A definition is registered before its first trial. `on_asked` is told which rows a program needs,
    `on_cell` gets the table and the verdicts of a cell whose last program has ended, `on_study` is called
    when all cells of a study have.
    """
    left: Counter[tuple[str, str]] = Counter()
    programs = []
    by_hash = {job.study_hash: job for job in jobs}
    for study_hash, job in by_hash.items():
        record.register(study_hash, job.study.definition(job.preset))
        own = programs_of(job.study, job.preset)
        # All replicates of a cell before the next cell, so that verdicts come one by one.
        order = [cell.name for cell in job.study.design(job.preset).cells]
        own.sort(key=lambda named: order.index(named[0]))
        programs += [((study_hash, cell), program) for cell, program in own]
        left.update((study_hash, cell) for cell, _ in own)

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
            on_study(job)

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
    return list(dict.fromkeys(by_hash[study_hash].study.name for study_hash, _ in cut_off))


def keep_best_weights(runs: Path, job: Job, table: Table) -> None:
    """Keep each cell's and arm's best confirmed model as `runs/models/<study>/<preset>/<cell>/<arm>/`.

    The best is that of the highest validation accuracy (ties: the lowest replicate). A row whose weights
    are not at hand, because another study trained and dropped them, leaves what is there.
    """
    for cell in job.study.design(job.preset).cells:
        for arm in job.study.design(job.preset).arms:
            rows = [
                e for e in table.of(cell=cell.name, arm=arm.name, roles=["own"]) if e.result.status == "done"
            ]
            if not rows:
                continue
            best = max(rows, key=lambda e: (e["val/acc"], -e.replicate))
            weights = runs / "weights" / f"{best.trial.key}.safetensors"
            folder = runs / "models" / job.study.name / job.preset / cell.name / arm.name
            if weights.exists():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(weights, folder / "model.safetensors")
                (folder / "module.json").write_text(json.dumps(module_arguments(best.trial), indent=1) + "\n")
                (folder / "trial.json").write_text(json.dumps(best.trial.as_dict(), indent=1) + "\n")


def drop_weights(runs: Path) -> None:
    """Delete the weights that no study kept, once all studies have ended."""
    shutil.rmtree(runs / "weights", ignore_errors=True)
