"""The one loop: run all programs, train what the record lacks, and give each program what it asked for."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bnbench.placement import device_here
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study.programs import Program, Wanted
from bnbench.study.table import Entry, Result
from bnbench.study.trial import Trial

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
    order: int
    missing: set[str] = field(default_factory=set)
    got: dict[str, Result] = field(default_factory=dict)


def train_row(values: Mapping[str, Any], data: str, runs: str) -> Result:
    """Train one row in a worker, on the devices that it was given; plain values cross the border."""
    from bnbench.engine.train import Place, train
    from bnbench.study.trial import trial_from

    return train(trial_from(values), Place(Path(data), Path(runs), device_here()))


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
    different programs are trained once. At most `width` rows are with the executor at a time, those of
    earlier programs first. A row that is to be trained alone waits until the programs of its name (those of
    one cell) wait for such rows only, or until nothing else is left; then all that is running ends first, and
    nothing else starts before it has ended. `asked` is told what a program asks for, `done` gets each
    finished program's lines of the table. `deadline` is a time of `time.monotonic()` after which no further
    row is started.
    """
    # A worker may start elsewhere.
    places = str(data.absolute()), str(record.path.parent.absolute())
    trials: dict[str, Trial] = {}
    waiting: dict[str, list[_Running]] = {}
    in_flight: dict[Future[Result], Trial] = {}
    deaths: dict[str, int] = {}
    failed: dict[str, Result] = {}
    ready: list[tuple[int, str]] = []
    alone: list[tuple[int, str]] = []
    # How many rows that need not be alone the programs of a name wait for.
    in_company: Counter[Any] = Counter()
    unfinished = {order: _Running(name, program, order) for order, (name, program) in enumerate(programs)}

    def ask(state: _Running, send: dict[str, Result] | None) -> None:
        """Move a program on until it needs a row that is not there."""
        while True:
            try:
                wanted = next(state.program) if send is None else state.program.send(send)
            except StopIteration as stop:
                del unfinished[state.order]
                done(state.name, stop.value)
                return
            asked(state.name, wanted)
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
                if key not in waiting:
                    trials[key] = keys[key]
                    (alone if keys[key].alone else ready).append((state.order, key))
                waiting.setdefault(key, []).append(state)
                in_company[state.name] += not keys[key].alone
            for rows in (ready, alone):
                rows.sort(key=lambda item: item[0])
            return

    def settle(trial: Trial, result: Result) -> None:
        for line in record.append([(trial, result)]):
            observer.trouble(line)
        if result.status == "failed":
            failed[trial.key] = result
        observer.finished(trial, result)
        for state in waiting.pop(trial.key):
            state.got[trial.key] = result
            state.missing.discard(trial.key)
            in_company[state.name] -= not trial.alone
            if not state.missing:
                ask(state, state.got)

    def next_key() -> str | None:
        """The row to start now, if there is one."""
        if len(in_flight) >= width or any(trial.alone for trial in in_flight.values()):
            return None
        if deadline is not None and time.monotonic() >= deadline:
            return None
        for item in alone:
            if not ready or any(not in_company[state.name] for state in waiting[item[1]]):
                if in_flight:
                    return None
                alone.remove(item)
                return item[1]
        return ready.pop(0)[1] if ready else None

    def start(trial: Trial) -> None:
        task: Callable[..., Result] = train_row  # `devices` is for the executor
        future = executor.submit(task, trial.as_dict(), *places, devices=trial.devices)
        in_flight[future] = trial

    for state in list(unfinished.values()):
        ask(state, None)
    while ready or alone or in_flight:
        while (key := next_key()) is not None:
            trial = trials.pop(key)
            observer.started(trial)
            start(trial)
        if not in_flight:
            break
        finished, _ = wait(in_flight, timeout=1.0, return_when=FIRST_COMPLETED)
        refused: BadInput | None = None
        for future in finished:
            trial = in_flight.pop(future)
            error = future.exception()
            if error is None:
                settle(trial, future.result())
            elif isinstance(error, BrokenExecutor):
                deaths[trial.key] = deaths.get(trial.key, 0) + 1
                if deaths[trial.key] < DEATHS:
                    observer.trouble(f"the worker of row {trial.key} died; the row is trained again")
                    start(trial)
                else:
                    settle(trial, killed(trial))
            elif isinstance(error, BadInput):
                refused = error  # what else has ended is recorded first
            else:
                settle(trial, Result("failed", reason=f"{type(error).__name__}: {error}"))
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
