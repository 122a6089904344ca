"""Tests of rows that are trained alone: nothing runs beside them, and nobody waits for them in vain."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnbench.engine import conduct as conduct_module
from bnbench.engine.conduct import conduct
from bnbench.record import Record
from bnbench.study import Result, Study, Trial
from bnbench.study.programs import Wanted, measure, programs_of
from bnbench.study.trial import trial_from
from tests.conducted_studies import Dying, Inline, Recorder, run, undisturbed
from tests.pilot_study import design, invented, study


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    record = Record(tmp_path / "runs" / "bnbench.db")
    yield record
    record.close()


class Watched(Inline):
    """Trains in any order and remembers what ran beside what; `log` has each row that began."""

    def __init__(self, order: Random, train: Callable[[Trial], Result] = invented) -> None:
        super().__init__(train, order)
        self.log: list[Trial] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        (trial,) = map(trial_from, args[0])
        beside = [other for _, rows in self.open for other in rows]
        assert not beside or not (trial.alone or any(other.alone for other in beside))
        self.log.append(trial)
        return super().submit(fn, *args, **kwargs)


def watch(record: Record, executor: Watched, *studies: Study, **more: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct_module, "wait", executor.wait)
        return run(record, executor, *studies, **more)


def timed_study(tuning: str = "per_replicate", **changes: Any) -> Study:
    return study(quick=design(tuning=tuning, timing_steps=5), **changes)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), width=st.integers(1, 12), once=st.booleans())
def test_a_row_that_is_to_be_alone_is_and_all_the_same_is_trained_once(
    tmp_path_factory: pytest.TempPathFactory, seed: int, width: int, once: bool
) -> None:
    the_study = timed_study("once" if once else "per_replicate")
    record = Record(tmp_path_factory.mktemp("r") / "runs" / "bnbench.db")
    executor = Watched(Random(seed))
    cut_off, lines = watch(record, executor, the_study, width=width)
    expected = undisturbed(the_study)
    assert cut_off == [] and lines == expected
    assert len({trial.key for trial in executor.log}) == len(executor.log)
    assert any(trial.alone for trial in executor.log) and (width == 1 or executor.most > 1)
    record.close()


def test_rows_that_are_to_be_alone_wait_for_their_cell_and_not_for_all_others(record: Record) -> None:
    """So a deadline leaves whole cells, and the workers stand idle once a cell."""
    the_study = timed_study("once")
    executor = Watched(Random(3))
    watch(record, executor, the_study, width=4)
    cells = [(trial.model, trial.alone) for trial in executor.log]
    first, second = ([place for place in cells if place[0] == model] for model in ("mlp", "cnn"))
    assert first == sorted(first) and second == sorted(second)
    assert cells.index(("cnn", False)) < cells.index(("mlp", True))
    lone, ordinary = (max(i for i, one in enumerate(cells) if one == place)
                      for place in (("mlp", True), ("cnn", False)))  # fmt: skip
    assert lone < ordinary


def test_programs_of_one_name_have_their_lone_rows_trained_together(record: Record) -> None:
    executor = Watched(Random(5))
    programs = programs_of(timed_study(), "quick")  # two replicates of each cell, named by the cell
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct_module, "wait", executor.wait)
        cut_off = conduct(
            programs,
            executor,
            record,
            width=3,
            data=Path("data"),
            observer=Recorder(),
            asked=lambda name, wanted: None,
            done=lambda name, entries: None,
        )
    assert cut_off == []
    turns = [(trial.model, trial.alone) for trial in executor.log]
    changes = [turn for i, turn in enumerate(turns) if turn[1] and (i == 0 or turns[i - 1] != turn)]
    assert sorted(changes) == [("cnn", True), ("mlp", True)]


def test_a_program_that_waits_for_lone_rows_only_gets_them(record: Record) -> None:
    rows = [Trial(steps=4, seed=seed, alone=True) for seed in range(3)]
    wanted = [Wanted("c", "a", trial.seed, "timing", trial) for trial in rows]
    executor, lines = Watched(Random(0)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct_module, "wait", executor.wait)
        conduct(
            [("lone", measure(wanted))],
            executor,
            record,
            width=8,
            data=Path("data"),
            observer=Recorder(),
            asked=lambda name, wanted: None,
            done=lambda name, entries: lines.extend(entries),
        )
    assert executor.log == [entry.trial for entry in lines] == rows


def test_a_lone_row_whose_worker_died_is_trained_again_alone(record: Record) -> None:
    def lone(trial: Trial) -> bool:
        return trial.alone

    the_study = timed_study()
    executor = Watched(Random(7), Dying(1, lone))
    assert watch(record, executor, the_study, width=4)[1] == undisturbed(the_study)
    counts = Counter(trial.key for trial in executor.log if trial.alone)
    assert set(counts.values()) == {2}
    for trial, result in record.rows():
        assert result.status == "done", trial


def test_a_deadline_starts_no_lone_row_and_the_next_run_goes_on(record: Record) -> None:
    the_study = timed_study("once")

    def slow(trial: Trial) -> Result:
        time.sleep(0.005)
        return invented(trial)

    cut_off, _ = watch(record, Watched(Random(1), slow), the_study, deadline=time.monotonic() + 0.15)
    assert cut_off
    assert watch(record, Watched(Random(2)), the_study)[1] == undisturbed(the_study)
    idle = Watched(Random(3))
    assert watch(record, idle, the_study, deadline=time.monotonic())[0] == [] and idle.log == []
