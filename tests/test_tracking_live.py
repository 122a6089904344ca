"""What MLflow shows while trainings run, and the thread that publishes beside them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bnbench.record import Record
from bnbench.study.table import Entry
from bnbench.study.trial import Trial
from bnbench.tracking import LiveLog, Place, Publisher, publish
from bnbench.tracking.live import live_path, read_live
from bnbench.tracking.store import Store
from tests.tracking_records import (
    LR,
    MAIN,
    REPLICATES,
    STUDY_HASH,
    TUNING,
    doctored_record,
    empty_store,
    history_of,
    result,
    runs,
    runs_of,
    store,
)

# MLflow and SQLAlchemy use what each other has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

__all__ = ["empty_store", "runs", "store"]  # fixtures


def test_a_live_log_is_silent_at_first_and_then_tells_all(tmp_path: Path) -> None:
    now = [100.0]
    live_path(tmp_path, "k").parent.mkdir()
    live_path(tmp_path, "k").write_text("of an earlier attempt\n")
    log = LiveLog(tmp_path, "k", 100.0, after=30.0, clock=lambda: now[0])
    log.write(1, {"val/acc": 0.1})
    assert read_live(live_path(tmp_path, "k")) is None
    now[0] = 131.0
    log.write(2, {"val/acc": 0.2})
    with live_path(tmp_path, "k").open("a") as file:
        file.write('{"step": 3, "ti')
    live = read_live(live_path(tmp_path, "k"))
    assert live is not None and live.started == 100.0
    assert live.points == (
        {"step": 1, "time": 100.0, "val/acc": 0.1},
        {"step": 2, "time": 131.0, "val/acc": 0.2},
    )


def _wait(holds: Any, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_a_run_shown_in_a_place_that_gets_no_row_ends_as_killed(runs: Path, store: Store) -> None:
    trial = Trial(model="cnn", seed=50, data_seed=50, lr=0.3, steps=100, score_on="test")
    with doctored_record(runs) as record:
        publisher = Publisher(store, runs / "bnbench.db", runs, look_every=0.05)
        publisher.start()
        publisher.expect([Place(STUDY_HASH, "cnn-mnist1d", "layer", 50, "own", trial)])
        started = time.time() - 40
        log = LiveLog(runs, trial.key, started)
        log.write(10, {"val/acc": 0.25, "val/loss": 2.0})

        def shown() -> list[Any]:
            return [r for r in runs_of(store, MAIN) if r.info.run_name == "cnn-mnist1d-layer-s50"]

        _wait(lambda: shown() and "val/acc" in shown()[0].data.metrics)
        (early,) = shown()
        assert early.info.status == "RUNNING"
        assert (early.data.metrics["val/acc"], early.data.params["lr"]) == (0.25, "0.3")
        curve = {"step": (10.0, 20.0), "val/acc": (0.25, 0.5), "val/loss": (2.0, 1.0)}
        final = result(trial, started=started, curve=curve)
        record.append([(trial, final)])
        record.enroll(STUDY_HASH, [Entry("cnn-mnist1d", "batch", 50, "own", trial, final)])
        publisher.close()
    assert [r.info.status for r in shown()] == ["KILLED"]


def test_the_live_run_is_the_final_run_and_no_point_is_there_twice(runs: Path, store: Store) -> None:
    trial = Trial(model="cnn", seed=50, data_seed=50, lr=0.3, steps=100, score_on="test")
    with doctored_record(runs) as record:
        publisher = Publisher(store, runs / "bnbench.db", runs, look_every=0.05)
        publisher.start()
        publisher.expect([Place(STUDY_HASH, "cnn-mnist1d", "batch", 50, "own", trial)])
        started = time.time() - 40
        log = LiveLog(runs, trial.key, started)
        log.write(10, {"val/acc": 0.25, "val/loss": 2.0})

        def shown() -> list[Any]:
            return [r for r in runs_of(store, MAIN) if r.info.run_name == "cnn-mnist1d-batch-s50"]

        _wait(lambda: shown() and "val/acc" in shown()[0].data.metrics)
        curve = {"step": (10.0, 20.0), "val/acc": (0.25, 0.5), "val/loss": (2.0, 1.0)}
        final = result(trial, started=started, curve=curve)
        record.append([(trial, final)])
        record.enroll(STUDY_HASH, [Entry("cnn-mnist1d", "batch", 50, "own", trial, final)])
        publisher.notify(STUDY_HASH)
        early = shown()[0].info.run_id
        counts = publisher.close()
    assert counts.left == 0 and publisher.problem == ""
    (run,) = shown()
    assert (run.info.run_id, run.info.status, run.data.tags["bnbench.status"]) == (early, "FINISHED", "done")
    history = history_of(store, early, "val/acc")
    assert [(m.step, m.value) for m in history] == [(10, 0.25), (20, 0.5), (100, final.metrics["val/acc"])]
    assert not list((runs / "live").glob("*"))


def test_a_long_search_says_how_far_its_trainings_are(runs: Path, store: Store) -> None:
    trials = [Trial(model="cnn", seed=50, data_seed=50, lr=lr, steps=100) for lr in LR]
    with doctored_record(runs):
        publisher = Publisher(store, runs / "bnbench.db", runs, look_every=0.05)
        publisher.start()
        publisher.expect([Place(STUDY_HASH, "cnn-mnist1d", "batch", 50, "tune", t) for t in trials])
        for trial in trials[:2]:
            LiveLog(runs, trial.key, time.time(), after=0).write(40, {"val/acc": 0.5})

        def note() -> str:
            shown = [r for r in runs_of(store, TUNING) if r.data.tags["bnbench.replicate"] == "50"]
            return shown[0].data.tags.get("mlflow.note.content", "") if shown else ""

        _wait(lambda: note().count("step 40 of 100, val/acc 0.5") == 2)
        publisher.close()
    (run,) = [r for r in runs_of(store, TUNING) if r.data.tags["bnbench.replicate"] == "50"]
    assert run.info.status == "KILLED"  # Nothing of it is in the record, and nothing trains it any more.


def test_what_a_killed_coordinator_left_running_is_swept(runs: Path, store: Store) -> None:
    trial = Trial(model="cnn", seed=50, data_seed=50, lr=0.3, steps=100, score_on="test")
    script = f"""
