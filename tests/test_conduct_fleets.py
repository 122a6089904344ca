"""Tests of rows that are trained in fleets: how they are cut, and that no result depends on it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnbench.engine import conduct as conduct_module
from bnbench.engine import waiting as waiting_module
from bnbench.engine.back_ends import program_on
from bnbench.engine.conduct import conduct, train_rows
from bnbench.engine.executors import LocalPool
from bnbench.engine.fleet import FLEET_SIZE, fleet_shape
from bnbench.engine.waiting import Origin, Waiting
from bnbench.placement import plan_workers
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study import Cell, Result, Study, Trial
from bnbench.study.programs import Wanted, measure, programs_of
from bnbench.study.trial import trial_from
from tests.conducted_studies import Dying, Inline, Recorder, run, undisturbed
from tests.pilot_study import design, invented, study

#: One cell in fleets, the other not.
BACK_ENDS = {"mlp": "eager"}


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    record = Record(tmp_path / "runs" / "bnbench.db")
    yield record
    record.close()


class Watched(Inline):
    """Trains in any order and remembers what was trained together; `tasks` has each of them."""

    def __init__(self, order: Random, train: Callable[[Trial], Result] = invented) -> None:
        super().__init__(train, order)
        self.tasks: list[list[Trial]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        rows = [trial_from(row) for row in args[0]]
        beside = [other for _, others in self.open for other in others]
        assert not beside or not any(trial.alone for trial in (*rows, *beside))
        assert len({fleet_shape(row) for row in rows}) == 1 and len(rows) <= FLEET_SIZE
        assert len(rows) == 1 or rows[0].backend != "single"
        self.tasks.append(rows)
        return super().submit(fn, *args, **kwargs)

    def wait(self, futures: Mapping[Future[Any], list[Trial]], **_: Any) -> Any:
        return super().wait(futures)


def watch(record: Record, executor: Inline, *studies: Study, **more: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct_module, "wait", executor.wait)
        return run(record, executor, *studies, back_ends=BACK_ENDS, **more)


def timed_study(replicates: int = 7, **changes: Any) -> Study:
    return study(quick=design(timing_steps=5, replicates=replicates, **changes))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), width=st.integers(1, 12), once=st.booleans())
def test_nothing_depends_on_how_rows_are_put_together(
    tmp_path_factory: pytest.TempPathFactory, seed: int, width: int, once: bool
) -> None:
    the_study = timed_study(tuning="once" if once else "per_replicate")
    record = Record(tmp_path_factory.mktemp("r") / "runs" / "bnbench.db")
    executor, observer = Watched(Random(seed)), Recorder()
    cut_off, lines = watch(record, executor, the_study, width=width, observer=observer)
    expected = undisturbed(the_study, back_ends=BACK_ENDS)
    assert cut_off == [] and lines == expected and executor.most <= width
    keys = {entry.trial.key for entries in expected.values() for entry in entries}
    assert Counter(row.key for rows in executor.tasks for row in rows) == dict.fromkeys(keys, 1)
    assert Counter(observer.begun) == Counter(key for key, _ in observer.ended) == dict.fromkeys(keys, 1)
    assert {trial.key for trial, _ in record.rows()} == keys
    record.close()


def test_fleets_are_full_where_there_are_rows_enough(record: Record) -> None:
    """A cell's tunings come first, since only then all that is confirmed is there."""
    executor = Watched(Random(1))
    cells = (Cell("mlp"), Cell("another", data="digits"))
    programs = programs_of(study(quick=design(replicates=32, cells=cells), hypotheses=()), "quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct_module, "wait", executor.wait)
        conduct(
            [(cell, program_on(program, "eager")) for cell, program in sorted(programs, key=lambda p: p[0])],
            executor,
            record,
            width=1,
            data=Path("data"),
            observer=Recorder(),
            asked=lambda name, wanted: None,
            done=lambda name, entries: None,
        )
    kinds = [(rows[0].data, rows[0].score_on, len(rows)) for rows in executor.tasks]
    tuned = 3 * 3 * 32 // FLEET_SIZE
    for data, there in itertools.groupby(kinds, key=lambda kind: kind[0]):
        _, scored, sizes = zip(*there, strict=True)
        assert (data, *sizes[:tuned]) == (data, *[FLEET_SIZE] * tuned)
        assert scored == ("val",) * tuned + ("test",) * (len(sizes) - tuned)
        assert len(sizes) - tuned <= sum(sizes[tuned:]) / FLEET_SIZE + 3
    assert len(list(itertools.groupby(kinds, key=lambda kind: kind[0]))) == 2


def one(number: int, norm: str = "batch", back_end: str = "eager") -> Trial:
    return Trial(seed=number, norm=norm, backend=back_end)


def taken(ready: Waiting, idle: int = 1) -> list[list[Trial]]:
    """All tasks, in their order; every one that is taken keeps a worker busy."""
    tasks = []
    while ready:
        tasks.append(ready.take(max(1, idle - len(tasks))))
    return tasks


@pytest.mark.parametrize(
    ("rows", "idle", "back_end", "sizes"),
    [
        (FLEET_SIZE, 1, "eager", [16]),
        (FLEET_SIZE + 4, 1, "eager", [10, 10]),
        (2 * FLEET_SIZE + 1, 1, "eager", [11, 11, 11]),
        (FLEET_SIZE, 2, "eager", [8, 8]),
        (FLEET_SIZE, 2, "compiled", [16]),
        (5, 4, "eager", [2, 1, 1, 1]),
        (3, 8, "eager", [1, 1, 1]),
        (3, 8, "single", [1, 1, 1]),
        (0, 2, "eager", []),
    ],
)
def test_rows_of_a_shape_are_cut_in_nearly_equal_fleets(
    rows: int, idle: int, back_end: str, sizes: list[int]
) -> None:
    ready = Waiting()
    for number in range(rows):
        ready.add(Origin(0, number, 1), one(number, back_end=back_end))
    tasks = taken(ready, idle)
    assert [len(task) for task in tasks] == sizes
    assert [trial.seed for task in tasks for trial in task] == list(range(rows))


def test_idle_workers_are_shared_out_by_the_number_of_rows() -> None:
    ready = Waiting()
    for number in range(8):
        ready.add(Origin(0, 0, 1), one(number))
        ready.add(Origin(0, 0, 1), one(number, "layer"))
    ready.add(Origin(1, 1, 1), one(0, back_end="single"))
    assert sorted(map(len, taken(ready, 5))) == [1, 4, 4, 4, 4]


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 9),
            st.integers(1, 3),
            st.sampled_from(["batch", "layer"]),
            st.sampled_from(["single", "eager"]),
        ),
        max_size=60,
    ),
    st.integers(1, 9),
)
def test_every_row_that_waits_is_taken_once(rows: list[tuple[int, int, int, str, str]], idle: int) -> None:
    ready = Waiting()
    for number, (cell, program, request, norm, back_end) in enumerate(rows):
        ready.add(Origin(10 * cell, 10 * cell + program, request), one(number, norm, back_end))
    tasks = taken(ready, idle)
    assert sorted(trial.seed for task in tasks for trial in task) == list(range(len(rows)))
    for task in tasks:
        assert len({fleet_shape(trial) for trial in task}) == 1 and len(task) <= FLEET_SIZE
        assert len(task) == 1 or task[0].backend == "eager"
    assert ready.take(idle) == []


