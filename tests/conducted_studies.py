"""What the tests of the one loop share: invented trainings, an executor, an observer, a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from bnbench.engine.back_ends import program_on
from bnbench.engine.conduct import conduct, train_rows
from bnbench.record import Record
from bnbench.study import Entry, Result, Study, Trial
from bnbench.study.programs import Program, programs_of
from bnbench.study.trial import trial_from
from tests.pilot_study import drive, invented, study


class Recorder:
    """An observer that remembers everything."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[tuple[str, str]] = []
        self.again: list[str] = []
        self.lines: list[str] = []

    def reused(self, trial: Trial) -> None:
        self.again.append(trial.key)

    def started(self, trial: Trial) -> None:
        self.begun.append(trial.key)

    def finished(self, trial: Trial, result: Result) -> None:
        self.ended.append((trial.key, result.status))

    def trouble(self, line: str) -> None:
        self.lines.append(line)


class Inline(Executor):
    """Trains at once in the caller, or, with an order, some other time when the loop waits."""

    def __init__(self, train: Callable[[Trial], Result] = invented, order: Random | None = None) -> None:
        self.train, self.order = train, order
        self.open: list[tuple[Future[list[Result]], list[Trial]]] = []
        self.most = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert fn is train_rows
        values, data, runs = args
        assert (Path(data), Path(runs).name) == (Path("data").absolute(), "runs")
        future: Future[Any] = Future()
        self.open.append((future, [trial_from(row) for row in values]))
        self.most = max(self.most, len(self.open))
        if self.order is None:
            self.finish_some()
        return future

    def finish_some(self) -> None:
        order = self.order or Random(0)
        order.shuffle(self.open)
        for _ in range(order.randint(1, len(self.open))):
            future, rows = self.open.pop()
            try:
                future.set_result([self.train(trial) for trial in rows])
            except Exception as error:
                future.set_exception(error)

    def wait(
        self, futures: Mapping[Future[Any], list[Trial]], **_: Any
    ) -> tuple[set[Future[Any]], set[Future[Any]]]:
        """In place of concurrent.futures.wait."""
        if not any(future.done() for future in futures):
            self.finish_some()
        ended = {future for future in futures if future.done()}
        return ended, set(futures) - ended


def run(
    record: Record,
    executor: Executor | None = None,
    *studies: Study,
    width: int = 3,
    observer: Recorder | None = None,
    deadline: float | None = None,
    back_ends: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[str], dict[str, list[Entry]]]:
    """Conduct studies as a suite does; returns who was cut off, and each program's lines by its name.

    `back_ends` are those of the cells in which it is not "single".
    """
    programs = named_programs(studies, back_ends)
    lines: dict[Any, list[Entry]] = {}

    def done(name: Any, entries: list[Entry]) -> None:
        assert name not in lines
        lines[name] = entries

    cut_off = conduct(
        programs,
        executor or Inline(),
        record,
        width=width,
        data=Path("data"),
        observer=observer or Recorder(),
        asked=lambda name, wanted: record.enroll(name[0], wanted),
        done=done,
        deadline=deadline,
    )
    assert {name for name, _ in programs} == set(lines) | set(cut_off)
    return cut_off, lines


def named_programs(
    studies: tuple[Study, ...], back_ends: Mapping[str, str]
) -> list[tuple[tuple[str, str, int], Program]]:
    return [
        ((the_study.name, cell, index), program_on(program, back_ends.get(cell, "single")))
        for the_study in studies or (study(),)
        for index, (cell, program) in enumerate(programs_of(the_study, "quick"))
    ]


def undisturbed(
    *studies: Study, back_ends: Mapping[str, str] = MappingProxyType({})
) -> dict[str, list[Entry]]:
    """What the programs give where nothing surrounds them."""
    return {name: drive(program)[0] for name, program in named_programs(studies, back_ends)}  # type: ignore[misc]


class Dying:
    """Trains, but kills the worker of some rows some times."""

    def __init__(self, times: int, fails: Callable[[Trial], bool]) -> None:
        self.times, self.fails = times, fails
        self.deaths: Counter[str] = Counter()

    def __call__(self, trial: Trial) -> Result:
        if self.fails(trial) and self.deaths[trial.key] < self.times:
            self.deaths[trial.key] += 1
            raise BrokenExecutor("died")
        return invented(trial)
