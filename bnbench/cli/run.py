"""`bnbench run` and `bnbench plan`: what will be trained, the work, the verdicts, the report."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table as TextTable

from bnbench import doctor, placement
from bnbench.cli.asked import jobs_for, presets_of, with_enough_data, write_questions
from bnbench.cli.preflight import on_fit_gpus
from bnbench.cli.progress import Display, duration, print_note
from bnbench.cli.recorded import gather, linked, recorded_jobs, result_of, results_of
from bnbench.data import fetch
from bnbench.engine.cost import Costs, known_costs, measure_costs, occupied_seconds, seconds_of
from bnbench.engine.executors import LocalPool
from bnbench.engine.lock import hold
from bnbench.engine.mirror import Mirror
from bnbench.engine.ray_pool import RayPool
from bnbench.engine.storage import open_storage
from bnbench.engine.suite import Job, drop_weights, run_jobs
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.report import (
    claim_lines,
    ranking_lines,
    recipe_lines,
    render_json,
    verdict_lines,
    write_report,
)
from bnbench.report.words import effect
from bnbench.study.load import load_studies
from bnbench.study.programs import Wanted
from bnbench.study.question import Question
from bnbench.study.spec import Study
from bnbench.study.table import Entry, Table
from bnbench.study.trial import Trial
from bnbench.study.verdicts import Verdict
from bnbench.tracking import Publisher, open_store, places, tracking_uri

#: Seconds that `auto` gives to the full preset where nothing else is said.
AUTO_BUDGET = 2 * 3600.0


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    words: tuple[str, ...]
    preset: str
    gpus: str
    workers: int | None
    per_gpu: int
    budget: float | None
    runs: Path
    data: Path
    tracking_uri: str | None = None
    storage: str | None = None
    offline: bool = False
    dry_run: bool = False
    quiet: bool = False
    as_json: bool = False
    ray: str | None = None
    allow_mixed: bool = False
    question: Question | None = None
    fleet: str = "auto"


def seconds(text: str) -> float:
    """The seconds of 90s, 45m, 2h or 1h30m. Raises BadInput for anything else."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if match is None or not any(match.groups()):
        raise BadInput(f"--budget {text!r} is no duration; write 90s, 45m, 2h or 1h30m")
    hours, minutes, rest = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + rest


