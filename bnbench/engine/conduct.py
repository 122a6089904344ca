"""The one loop: run all programs, train what the record lacks, and give each program what it asked for."""

from __future__ import annotations

import dataclasses
import time
import traceback
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bnbench.engine.waiting import Origin, Waiting
from bnbench.placement import device_here
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study.programs import Program, Wanted
from bnbench.study.table import Entry, Result
from bnbench.study.trial import Trial, trial_from

#: A row that kills its worker this often is recorded as failed.
DEATHS = 2


class Observer(Protocol):
    """What is told of the work as it goes on."""

    def reused(self, trial: Trial) -> None: ...
    def started(self, trial: Trial) -> None: ...
    def finished(self, trial: Trial, result: Result) -> None: ...
    def trouble(self, line: str) -> None: ...


@dataclass
class _Running:
    """A program between two of its requests."""

    name: Any
    program: Program
    origin: Origin
    missing: set[str] = field(default_factory=set)
    got: dict[str, Result] = field(default_factory=dict)


def train_row(values: Mapping[str, Any], data: str, runs: str) -> Result:
    """Train one row in a worker, on the devices that it was given; plain values cross the border."""
    return train_rows([values], data, runs)[0]


def train_rows(values: Sequence[Mapping[str, Any]], data: str, runs: str) -> list[Result]:
    """Train rows of one fleet together in a worker, or a single one as its back end says.

    Where an error ends a fleet, each of its rows is trained by itself, so that the fault is that of its row.
    """
    from bnbench.engine.replica import Place
    from bnbench.engine.train import train, train_fleet

    trials = [trial_from(row) for row in values]
    place = Place(Path(data), Path(runs), device_here())
    if trials[0].backend == "single":
        return [train(trial, place) for trial in trials]
    try:
        return train_fleet(trials, place)
    except BadInput:
        raise
    except Exception:
        if len(trials) == 1:
            return [Result("failed", reason=traceback.format_exc())]
    return [result for row in values for result in train_rows([row], data, runs)]


