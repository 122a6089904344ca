"""Which studies a command asks for, and at which presets: by name, by file, or with data of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bnbench.cli.questions import asked_in, read_questions, write_question
from bnbench.data import DATASETS
from bnbench.engine.back_ends import FLEETS
from bnbench.engine.suite import Job, prepare
from bnbench.registry import BadInput, check_choice, nearest
from bnbench.study.load import load_study
from bnbench.study.question import Question
from bnbench.study.reading import reads_target
from bnbench.study.spec import Study

if TYPE_CHECKING:
    from bnbench.cli.run import Request

Note = Callable[[str], None]
Check = Callable[[Study, str], Job]


@dataclass(frozen=True)
class AskedJob(Job):
    """A study that asks a question, with the word for the one whose design it has."""

    word: str
    question: Question


def presets_of(request: Request, has_gpus: bool) -> list[str]:
    """The presets to run, the first one first; a question is asked at full size only where that is named."""
    if request.preset == "auto":
        return ["quick", "full"] if has_gpus and request.question is None else ["quick"]
    if request.preset not in ("quick", "full", "smoke"):
        raise BadInput(
            f"no preset named {request.preset!r}{nearest(request.preset, ('auto', 'quick', 'full', 'smoke'))}"
        )
    return [request.preset]


def jobs_for(
    request: Request, presets: Sequence[str], suite: Mapping[str, Study], on_gpu: bool, note: Note
) -> list[Job]:
    """The studies that were asked for, checked, at each preset; `note` is told what was left out."""
    check_choice("--fleet", request.fleet, FLEETS)
    check = partial(prepare, fleet=request.fleet, on_gpu=on_gpu)
    if request.question is None:
        return _prepare(request, presets, suite, check)
    jobs: list[Job] = []
    problem = ""
    for preset in presets:
        for word, study in _choose(request.words, suite).items():
            try:
                jobs.append(_ask(word, study, request.question, preset, check, note))
            except BadInput as error:
                problem = f"{word}: {error}" if word.endswith(".py") else str(error)
                if request.words:
                    raise BadInput(problem) from None
                note(f"left out: {problem}")
    if not jobs:
        raise BadInput(f"no study can be asked {request.question.words}; the last one: {problem}")
    return jobs


def _ask(word: str, study: Study, question: Question, preset: str, check: Check, note: Note) -> AskedJob:
    if question.target is not None and not reads_target(study, preset):
        question = replace(question, target=None)
        if question == Question():
            raise BadInput(f"--target changes nothing in study {study.name!r}, which counts to no target")
    asked, notes = asked_in(study, question, preset)
    for text in notes:
        note(f"{asked.name}: {text}")
    job = check(asked, preset)
    return AskedJob(job.study, job.preset, job.study_hash, job.rows, word, question, back_ends=job.back_ends)


def write_questions(jobs: Sequence[Job], runs: Path) -> None:
    """Write down the questions among some jobs, so that reports find them."""
    for job in jobs:
        if isinstance(job, AskedJob):
            write_question(runs, job.word, job.study, job.preset, job.question)


def with_enough_data(jobs: Sequence[Job], request: Request, note: Note) -> list[Job]:
    """Refuse questions with fewer samples than a row takes; if no study was named, leave them out."""
    enough = []
    problem = ""
    for job in jobs:
        problem = _too_few(job, request) if isinstance(job, AskedJob) else ""
        if problem and request.words:
            raise BadInput(problem)
        if problem:
            note(f"left out: {problem}")
        else:
            enough.append(job)
    if jobs and not enough:
        raise BadInput(problem)
    return enough


def _too_few(job: AskedJob, request: Request) -> str:
    if job.question.data is None and not job.question.changes:
        return ""
    sizes: dict[str, int] = {}
    for row in job.rows:
        if request.dry_run and DATASETS[row.data].fetch is not None:
            continue  # A plan downloads nothing.
        place = repr((row.data, row.data_options))
        if place not in sizes:
            parts = DATASETS[row.data].read(row.data_seed, request.data, **row.data_options)
            sizes[place] = len(parts.train.y)
        there = sizes[place]
        used = min(there, row.n_train or there)
        for name, count, most, remedy in (
            ("n_train", row.n_train, there, f" or --set n_train={there} where no arm sets it"),
            ("batch_size", row.global_batch, used, f" or --set batch_size={used} where no arm sets it"),
            ("reference_size", row.norm_options.get("reference_size"), used, ""),
        ):
            if (count or 0) > most:
                return (
                    f"study {job.study.name!r} trains rows with {name} {count}, and {row.data} has {most}"
                    f" training samples for them; give more{remedy}"
                )
    return ""


def _prepare(request: Request, presets: Sequence[str], suite: Mapping[str, Study], check: Check) -> list[Job]:
    """Check every row of every study, and name the file of one that cannot be."""
    known = [word for word in request.words if word in suite or word.endswith(".py") or "/" in word]
    questions = read_questions(request.runs) if len(known) < len(request.words) else {}
    asked = {name: study for (name, _), study in questions.items()}
    jobs = []
    for preset in presets:
        for word, study in _choose(request.words, suite, asked).items():
            if study.name in asked:
                if (study.name, preset) not in questions:
                    raise BadInput(f"{word!r} was not asked at the preset {preset}; give another --preset")
                study = questions[study.name, preset]
            try:
                jobs.append(check(study, preset))
            except BadInput as error:
                raise BadInput(f"{word}: {error}" if word.endswith(".py") else str(error)) from None
    return jobs


def _choose(
    words: Sequence[str], suite: Mapping[str, Study], asked: Mapping[str, Study] | None = None
) -> dict[str, Study]:
    """The studies by the word that named each, every one once."""
    if not words:
        return dict(suite)
    chosen: dict[str, Study] = {}
    for word in words:
        study = (asked or {}).get(word) or load_study(word)
        if suite.get(study.name, study) is not study:
            raise BadInput(f"{word}: the project has a study named {study.name!r}; give yours another name")
        if all(study is not other for other in chosen.values()):
            chosen[word] = study
    return chosen
