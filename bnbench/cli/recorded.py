"""Verbs over what is recorded: status, report, rerun, publish, export and import."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table as TextTable

from bnbench import placement
from bnbench.cli.questions import read_questions
from bnbench.engine.back_ends import check_back_end
from bnbench.engine.conduct import killed, train_row
from bnbench.engine.distributed import cluster_environment, launcher, leave_group
from bnbench.engine.executors import LocalPool
from bnbench.engine.lock import hold
from bnbench.engine.provenance import git_state
from bnbench.engine.rows import check_trial
from bnbench.engine.suite import Job, judge_recorded, prepare
from bnbench.exchange import read_rows, write_rows
from bnbench.record import Record
from bnbench.registry import BadInput, nearest
from bnbench.report import Report, StudyResult, render_csv, render_json, render_markdown, write_report
from bnbench.study.claims import judge_claim
from bnbench.study.load import load_claims, load_studies, load_study
from bnbench.study.spec import Study
from bnbench.study.table import Result, Table
from bnbench.study.trial import Trial, trial_from
from bnbench.study.verdicts import ClaimVerdict, Verdict
from bnbench.tracking import open_store, pages_of, tracking_uri, trial_of_run
from bnbench.tracking import publish as publish_record

_FORMATS = ("html", "md", "json", "csv")
_PRESETS = ("quick", "full", "smoke")


def existing_record(runs: Path) -> Record:
    """The record of a folder. Raises BadInput where there is none."""
    path = runs / "bnbench.db"
    if not path.exists():
        raise BadInput(f"nothing is recorded in {runs}; run a study first, or name the folder with --runs")
    return Record(path)


def results_of(record: Record, jobs: Sequence[Job], suite: Mapping[str, Study]) -> tuple[StudyResult, ...]:
    """What is recorded of these studies, judged."""
    return tuple(result_of(record, job, *judge_recorded(record, job, suite)) for job in jobs)


def result_of(record: Record, job: Job, table: Table, verdicts: tuple[Verdict, ...]) -> StudyResult:
    """A study's table and verdicts with what was registered of it."""
    return StudyResult(
        study=job.study,
        preset=job.preset,
        study_hash=job.study_hash,
        table=table,
        verdicts=verdicts,
        planned=len(job.rows),
        registered=tuple(record.registered(job.study.name, job.preset)),
    )


def gather(results: Sequence[StudyResult], runs: Path) -> Report:
    """The report on some studies, in one order whatever ran first: every claim with the verdict they give."""
    results = sorted(results, key=lambda result: (_PRESETS.index(result.preset), result.study.name))
    claims = tuple((claim, _judge_claim(claim.id, results)) for claim in load_claims().values())
    return Report(tuple(results), claims, _made(), runs)


def linked(report: Report, record: Record, uri: str) -> Report:
    """The report with the pages of all that the tracking store `uri` has been sent by now.

    Trainings of two steps get none: nobody looks for them, and links make the page be drawn once more.
    """
    pages = {
        r.study_hash: {} if r.design.smoke else pages_of(record, r.study_hash, r.table, uri)
        for r in report.results
    }
    return replace(report, results=tuple(replace(r, links=pages[r.study_hash]) for r in report.results))


def _judge_claim(claim: str, results: Sequence[StudyResult]) -> ClaimVerdict:
    """A claim's verdict in one preset, since its family is declared for each: full where that is complete."""
    judged = [
        judge_claim(claim, [v for r in results if r.preset == preset for v in r.verdicts])
        for preset in ("full", "quick", "smoke")
    ]
    spoken = [verdict for verdict in judged if verdict.cells] or judged
    whole = [v for v in spoken if v.cells and all(cell.gate != "incomplete" for cell in v.cells)]
    return (whole or spoken)[0]


def _made() -> dict[str, str]:
    from importlib.metadata import version

    from bnbench import __version__

    made = {"bnbench": __version__, "Python": platform.python_version(), "machine": platform.platform()}
    made |= {name: version(name) for name in ("torch", "lightning", "mlflow", "optuna")}
    commit, dirty = git_state()
    made |= {"git": f"{commit[:12]}{' with changes' if dirty else ''}"} if commit else {}
    return made


