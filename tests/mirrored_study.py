"""A study that searches, run without training, and what an Optuna storage shows of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna

from bnbench.engine.mirror import Mirror
from bnbench.engine.search import draw
from bnbench.engine.storage import open_storage
from bnbench.engine.suite import overheard
from bnbench.record import Record
from bnbench.study import Arm, Choice, Entry, Range, Result, Study, Trial
from bnbench.study.programs import Wanted, programs_of
from tests.pilot_study import CELLS, design, invented, study

SPACE = (
    Range("lr", 0.01, 1.0),
    Choice("batch size", {"16": {"batch_size": 16, "steps": 32}, "32": {"batch_size": 32, "steps": 16}}),
)
ARMS = (Arm("none", norm="none"), Arm("batch", space=SPACE))
SEARCH_1 = "pilot/quick · mlp · batch · search 1"
GRID = "pilot/quick · mlp · none"


def searching(**changes: Any) -> Study:
    """A study of one cell with an arm on the grid and one that is searched twice."""
    values = {"cells": CELLS[:1], "arms": ARMS, "tuning": "once", "trials": 10, "batch": 4, "searches": 2}
    return study(quick=design(**{**values, **changes}))


def trained(trial: Trial) -> Result:
    """An invented result with a time and a curve."""
    result = invented(trial)
    at = 1.7e9 + int(trial.key, 16) % 1000
    curve = {"step": (1.0, 8.0), "val/acc": (0.25, math.nan)}
    return dataclasses.replace(result, curve=curve, provenance={"started": at, "finished": at + 2.5})


def conduct(
    record: Record, mirror: Mirror, the_study: Study, train: Callable[[Trial], Result] = trained
) -> Iterator[None]:
    """Run a study's programs in turns, one request of each at a time, and tell the mirror."""
    study_hash = the_study.hash("quick")
    record.register(study_hash, the_study.definition("quick"))

    def tell(entries: list[Entry]) -> None:
        mirror.tell(study_hash, entries)

    programs = [overheard(program, tell) for _, program in programs_of(the_study, "quick", draw)]
    asked: dict[int, list[Wanted]] = {number: next(program) for number, program in enumerate(programs)}
    while asked:
        for number, wanted in list(asked.items()):
            record.enroll(study_hash, wanted)
            missing = {row.trial.key: row.trial for row in wanted}
            there = {k: r for k, r in record.recall(missing).items() if r.status != "failed"}
            new = {key: train(trial) for key, trial in missing.items() if key not in there}
            record.append([(missing[key], result) for key, result in new.items()])
            try:
                asked[number] = programs[number].send({**there, **new})
            except StopIteration:
                del asked[number]
            yield


def run(
    runs: Path,
    the_study: Study,
    *,
    storage: str | None = None,
    requests: int = 1000,
    train: Callable[[Trial], Result] = trained,
    tracking: str | None = None,
) -> list[str]:
    """What a command does: as many requests as said, then the end. Returns the notes."""
    opened = open_storage(storage, runs)
    record = Record(runs / "bnbench.db")
    mirror = Mirror(opened, record.path, [the_study.hash("quick")], tracking)
    for _ in zip(range(requests), conduct(record, mirror, the_study, train), strict=False):
        pass
    mirror.close()
    record.close()
    return mirror.notes


def shown(storage: str | Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """All trials of a storage, read by Optuna's own means, by the names of their studies."""
    read: Any = str(storage)
    if isinstance(storage, Path):
        read = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    return {
        name: optuna.load_study(study_name=name, storage=read).trials
        for name in optuna.get_all_study_names(read)
    }


def brief(trials: list[optuna.trial.FrozenTrial]) -> list[tuple[Any, ...]]:
    return [(t.user_attrs["row"], t.value, t.params, t.state.name) for t in trials]


def lines(runs: Path, the_study: Study, arm: str) -> list[Entry]:
    record = Record(runs / "bnbench.db")
    try:
        return list(record.table(the_study.hash("quick")).of(arm=arm, roles=["tune", "sweep"]))
    finally:
        record.close()