def fill(ready: Waiting, count: int, origin: Origin, norm: str, back_end: str = "eager") -> None:
    for number in range(count):
        ready.add(origin, one(number, norm, back_end))


def test_full_fleets_of_a_cell_come_before_its_smaller_ones_and_after_those_of_earlier_cells() -> None:
    ready = Waiting()
    fill(ready, FLEET_SIZE, Origin(7, 7, 1), "rms")
    fill(ready, 2, Origin(0, 0, 1), "batch")
    fill(ready, FLEET_SIZE, Origin(0, 3, 1), "layer")
    fill(ready, 1, Origin(0, 2, 1), "none", "single")
    assert [task[0].norm for task in taken(ready)] == ["none", "layer", "batch", "rms"]


def test_what_can_make_other_fleets_larger_comes_first() -> None:
    """A program that still tunes will ask for rows that are confirmed beside those of programs before it."""
    ready = Waiting()
    fill(ready, 5, Origin(0, 0, 2), "batch")
    fill(ready, 3, Origin(0, 4, 1), "layer")
    assert [task[0].norm for task in taken(ready)] == ["layer", "batch"]


def test_a_fleet_takes_rows_of_its_shape_from_later_cells_too() -> None:
    ready = Waiting()
    fill(ready, 3, Origin(0, 0, 1), "batch")
    for number in range(3, 6):
        ready.add(Origin(5, 5, 1), Trial(seed=number, label_noise=0.2, backend="eager"))
    (task,) = taken(ready)
    assert len(task) == 6