def recorded_jobs(
    record: Record, studies: Sequence[Study], preset: str | None, suite: Mapping[str, Study]
) -> list[Job]:
    """The studies whose present definition, or an earlier one, is in the record; all where none is named.

    The folder's own questions are among them.
    """
    there = dict.fromkeys((name, kind) for _, name, kind in record.studies())
    known = {**suite, **{study.name: study for study in studies}}
    questions = read_questions(record.path.parent)
    wanted = [study.name for study in studies]
    jobs = [
        prepare(study, kind)
        for name, kind in there
        if (study := questions.get((name, kind), known.get(name))) is not None
        and (not wanted or name in wanted)
        and preset in (None, kind)
    ]
    if not jobs:
        names = ", ".join(dict.fromkeys(name for name, _ in there)) or "nothing"
        asked = f"of {', '.join(wanted)}" if wanted else "of the project's studies"
        raise BadInput(
            f"nothing {asked} is recorded in {record.path.parent}, but {names}; give the file of that study"
        )
    return jobs


def print_status(runs: Path) -> int:
    """Say what is recorded of each study; 1 where something is missing."""
    record = existing_record(runs)
    suite = load_studies()
    table = TextTable(box=None, pad_edge=False)
    for title in ("study", "preset", "definition", "rows", "planned", "verdicts"):
        table.add_column(title)
    complete = True
    for result in results_of(record, recorded_jobs(record, (), None, suite), suite):
        decided = sum(v.gate != "incomplete" for v in result.verdicts)
        complete &= decided == len(result.verdicts)
        table.add_row(
            result.study.name,
            result.preset,
            result.study_hash,
            str(result.recorded),
            f"about {result.planned}",
            f"{decided} of {len(result.verdicts)}",
        )
    Console(soft_wrap=True).print(table)
    return 0 if complete else 1


def print_report(words: tuple[str, ...], preset: str | None, format: str, runs: Path) -> int:
    """Write the page, or print the numbers."""
    if format not in _FORMATS:
        raise BadInput(f"no format {format!r}{nearest(format, _FORMATS)}")
    record = existing_record(runs)
    suite = load_studies()
    asked = {} if all(word in suite for word in words) else {s.name: s for s in read_questions(runs).values()}
    jobs = recorded_jobs(record, [asked.get(word) or load_study(word) for word in words], preset, suite)
    report = gather(results_of(record, jobs, suite), runs)
    if format == "html":
        address = tracking_uri(None, os.environ, runs)
        print(write_report(linked(report, record, address), runs / "report"))
    else:
        print({"md": render_markdown, "json": render_json, "csv": render_csv}[format](report), end="")
    return 0


def read_trial(path: Path) -> Trial:
    """The row of a trial.json. Raises BadInput in one line where it is none."""
    try:
        return trial_from(json.loads(path.read_text()), str(path))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{error.lineno} is not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not JSON text") from None


def train_once(trial: Trial, gpus: str, data: Path) -> Result:
    """Train one row in a worker, as a study would, but beside `runs/`: no checkpoint, no saved weights."""
    check_trial(trial)
    check_back_end(trial)
    chosen = placement.choose_gpus(gpus, os.environ)
    slots = placement.plan_workers(chosen, min(trial.devices, len(chosen)) or 1)
    with tempfile.TemporaryDirectory() as scratch, LocalPool(slots) as pool:
        future = pool.submit(train_row, trial.as_dict(), str(data), scratch, devices=trial.devices)
        error = future.exception()
        return killed(trial) if isinstance(error, BrokenExecutor) else future.result()


def _train_as_rank(trial: Trial, gpus: str, data: Path) -> Result:
    """Train one row in this process, which torchrun or srun has started as one of its ranks."""
    placement.enter(placement.Slot(0, placement.choose_gpus(gpus, os.environ)))
    with tempfile.TemporaryDirectory() as scratch:
        result = train_row(trial.as_dict(), str(data), scratch)
    leave_group()
    return result