def conduct(
    programs: Sequence[tuple[Any, Program]],
    executor: Executor,
    record: Record,
    *,
    width: int,
    data: Path,
    observer: Observer,
    asked: Callable[[Any, list[Wanted]], None],
    done: Callable[[Any, list[Entry]], None],
    deadline: float | None = None,
) -> list[Any]:
    """Run programs to their end and return the names of those that a deadline cut off.

    Every row is looked up in the record by its key, and trained only where it is missing; equal rows of
    different programs are trained once. At most `width` tasks, each a row or a fleet of them, are with the
    executor at a time; :class:`bnbench.engine.waiting.Waiting` says which come first. A row that is to be
    trained alone waits until the programs of its name (those of one cell) wait for such rows only, or until
    nothing else is left; then all that is running ends first, and nothing else starts before it has ended.
    `asked` is told what a program asks for, `done` gets each finished program's lines of the table.
    `deadline` is a time of `time.monotonic()` after which no further row is started.
    """
    # A worker may start elsewhere.
    places = str(data.absolute()), str(record.path.parent.absolute())
    waiting: dict[str, list[_Running]] = {}
    in_flight: dict[Future[list[Result]], list[Trial]] = {}
    deaths: Counter[str] = Counter()
    failed: dict[str, Result] = {}
    ready = Waiting()
    alone: list[tuple[int, Trial]] = []
    begun: set[str] = set()
    # How many rows that need not be alone the programs of a name wait for.
    in_company: Counter[Any] = Counter()
    first = {name: order for order, (name, _) in reversed(list(enumerate(programs)))}
    unfinished = {
        order: _Running(name, program, Origin(first[name], order, 0))
        for order, (name, program) in enumerate(programs)
    }

    def ask(state: _Running, send: dict[str, Result] | None) -> None:
        """Move a program on until it needs a row that is not there."""
        while True:
            try:
                wanted = next(state.program) if send is None else state.program.send(send)
            except StopIteration as stop:
                del unfinished[state.origin.program]
                done(state.name, stop.value)
                return
            asked(state.name, wanted)
            state.origin = dataclasses.replace(state.origin, request=state.origin.request + 1)
            keys = {row.trial.key: row.trial for row in wanted}
            found = {k: r for k, r in record.recall(keys).items() if r.status != "failed"}
            found |= {k: failed[k] for k in keys if k in failed}
            for key in found:
                observer.reused(keys[key])
            state.got = found
            state.missing = set(keys) - set(found)
            if not state.missing:
                send = state.got
                continue
            # In the program's order: rows on the same data follow each other, and workers keep it.
            for key in (key for key in keys if key in state.missing):
                trial = keys[key]
                if key not in waiting and trial.alone:
                    insort(alone, (state.origin.program, trial), key=lambda item: item[0])
                elif key not in waiting:
                    ready.add(state.origin, trial)
                waiting.setdefault(key, []).append(state)
                in_company[state.name] += not trial.alone
            return

    def settle(rows: Sequence[Trial], results: Sequence[Result]) -> None:
        # All of a task first, since to go on with a program may take long and be interrupted.
        for line in record.append(zip(rows, results, strict=True)):
            observer.trouble(line)
        for trial, result in zip(rows, results, strict=True):
            if result.status == "failed":
                failed[trial.key] = result
            observer.finished(trial, result)
            for state in waiting.pop(trial.key):
                state.got[trial.key] = result
                state.missing.discard(trial.key)
                in_company[state.name] -= not trial.alone
                if not state.missing:
                    ask(state, state.got)

    def next_rows() -> list[Trial]:
        """The rows to start now, if there are any."""
        idle = width - len(in_flight)
        if idle <= 0 or any(trial.alone for rows in in_flight.values() for trial in rows):
            return []
        if deadline is not None and time.monotonic() >= deadline:
            return []
        for number, (_, trial) in enumerate(alone):
            if not ready or any(not in_company[state.name] for state in waiting[trial.key]):
                return [] if in_flight else [alone.pop(number)[1]]
        return ready.take(idle)

    def start(rows: list[Trial]) -> None:
        task: Callable[..., list[Result]] = train_rows  # `devices` is for the executor
        values = [trial.as_dict() for trial in rows]
        in_flight[executor.submit(task, values, *places, devices=rows[0].devices)] = rows

    for state in list(unfinished.values()):
        ask(state, None)
    while ready or alone or in_flight:
        while rows := next_rows():
            for trial in rows:
                if trial.key not in begun:
                    begun.add(trial.key)
                    observer.started(trial)
            start(rows)
        if not in_flight:
            break
        finished, _ = wait(in_flight, timeout=1.0, return_when=FIRST_COMPLETED)
        refused: BadInput | None = None
        for future in finished:
            rows = in_flight.pop(future)
            trial = rows[0]
            error = future.exception()
            if error is None:
                settle(rows, future.result())
            elif isinstance(error, BrokenExecutor) and len(rows) > 1:
                # Nobody knows whose fault it was.
                observer.trouble(
                    f"the worker of {len(rows)} rows died, {trial.key} the first; each is trained by itself"
                )
                ready.add_again(rows)
            elif isinstance(error, BrokenExecutor):
                deaths[trial.key] += 1
                if deaths[trial.key] < DEATHS:
                    observer.trouble(f"the worker of row {trial.key} died; the row is trained again")
                    start(rows)
                else:
                    settle(rows, [killed(trial)])
            elif isinstance(error, BadInput):
                refused = error  # what else has ended is recorded first
            else:
                settle(rows, [Result("failed", reason=f"{type(error).__name__}: {error}")] * len(rows))
        if refused is not None:
            raise refused
    return [state.name for state in unfinished.values()]


def killed(trial: Trial) -> Result:
    """The result of a row that kills its worker, with the sizes that may be too large."""
    sizes = ", ".join(
        f"{f.name}={getattr(trial, f.name)!r}"
        for f in dataclasses.fields(trial)
        if f.name in ("data", "model", "model_options", "norm", "batch_size")
    )
    return Result("failed", reason=f"the row killed its worker {DEATHS} times (out of memory?): {sizes}")