def test_rows_of_a_fleet_whose_worker_died_are_trained_each_by_itself(record: Record) -> None:
    """The one that kills its worker is recorded as failed; nothing happens to the others."""

    def fatal(trial: Trial) -> bool:
        return trial.backend == "eager" and trial.norm == "group" and trial.lr == 0.1 and trial.seed == 3

    the_study = timed_study()
    executor, observer = Watched(Random(3), Dying(99, fatal)), Recorder()
    cut_off, lines = watch(record, executor, the_study, width=2, observer=observer)
    assert cut_off == []
    killers = {trial.key for trial, result in record.rows() if result.status == "failed"}
    assert killers == {e.trial.key for entries in lines.values() for e in entries if fatal(e.trial)}
    (reason,) = {result.reason for _, result in record.rows() if result.status == "failed"}
    assert "killed its worker 2 times" in reason and "norm='group'" in reason
    died = [rows for rows in executor.tasks if len(rows) > 1 and any(map(fatal, rows))]
    assert len(died) == 1
    alone = Counter(rows[0].key for rows in executor.tasks if len(rows) == 1)
    assert {alone[row.key] for row in died[0] if not fatal(row)} == {1}
    assert {alone[key] for key in killers} == {2}
    first, second = observer.lines
    assert f"{len(died[0])} rows" in first and died[0][0].key in first
    assert killers == {key for key in alone if key in second}
    assert Counter(observer.begun) == Counter(key for key, _ in observer.ended)
    assert set(Counter(observer.begun).values()) == {1}


def test_a_worker_that_dies_once_changes_no_result(record: Record) -> None:
    the_study = timed_study()
    executor = Watched(Random(5), Dying(1, lambda trial: True))
    _, lines = watch(record, executor, the_study, width=3)
    assert lines == undisturbed(the_study, back_ends=BACK_ENDS)


def fleet_of(count: int) -> list[dict[str, Any]]:
    return [Trial(data="digits", steps=2, seed=seed, backend="eager").as_dict() for seed in range(count)]


def test_an_error_that_ends_a_fleet_is_that_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trials: Sequence[Trial], place: object) -> list[Result]:
        if any(trial.seed == 2 for trial in trials):
            raise ZeroDivisionError("no way")
        return [invented(trial) for trial in trials]

    monkeypatch.setattr("bnbench.engine.train.train_fleet", broken)
    results = train_rows(fleet_of(4), "data", "runs")
    assert [result.status for result in results] == ["done", "done", "failed", "done"]
    assert results[3] == invented(trial_from(fleet_of(4)[3]))
    assert results[2].reason.startswith("Traceback") and results[2].brief == "ZeroDivisionError: no way"


def test_bad_input_in_a_fleet_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(trials: Sequence[Trial], place: object) -> list[Result]:
        raise BadInput("digits are not there")

    monkeypatch.setattr("bnbench.engine.train.train_fleet", refusing)
    with pytest.raises(BadInput, match=r"^digits are not there$"):
        train_rows(fleet_of(2), "data", "runs")