import os, time
from pathlib import Path
from bnbench.tracking import LiveLog, Place, Publisher, open_store
from bnbench.study.trial import trial_from
runs = Path({str(runs)!r})
trial = trial_from({trial.changed()!r})
publisher = Publisher(open_store({store.uri!r}, runs), runs / "bnbench.db", runs, look_every=0.05)
publisher.start()
publisher.expect([Place({STUDY_HASH!r}, "cnn-mnist1d", "batch", 50, "own", trial)])
LiveLog(runs, trial.key, time.time(), after=0).write(10, {{"val/acc": 0.25}})
while True:
    time.sleep(1)
"""
    with doctored_record(runs) as record:
        child = subprocess.Popen([sys.executable, "-c", script])
        try:

            def mark() -> str:
                marks = record.published(store.shown).items()
                return next((m for item, (_, m) in marks if item.endswith(trial.key)), "")

            _wait(lambda: mark().endswith(" 10"), 30)
        finally:
            child.kill()
            child.wait()
        publisher = Publisher(store, runs / "bnbench.db", runs, look_every=0.05)
        publisher.start()
        _wait(lambda: not mark())
        publisher.close()
    left = Counter(r.info.status for r in runs_of(store, MAIN))
    assert left["RUNNING"] == 0
    assert left["KILLED"] == 2  # The training, and its arm, which had no result yet.


def test_trouble_is_told_in_one_line_and_the_rest_is_sent_when_it_is_over(
    runs: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    calls = 0

    def dying(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise MlflowException("no\nroute")
        return type(store.client).create_run(store.client, *args, **named)

    with doctored_record(runs) as record:
        publisher = Publisher(store, runs / "bnbench.db", runs, look_every=0.05)
        with monkeypatch.context() as patch:
            patch.setattr(store.client, "create_run", dying)
            publisher.start()
            publisher.notify(STUDY_HASH)
            _wait(lambda: publisher.problem)
            assert "(no route)" in publisher.problem and "bnbench publish" in publisher.problem
            assert len(record.published(store.shown)) == 4
        _wait(lambda: not publisher.problem)
        counts = publisher.close()
    assert (counts.left, publisher.problem) == (0, "")
    assert len(runs_of(store, MAIN)) == 15
    assert len(runs_of(store, TUNING)) == 2 * REPLICATES


def test_a_second_attempt_is_another_run(runs: Path, store: Store) -> None:
    trial = Trial(model="cnn", seed=50, data_seed=50, lr=0.3, steps=100, score_on="test")
    with doctored_record(runs):
        publisher = Publisher(store, runs / "bnbench.db", runs, look_every=0.05)
        publisher.start()
        publisher.expect([Place(STUDY_HASH, "cnn-mnist1d", "batch", 50, "own", trial)])

        def steps() -> list[tuple[str, list[int]]]:
            shown = [r for r in runs_of(store, MAIN) if r.info.run_name == "cnn-mnist1d-batch-s50"]
            shown.sort(key=lambda r: r.info.start_time)
            return [
                (r.info.status, [m.step for m in history_of(store, r.info.run_id, "val/acc")]) for r in shown
            ]

        LiveLog(runs, trial.key, 1000.0, after=0).write(10, {"val/acc": 0.25})
        _wait(lambda: steps() == [("RUNNING", [10])])
        LiveLog(runs, trial.key, 2000.0, after=0).write(5, {"val/acc": 0.125})
        _wait(lambda: steps() == [("KILLED", [10]), ("RUNNING", [5])])
        publisher.close()


def test_record_is_untouched_by_publishing_but_for_its_notes(runs: Path, store: Store) -> None:
    with doctored_record(runs) as record:
        before = list(record.rows())
        publish(record, store)
        assert list(record.rows()) == before
    fresh = Record(runs / "bnbench.db")
    assert fresh.published(store.shown)
    fresh.close()