def print_training(path: Path, gpus: str, data: Path) -> int:
    """Train the row of a file; print its metrics as JSON. Of several ranks rank 0 prints."""
    trial = read_trial(path)
    rank = 0
    if launcher() is None:
        result = train_once(trial, gpus, data)
    else:
        result = _train_as_rank(trial, gpus, data)
        rank = cluster_environment().global_rank()
    if rank == 0:
        said = {"key": trial.key, "status": result.status, "reason": result.reason, **result.metrics}
        print(json.dumps(said, indent=1))
    elif result.status == "failed":
        print(f"rank {rank}: {result.reason}", file=sys.stderr)
    return 1 if result.status == "failed" else 0


def print_rerun(what: str, check: bool, gpus: str, runs: Path, data: Path, uri: str | None) -> int:
    """Train a recorded row again and compare; 1 where `check` asks and the numbers differ."""
    record = existing_record(runs)
    trial = _find_trial(what, record, runs, uri)
    before = record.recall([trial.key]).get(trial.key)
    now = train_once(trial, gpus, data)
    table = TextTable(box=None, pad_edge=False)
    for title in ("metric", "recorded", "now", "difference"):
        table.add_column(title)
    then: Mapping[str, float] = before.measured() if before is not None else {}
    measured = now.measured()
    same = before is not None and before.status == now.status and before.has_same_numbers(now)
    for name, value in measured.items():
        old = then.get(name)
        gap = "not recorded" if old is None else "equal" if old == value else f"{value - old:+.3g}"
        table.add_row(name, "" if old is None else f"{old!r}", f"{value!r}", gap)
    console = Console(soft_wrap=True)
    console.print(f"row {trial.key}: {now.status}", highlight=False)
    console.print(table)
    if before is None:
        console.print("the row is not recorded, so there is nothing to compare with")
        return 1 if check else 0
    console.print("equal to the bit" if same else "the numbers differ")
    if not same:
        old_traces, new_traces = before.plain_traces(), now.plain_traces()
        for name in sorted({*old_traces, *new_traces}):
            if old_traces.get(name) != new_traces.get(name):
                console.print(f"  the trace of {name} differs", highlight=False)
        changed = {k: (before.provenance.get(k), v) for k, v in now.provenance.items() if k in _COMPARED}
        for name, (old, new) in changed.items():
            if old != new:
                console.print(f"  {name}: recorded with {old}, now {new}", highlight=False)
    return 1 if check and not same else 0


_COMPARED = ("device", "threads", "bnbench", "torch", "lightning", "python")


def _find_trial(what: str, record: Record, runs: Path, uri: str | None) -> Trial:
    if what.endswith(".json"):
        return read_trial(Path(what))
    if (trial := record.trial(what)) is not None:
        return trial
    return trial_of_run(open_store(tracking_uri(uri, os.environ, runs), runs), what)


def print_publishing(runs: Path, uri: str | None) -> int:
    """Publish what is not there yet; 1 where something is left."""
    record = existing_record(runs)
    with hold(runs):
        address = tracking_uri(uri, os.environ, runs)
        counts = publish_record(record, open_store(address, runs))
    print(f"{counts.published} runs published, {counts.left} left{counts.error and f': {counts.error}'}")
    return 1 if counts.left else 0


def export_rows(path: Path, runs: Path) -> int:
    """Write all rows to a file."""
    if path.suffix != ".parquet":
        raise BadInput(f"{path} must end in .parquet")
    print(f"{write_rows(path, existing_record(runs).rows())} rows in {path}")
    return 0


def import_rows(path: Path, runs: Path) -> int:
    """Merge a file's rows; 1 where one disagrees with what is recorded."""
    rows = read_rows(path)
    with hold(runs):
        record = Record(runs / "bnbench.db")
        there = record.recall(trial.key for trial, _ in rows)
        faults = record.append(rows)
    print(f"{len(rows) - len(there)} rows added, {len(there)} were there")
    for line in faults:
        print(f"fault: {line}")
    return 1 if faults else 0
