"""Tests of the one loop, with invented trainings: what is trained, recorded, repeated and given up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnbench.engine import conduct as conduct_module
from bnbench.engine.conduct import train_row
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study import Entry, Result, Table, Trial
from bnbench.study.trial import trial_from
from tests.conducted_studies import Dying, Inline, Recorder, run, undisturbed
from tests.pilot_study import design, invented, study


def ordered(entries: Iterable[Entry]) -> Table:
    """These lines as a record gives them out."""
    return Table(tuple(sorted(entries, key=lambda e: (e.cell, e.arm, e.replicate, e.role, e.trial.lr))))


@pytest.fixture
def record(tmp_path: Path) -> Any:
    record = Record(tmp_path / "runs" / "bnbench.db")
    yield record
    record.close()


def test_every_row_is_trained_and_recorded_once(record: Record) -> None:
    observer = Recorder()
    cut_off, lines = run(record, observer=observer)
    assert cut_off == [] and lines == undisturbed()
    keys = {entry.trial.key for entries in lines.values() for entry in entries}
    assert Counter(observer.begun) == Counter(dict.fromkeys(keys, 1))
    assert dict(observer.ended) == dict.fromkeys(keys, "done")
    assert {trial.key for trial, _ in record.rows()} == keys
    assert observer.lines == []


def test_rows_that_two_studies_share_are_trained_once(record: Record) -> None:
    sweep = study(name="sweep", program="sweep", hypotheses=())
    observer = Recorder()
    _, lines = run(record, None, study(), sweep, observer=observer)
    assert lines == undisturbed(study(), sweep)
    assert max(Counter(observer.begun).values()) == 1
    alone = {entry.trial.key for entries in undisturbed().values() for entry in entries}
    assert set(observer.begun) == alone
    for name in ("pilot", "sweep"):
        rows = [e for key, entries in lines.items() if key[0] == name for e in entries]
        assert record.table(name) == ordered(rows)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), width=st.integers(1, 12), once=st.booleans())
def test_nothing_depends_on_width_or_on_the_order_of_completion(
    tmp_path_factory: pytest.TempPathFactory, seed: int, width: int, once: bool
) -> None:
    the_study = study(quick=design(tuning="once" if once else "per_replicate"))
    record = Record(tmp_path_factory.mktemp("r") / "runs" / "bnbench.db")
    executor = Inline(order=Random(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct_module, "wait", executor.wait)
        _, lines = run(record, executor, the_study, width=width)
    assert executor.most <= width
    expected = undisturbed(the_study)
    assert lines == expected
    assert record.table("pilot") == ordered(entry for entries in expected.values() for entry in entries)
    record.close()


def test_threads_give_the_same_too(record: Record) -> None:
    class Threads(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            def train() -> list[Result]:
                time.sleep(Random(str(args[0])).random() / 500)
                return [invented(trial_from(row)) for row in args[0]]

            return super().submit(train)

    with Threads(4) as executor:
        assert run(record, executor, width=4)[1] == undisturbed()


def test_rows_of_earlier_programs_come_first(record: Record) -> None:
    observer = Recorder()
    run(record, width=1, observer=observer)
    place = {e.trial.key: name for name, entries in undisturbed().items() for e in entries}
    order = [place[key] for key in observer.begun]
    firsts = list(dict.fromkeys(order))
    assert order == sorted(order, key=firsts.index)


def test_a_second_run_trains_nothing(record: Record) -> None:
    _, first = run(record)
    observer = Recorder()
    _, second = run(record, observer=observer)
    assert second == first
    assert observer.begun == []
    assert set(observer.again) == {e.trial.key for entries in first.values() for e in entries}


def test_after_an_interrupt_only_the_missing_rows_are_trained(record: Record) -> None:
    trained: list[str] = []

    def interrupted(trial: Trial) -> Result:
        if len(trained) == 15:
            raise KeyboardInterrupt
        trained.append(trial.key)
        return invented(trial)

    with pytest.raises(KeyboardInterrupt):
        run(record, Inline(interrupted))
    recorded = {trial.key for trial, _ in record.rows()}
    assert 0 < len(recorded) <= 15
    observer = Recorder()
    _, lines = run(record, observer=observer)
    assert lines == undisturbed()
    assert not recorded & set(observer.begun)


def test_a_deadline_cuts_off_programs_and_keeps_what_is_trained(record: Record) -> None:
    ended = time.monotonic()
    observer = Recorder()
    cut_off, lines = run(record, deadline=ended, observer=observer)
    assert len(cut_off) == 4 and lines == {} and observer.begun == []

    def slow(trial: Trial) -> Result:
        time.sleep(0.01)
        return invented(trial)

    cut_off, lines = run(record, Inline(slow), deadline=time.monotonic() + 0.2, observer=observer)
    assert cut_off and len(cut_off) + len(lines) == 4
    assert (
        {key for key, _ in observer.ended} == {trial.key for trial, _ in record.rows()} == set(observer.begun)
    )
    assert observer.begun
    assert run(record)[1] == undisturbed()
    assert run(record, deadline=time.monotonic())[0] == []  # nothing is left to start


def test_a_row_whose_worker_died_once_is_trained_again(record: Record) -> None:
    observer = Recorder()
    train = Dying(1, lambda trial: True)
    assert run(record, Inline(train), observer=observer)[1] == undisturbed()
    # A second attempt is no further row: `started` and `finished` stay in pairs.
    assert set(Counter(observer.begun).values()) == {1}
    assert len(observer.lines) == len(observer.ended) == len(train.deaths)
    assert all(any(key in line for line in observer.lines) for key in train.deaths)
    assert not any("\n" in line for line in observer.lines)


def fatal(trial: Trial) -> bool:
    return trial.norm == "group" and trial.lr == 0.1 and trial.score_on == "val"


def test_a_row_that_kills_its_worker_twice_has_failed_by_name(record: Record) -> None:
    train = Dying(99, fatal)
    _, lines = run(record, Inline(train))
    assert set(train.deaths.values()) == {2}
    failed = [(trial, result) for trial, result in record.rows() if result.status == "failed"]
    assert {trial.key for trial, _ in failed} == set(train.deaths) and len(failed) == 4
    for trial, result in failed:
        assert f"model={trial.model!r}" in result.reason and "norm='group'" in result.reason
        assert "batch_size=64" in result.reason and "\n" not in result.reason
    tuned = [e for entries in lines.values() for e in entries if fatal(e.trial)]
    assert {e.result.status for e in tuned} == {"failed"}
    confirmed = {
        e.trial.lr for entries in lines.values() for e in entries if (e.arm, e.role) == ("group", "own")
    }
    assert 0.1 not in confirmed


def test_failed_rows_are_trained_again_by_the_next_run_and_not_within_one(record: Record) -> None:
    calls: Counter[str] = Counter()

    def raising(trial: Trial) -> Result:
        calls[trial.key] += 1
        if fatal(trial):
            raise ZeroDivisionError("no\nway")
        return invented(trial)

    twins = study(name="twins")
    run(record, Inline(raising), study(), twins, width=1)
    assert set(calls.values()) == {1}
    reasons = {result.reason for _, result in record.rows() if result.status == "failed"}
    assert reasons == {"ZeroDivisionError: no\nway"}
    observer = Recorder()
    _, lines = run(record, None, study(), twins, observer=observer)
    assert lines == undisturbed(study(), twins)
    assert {key for key in calls if key in observer.begun} == {
        trial.key for trial, _ in record.rows() if fatal(trial)
    }
    rows = [e for name, entries in lines.items() if name[0] == "pilot" for e in entries]
    assert record.table("pilot") == ordered(rows)  # and nothing of what was confirmed before


def test_a_result_that_says_failed_is_kept_and_shown(record: Record) -> None:
    def failing(trial: Trial) -> Result:
        return Result("failed", reason="Traceback ...") if fatal(trial) else invented(trial)

    observer = Recorder()
    run(record, Inline(failing), observer=observer)
    assert Counter(status for _, status in observer.ended)["failed"] == 4


def test_bad_input_ends_the_run_and_what_ended_with_it_is_kept(record: Record) -> None:
    def missing_data(trial: Trial) -> Result:
        if fatal(trial):
            raise BadInput("cifar10 is not there")
        return invented(trial)

    executor = Inline(missing_data, order=Random(3))
    begun: list[Trial] = []

    def all_at_once(
        futures: Mapping[Future[Any], list[Trial]], **_: Any
    ) -> tuple[set[Future[Any]], set[Future[Any]]]:
        begun.extend(trial for rows in futures.values() for trial in rows)
        while executor.open:
            executor.finish_some()
        return set(futures), set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct_module, "wait", all_at_once)
        with pytest.raises(BadInput, match=r"^cifar10 is not there$"):
            run(record, executor, width=12)
    refused = {trial.key for trial in begun if fatal(trial)}
    assert len(begun) == 12 and refused
    assert {trial.key for trial, _ in record.rows()} == {trial.key for trial in begun} - refused
    assert run(record)[1] == undisturbed()


def test_a_row_that_another_run_measured_otherwise_is_reported(record: Record) -> None:
    """Two coordinators never write one record, but two records are merged, and then numbers must agree."""
    real = record.append

    def append(rows: Any) -> list[str]:
        rows = list(rows)
        return [*real(rows), f"row {rows[0][0].key} was measured twice"]

    observer = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "append", append)
        run(record, observer=observer)
    assert len(observer.lines) == len(observer.ended)


def test_a_worker_trains_the_row_that_it_is_given(tmp_path: Path) -> None:
    trial = Trial(data="digits", norm="none", steps=2, batch_size=8)
    result = train_row(trial.as_dict(), str(tmp_path / "data"), str(tmp_path / "runs"))
    assert result.status in ("done", "diverged")
    assert "val/acc" in result.metrics and "test/acc" not in result.metrics