def run(request: Request) -> int:
    """Do what was asked for; the exit code is 0 when every cell is complete, else 1."""
    console = Console(stderr=request.as_json, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140
    pool = _open_pool(request)
    presets = presets_of(request, bool(pool.gpus))
    suite = load_studies()
    note = partial(print_note, console)
    asked = jobs_for(request, presets, suite, bool(pool.gpus), note)
    preflight = bool(pool.gpus) and not request.ray and not request.dry_run
    if not preflight:
        cards_here = "none" if request.ray else request.gpus
        for warning in doctor.refuse_unfit(doctor.check(request.runs, cards_here, environ=os.environ)):
            note(warning)
    jobs = _fitting(asked, pool.gpus, request, console)
    with ExitStack() as stack:
        stack.enter_context(hold(request.runs))
        if preflight:
            with suppress(BadInput):  # what cannot be downloaded is listed with all other faults
                jobs = _with_data(jobs, request, console)
            request = on_fit_gpus(request, jobs, console)
            pool = _open_pool(request)
            jobs = _fitting(jobs, pool.gpus, request, console)
        record = Record(request.runs / "bnbench.db")
        stack.callback(record.close)
        stack.callback(pool.shutdown)
        if not request.dry_run:
            jobs = _with_data(jobs, request, console)
        jobs = with_enough_data(jobs, request, note)
        rows = [trial for job in jobs for trial in job.rows]
        costs = measure_costs(rows, known_costs(record), pool, request.data, request.runs)
        jobs.sort(key=lambda job: (presets.index(job.preset), _cost(job.rows, costs)))
        if not request.quiet:
            _print_plan(console, jobs, record, costs, pool.width)
        if (budget := _budget(request, jobs)) is not None and not request.quiet:
            console.print(f"No training starts after {duration(budget)}.", highlight=False)
        if request.dry_run:
            return 0
        write_questions(jobs, request.runs)
        return _work(request, console, suite, jobs, record, pool, costs)


def jobs_of(request: Request) -> list[Job]:
    """The studies that were asked for, checked, at each of their presets."""
    has_gpus = bool(placement.choose_gpus(request.gpus, os.environ))
    return jobs_for(request, presets_of(request, has_gpus), load_studies(), has_gpus, lambda _: None)


def _open_pool(request: Request) -> LocalPool | RayPool:
    """The workers: those of a Ray cluster, or processes on this machine, which start with their first row."""
    if request.ray is None:
        gpus = placement.choose_gpus(request.gpus, os.environ)
        return LocalPool(placement.plan_workers(gpus, request.workers, request.per_gpu))
    return RayPool(
        request.ray,
        gpus=request.gpus,
        workers=request.workers,
        per_gpu=request.per_gpu,
        allow_mixed=request.allow_mixed,
    )


def _fitting(jobs: list[Job], gpus: int, request: Request, console: Console) -> list[Job]:
    """Refuse studies whose rows need more devices than one can have; if none was named, leave these out."""
    fit = []
    for job in jobs:
        machines = max(trial.num_nodes for trial in job.rows)
        devices = max(trial.devices for trial in job.rows)
        if machines > 1:
            problem = (
                f"trains rows over {machines} machines, and these are started by torchrun or srun:"
                " bnbench train trial.json"
            )
        elif gpus and devices > gpus:
            problem = (
                f"trains rows on {devices} GPUs of one machine, and there {'is' if gpus == 1 else 'are'}"
                f" {gpus}; run it where there are more, or on processors with --gpus none"
            )
        else:
            fit.append(job)
            continue
        line = f"study {job.study.name!r} ({job.preset}) {problem}"
        if request.words:
            raise BadInput(line)
        print_note(console, f"left out: {line}")
    return fit


def _with_data(jobs: list[Job], request: Request, console: Console) -> list[Job]:
    """Download what is missing; under `auto`, the full preset is left out where that fails."""
    # By name and options, since options are a dictionary.
    problems: dict[str, str] = {}
    ready = []
    for job in jobs:
        needed = {json.dumps([trial.data, trial.data_options], sort_keys=True): trial for trial in job.rows}
        for place, trial in needed.items():
            if place in problems:
                continue
            try:
                fetch(trial.data, request.data, **trial.data_options)
                problems[place] = ""
            except BadInput as error:
                if not (request.preset == "auto" and job.preset == "full"):
                    raise
                problems[place] = str(error)
                print_note(console, f"the preset full is left out: {error}")
        if not any(problems[place] for place in needed):
            ready.append(job)
    return ready


def _cost(rows: Sequence[Trial], costs: Costs) -> float:
    return sum(seconds_of(trial, costs) for trial in rows)


def _print_plan(console: Console, jobs: Sequence[Job], record: Record, costs: Costs, width: int) -> None:
    table = TextTable(box=None, pad_edge=False)
    for title, justify in (
        ("study", "left"),
        ("preset", "left"),
        ("cells", "right"),
        ("rows", "right"),
        ("new", "right"),
        ("core-seconds", "right"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    seen: set[str] = set()
    left = occupied = 0.0
    for job in jobs:
        new = [trial for trial in job.rows if trial.key not in seen]
        seen |= {trial.key for trial in new}
        there = record.recall(trial.key for trial in new)
        # A confirmed row is planned at a stand-in rate, so only a study that is judged whole is complete.
        verdicts = record.verdicts(job.study_hash)
        complete = bool(verdicts) and all(v["gate"] != "incomplete" for v in verdicts)
        missing = [] if complete else [trial for trial in new if trial.key not in there]
        cost = _cost(missing, costs)
        left += cost
        occupied += sum(occupied_seconds(trial, costs, width) for trial in missing)
        table.add_row(
            job.study.name,
            job.preset,
            str(len(job.study.design(job.preset).cells)),
            str(len(job.rows)),
            str(len(missing)),
            f"{cost:.0f}",
        )
    console.print(table)
    workers = f"{width} worker{'s' if width > 1 else ''}"
    console.print(
        f"About {left:.0f} core-seconds to train: {duration(occupied / width)} with {workers}.",
        highlight=False,
    )


def _budget(request: Request, jobs: Sequence[Job]) -> float | None:
    """The seconds after which no training starts, if there is such a limit."""
    if request.budget is None and request.preset == "auto" and any(job.preset == "full" for job in jobs):
        return AUTO_BUDGET
    return request.budget


def cell_line(verdict: Verdict) -> str:
    """One cell's verdict in one line, printed as soon as its last row is there."""
    exploratory = "" if verdict.primary else " (exploratory)"
    decision = f"{verdict.decision}{exploratory}"
    return f"{verdict.hypothesis} in {verdict.cell}: {decision}, {effect(verdict)}, n = {verdict.n}"


def _mixtures(cell: str, table: Table) -> list[str]:
    """A line for each thing that must be the same for all rows of a cell and is not."""
    places = [entry.result.provenance for entry in table.of(cell=cell)]
    lines = []
    for name in ("device", "torch", "bnbench"):
        kinds = sorted({str(place.get(name)) for place in places})
        if len(kinds) > 1:
            lines.append(
                f"the rows of {cell} were trained with {name} {' and '.join(kinds)}; compare with care"
            )
    if _mixes_back_ends(table.of(cell=cell, roles=["own", "common", "tune"])):
        lines.append(
            f"the rows of {cell} that are compared were trained by several back ends; compare with care"
        )
    return lines


def _mixes_back_ends(entries: Sequence[Entry]) -> bool:
    """Whether rows of one replicate have several; those with probes have one of their own."""
    used = {(entry.replicate, entry.trial.backend) for entry in entries if not entry.trial.probes}
    return len(used) > len({replicate for replicate, _ in used})


def _work(
    request: Request,
    console: Console,
    suite: Mapping[str, Study],
    jobs: Sequence[Job],
    record: Record,
    pool: LocalPool | RayPool,
    costs: Costs,
) -> int:
    uri = tracking_uri(request.tracking_uri, os.environ, request.runs)
    storage = open_storage(request.storage, request.runs, [uri])
    publisher, tracking = None, None
    if not request.offline:
        store = open_store(uri, request.runs)
        if store.notice:
            print_note(console, store.notice)
        publisher = Publisher(store, record.path, request.runs)
        publisher.start()
        tracking = store.shown
    mirror = Mirror(storage, record.path, [job.study_hash for job in jobs], tracking)
    rows = list({trial.key: trial for job in jobs for trial in job.rows}.values())
    budget = _budget(request, jobs)
    deadline = None if budget is None else time.monotonic() + budget
    try:
        with Display(console, rows, costs, pool.width, request.quiet) as display:

            def on_asked(job: Job, wanted: list[Wanted]) -> None:
                if publisher is not None:
                    publisher.expect(places(job.study_hash, wanted))

            def on_told(job: Job, entries: list[Entry]) -> None:
                mirror.tell(job.study_hash, entries)
                if publisher is not None and any(e.role == "shortlist" for e in entries):
                    publisher.notify(job.study_hash)  # The searches before it are whole.

            def on_cell(job: Job, cell: str, table: Table, verdicts: tuple[Verdict, ...]) -> None:
                for verdict in verdicts:
                    console.print(cell_line(verdict), highlight=False)
                for line in _mixtures(cell, table):
                    display.trouble(line)
                if publisher is not None:
                    publisher.notify(job.study_hash)

            def on_study(job: Job, table: Table, verdicts: tuple[Verdict, ...]) -> None:
                if not request.quiet:
                    result = result_of(record, job, table, verdicts)
                    for lines in (verdict_lines(result), ranking_lines(result), recipe_lines(result)):
                        if lines is not None:
                            console.print(lines)

            unfinished = run_jobs(
                jobs,
                suite,
                record,
                pool,
                width=pool.width,
                data=request.data,
                observer=display,
                on_asked=on_asked,
                on_told=on_told,
                on_cell=on_cell,
                on_study=on_study,
                cost_of=lambda trial: seconds_of(trial, costs),
                deadline=deadline,
            )
        pool.shutdown()
        # The page shows all that the folder holds, not only what this command ran.
        known = {**suite, **{job.study.name: job.study for job in jobs}}
        results = results_of(record, recorded_jobs(record, (), None, known), suite)
        report = linked(gather(results, request.runs), record, uri)
        page = write_report(report, request.runs / "report")
        drop_weights(request.runs, record, [job for job in jobs if job not in unfinished])
        if publisher is not None:
            files = [page, page.parent / "verdicts.json", page.parent / "rows.parquet"]
            for job in jobs:
                publisher.notify(job.study_hash, files)
            publisher.close()
            if (complete := linked(report, record, uri)) != report:
                write_report(complete, page.parent)
        mirror.close()
    except BaseException:
        # Whoever interrupts is not kept waiting: workers first, and what is not published stays recorded.
        pool.shutdown()
        if publisher is not None:
            publisher.close(timeout=0.5)
        mirror.close(timeout=0.5)
        raise
    console.print(claim_lines(report))
    new = f"{display.done} trained" if display.done else "nothing was trained"
    console.print(
        f"{new}, {display.reused_rows} reused, {display.diverged} diverged, {display.failed} failed",
        highlight=False,
    )
    for note in (*mirror.notes, publisher.problem if publisher is not None else ""):
        if note:
            print_note(console, note)
    for job in unfinished:
        console.print(
            f"[yellow]incomplete:[/] {job.study.name} ({job.preset}); the same command goes on",
            highlight=False,
        )
    console.print(f"report: {page}", highlight=False)
    if request.as_json:
        print(render_json(report), end="")
    # Under `auto` the full preset goes as far as its budget allows: being cut off is what was asked for.
    ended = {job.study_hash for job in jobs if job not in unfinished}
    incomplete = any(v.gate == "incomplete" for r in results if r.study_hash in ended for v in r.verdicts)
    return 1 if display.failed or incomplete or (unfinished and request.preset != "auto") else 0