def test_an_interrupt_loses_only_what_was_being_trained(record: Record) -> None:
    """All rows of a fleet are recorded before any program goes on."""
    the_study = timed_study(replicates=20)
    trained: list[str] = []

    def interrupted(trial: Trial) -> Result:
        if len(trained) == 70:
            raise KeyboardInterrupt
        trained.append(trial.key)
        return invented(trial)

    with pytest.raises(KeyboardInterrupt):
        watch(record, Watched(Random(1), interrupted), the_study, width=1)
    recorded = {trial.key for trial, _ in record.rows()}
    assert 70 - FLEET_SIZE < len(recorded) <= 70
    observer = Recorder()
    _, lines = watch(record, Watched(Random(2)), the_study, observer=observer)
    assert lines == undisturbed(the_study, back_ends=BACK_ENDS)
    assert not recorded & set(observer.begun)


def test_a_program_that_is_interrupted_finds_the_whole_fleet_recorded(record: Record) -> None:
    rows = [Trial(steps=4, seed=seed, backend="eager") for seed in range(6)]

    def stop(name: object, entries: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conduct(
            [(row.seed, measure([Wanted("c", "a", row.seed, "tune", row)])) for row in rows],
            Inline(),
            record,
            width=1,
            data=Path("data"),
            observer=Recorder(),
            asked=lambda name, wanted: None,
            done=stop,
        )
    assert {trial.key for trial, _ in record.rows()} == {row.key for row in rows}


def test_a_deadline_starts_no_fleet_and_the_next_run_goes_on(record: Record) -> None:
    the_study = timed_study()
    observer = Recorder()
    cut_off, lines = watch(
        record, Watched(Random(1)), the_study, deadline=time.monotonic(), observer=observer
    )
    assert cut_off and not lines and not observer.begun

    def slow(trial: Trial) -> Result:
        time.sleep(0.003)
        return invented(trial)

    cut_off, _ = watch(record, Watched(Random(1), slow), the_study, deadline=time.monotonic() + 0.1)
    assert cut_off
    assert watch(record, Watched(Random(2)), the_study)[1] == undisturbed(the_study, back_ends=BACK_ENDS)


def test_another_back_end_is_another_row(record: Record) -> None:
    run(record, None, study())
    observer = Recorder()
    _, lines = watch(record, Watched(Random(1)), study(), observer=observer)
    assert {e.trial.backend for name, entries in lines.items() if "mlp" in name for e in entries} == {"eager"}
    begun = {trial.backend for trial, _ in record.rows() if trial.key in observer.begun}
    assert begun == {"eager"} and observer.again


class Here(Executor):
    """Trains really, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, devices: int = 1) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args))
        return future


def small_study(back_end: str = "eager") -> Study:
    base = Trial(data="digits", steps=4, batch_size=8, n_train=64, n_eval=32, backend=back_end)
    return study(quick=design(base=base, cells=(Cell("mlp"),), lr=(0.01, 0.1)), hypotheses=())


def trained(folder: Path, executor: Executor, width: int, size: int = FLEET_SIZE) -> dict[str, Result]:
    record = Record(folder / "runs" / "bnbench.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting_module, "FLEET_SIZE", size)
        patch.chdir(folder)  # where the data go
        run(record, executor, small_study(), width=width)
    results = {trial.key: result for trial, result in record.rows()}
    record.close()
    return results


def same(one: Mapping[str, Result], other: Mapping[str, Result]) -> bool:
    return one.keys() == other.keys() and all(one[key].has_same_numbers(other[key]) for key in one)


def test_fleets_that_are_cut_otherwise_give_the_same_to_the_bit(tmp_path: Path) -> None:
    together = trained(tmp_path / "1", Here(), width=1)
    assert "done" in {result.status for result in together.values()} <= {"done", "diverged"}
    assert same(together, trained(tmp_path / "2", Here(), width=1, size=3))
    shifted = {key: replace(r, metrics={**r.metrics, "val/acc": 2.0}) for key, r in together.items()}
    assert not same(together, shifted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_to_the_bit(tmp_path: Path, workers: int) -> None:
    here = trained(tmp_path / "here", Here(), width=1)
    with LocalPool(plan_workers((), workers)) as pool:
        assert same(here, trained(tmp_path / "there", pool, width=workers))
