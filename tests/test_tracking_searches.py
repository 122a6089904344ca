"""What MLflow holds of arms that search a space: a run a search, and below it a run a trial."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnbench.engine.search import draw
from bnbench.record import Record
from bnbench.study import Arm, Choice, Entry, Range, Result, Study, Trial
from bnbench.study.programs import Wanted, programs_of, rank
from bnbench.tracking import LiveLog, Publisher, places, publish
from bnbench.tracking.publish import Session
from bnbench.tracking.store import Store
from tests.pilot_study import CELLS, design, drive, invented, study
from tests.tracking_records import MAIN, TUNING, empty_store, history_of, runs, runs_of, store

# MLflow and SQLAlchemy use what each other has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

__all__ = ["empty_store", "runs", "store"]  # fixtures

SPACE = (
    Range("lr", 0.01, 1.0),
    Choice("batch size", {"16": {"batch_size": 16, "steps": 32}, "32": {"batch_size": 32, "steps": 16}}),
)
ONCE = study(
    quick=design(
        cells=CELLS[:1],
        arms=(Arm("none", norm="none"), Arm("batch", space=SPACE)),
        tuning="once",
        trials=6,
        batch=4,
        searches=2,
    )
)


def at_some_time(trial: Trial) -> Result:
    began = 1.7e9 + int(trial.key, 16) % 1000
    return dataclasses.replace(invented(trial), provenance={"started": began, "finished": began + 2.5})


def asked(the_study: Study, train: Callable[[Trial], Result] = at_some_time) -> list[list[Wanted]]:
    """Every request of the study's one program."""
    return drive(programs_of(the_study, "quick", draw)[0][1], train)[1]


def recorded(
    runs: Path, requests: list[list[Wanted]], train: Callable[[Trial], Result] = at_some_time
) -> Record:
    """A record in which these requests have been answered."""
    record = Record(runs / "bnbench.db")
    record.register(ONCE.hash("quick"), ONCE.definition("quick"))
    for wanted in requests:
        record.enroll(ONCE.hash("quick"), wanted)
        record.append([(row.trial, train(row.trial)) for row in wanted])
    return record


def tried(record: Record, role: Any, replicate: int = 1_000_000) -> list[Entry]:
    rows = record.table(ONCE.hash("quick")).of(arm="batch", roles=[role])
    return [e for e in rows if e.replicate == replicate]


def children(store: Store, parent: Any) -> list[Any]:
    found = [r for r in runs_of(store, TUNING) if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return sorted(found, key=lambda r: int(r.data.tags["bnbench.trial"]))


def named(store: Store, name: str) -> Any:
    (run,) = [r for r in runs_of(store, TUNING) if r.info.run_name == name]
    return run


def test_every_trial_of_a_search_is_a_run_below_that_of_the_search(runs: Path, store: Store) -> None:
    record = recorded(runs, asked(ONCE))
    counts = publish(record, store)
    assert (counts.left, counts.error) == (0, "")
    tuning, main = runs_of(store, TUNING), runs_of(store, MAIN)
    shortlisted = len(record.table(ONCE.hash("quick")).of(roles=["shortlist"]))
    assert Counter((r.data.tags["bnbench.level"], r.data.tags["bnbench.role"]) for r in tuning) == {
        ("grid", "tune"): 3,
        ("search", "tune"): 2,
        ("training", "tune"): 12,
        ("search", "shortlist"): 1,
        ("training", "shortlist"): shortlisted,
    }
    assert {r.info.status for r in tuning} == {"FINISHED"}
    assert Counter(r.data.tags["bnbench.level"] for r in main) == {"arm": 2, "training": 2 + 2 + 2}

    entries = tried(record, "tune")
    search = named(store, "mlp-batch-search1")
    below = children(store, search)
    assert [r.info.run_name for r in below] == [f"mlp-batch-search1-t{n}" for n in range(6)]
    for run, entry in zip(below, entries, strict=True):
        assert run.data.params["lr"] == str(entry.trial.lr)
        assert run.data.params["steps"] == str(entry.trial.steps)
        assert run.data.metrics["val/acc"] == entry["val/acc"]
        assert run.data.tags["bnbench.key"] == entry.trial.key
        assert {k: v for k, v in run.data.tags.items() if k in ("bnbench.cell", "bnbench.arm")} == {
            "bnbench.cell": "mlp",
            "bnbench.arm": "batch",
        }
        row = json.loads(Path(store.client.download_artifacts(run.info.run_id, "trial.json")).read_text())
        assert Trial(**row) == entry.trial
    assert publish(record, store).published == 0
    record.close()


def test_the_run_of_a_search_has_its_history_its_best_point_and_its_table(runs: Path, store: Store) -> None:
    record = recorded(runs, asked(ONCE))
    publish(record, store)
    entries = tried(record, "tune")
    search = named(store, "mlp-batch-search1")
    scores = [e["val/acc"] for e in entries]
    number, best = max(enumerate(entries), key=lambda one: one[1]["val/acc"])
    history = history_of(store, search.info.run_id, "val/acc")
    assert [(m.step, m.value) for m in history] == list(enumerate(scores))
    so_far = history_of(store, search.info.run_id, "val/acc_best")
    assert [(m.step, m.value) for m in so_far] == [(n, max(scores[: n + 1])) for n in range(6)]
    assert search.data.metrics["trials"] == 6
    assert (search.data.params["lr"], search.data.params["batch_size"]) == (
        str(best.trial.lr),
        str(best.trial.batch_size),
    )
    note = search.data.tags["mlflow.note.content"]
    assert note == (f"6 trials; best: t{number} (lr {best.trial.lr}, batch size {best.trial.batch_size})")
    table = json.loads(
        Path(store.client.download_artifacts(search.info.run_id, "trainings.json")).read_text()
    )
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(r["trial"], r["key"], r["batch size"]) for r in rows] == [
        (n, e.trial.key, str(e.trial.batch_size)) for n, e in enumerate(entries)
    ]

    shortlist = named(store, "mlp-batch-shortlist")
    settings: dict[tuple[float, int], list[float]] = {}
    for replicate in range(1_000_000, 1_000_003):
        for e in tried(record, "shortlist", replicate):
            settings.setdefault((e.trial.lr, e.trial.batch_size), []).append(e["val/acc"])
    means = [statistics.fmean(found) for found in settings.values()]
    history = history_of(store, shortlist.info.run_id, "val/acc")
    assert [m.value for m in history] == pytest.approx(means)
    chosen = list(settings)[means.index(max(means))]
    assert (shortlist.data.params["lr"], shortlist.data.params["batch_size"]) == tuple(map(str, chosen))
    own = next(r for r in runs_of(store, MAIN) if r.info.run_name == "mlp-batch-s0")
    assert own.data.params["lr"] == str(chosen[0])
    assert {r.info.run_name for r in children(store, shortlist)} == {
        f"mlp-batch-shortlist-t{n}-data{d}" for n in range(len(means)) for d in (1, 2, 3)
    }
    record.close()


def test_a_search_that_goes_on_is_published_when_it_is_whole(runs: Path, store: Store) -> None:
    requests = asked(ONCE)
    record = recorded(runs, requests[:2])  # The grids, and the first batch of four.
    session = Session(record, store)
    session.publish(ONCE.hash("quick"), unfinished=False)
    assert Counter(r.data.tags["bnbench.level"] for r in runs_of(store, TUNING)) == {"grid": 3}
    recorded(runs, requests[2:3]).close()
    session.publish(ONCE.hash("quick"), unfinished=False)
    assert len(children(store, named(store, "mlp-batch-search1"))) == 6
    record.close()


def test_a_search_that_was_published_half_done_is_made_anew_with_its_trials(runs: Path, store: Store) -> None:
    requests = asked(ONCE)
    record = recorded(runs, requests[:2])
    publish(record, store)
    before = named(store, "mlp-batch-search1")
    assert len(children(store, before)) == 4
    recorded(runs, requests[2:]).close()
    counts = publish(record, store)
    assert (counts.left, counts.error) == (0, "")
    after = named(store, "mlp-batch-search1")
    best = rank(tried(record, "tune"))[0]
    assert after.data.params["lr"] == str(best.lr)
    assert len(children(store, after)) == 6
    trials = [r for r in runs_of(store, TUNING) if r.data.tags["bnbench.level"] == "training"]
    parents = {r.info.run_id for r in runs_of(store, TUNING) if r.data.tags["bnbench.level"] == "search"}
    assert {r.data.tags["mlflow.parentRunId"] for r in trials} == parents
    record.close()


def test_a_failed_trial_is_told_and_its_repetition_takes_its_place(runs: Path, store: Store) -> None:
    requests = asked(ONCE)
    first = requests[1][0].trial

    def breaks(trial: Trial) -> Result:
        result = at_some_time(trial)
        if trial != first:
            return result
        return Result("failed", reason="ZeroDivisionError: in a norm", provenance=result.provenance)

    record = recorded(runs, requests, breaks)
    publish(record, store)
    search = named(store, "mlp-batch-search1")
    assert "1 failed" in search.data.tags["mlflow.note.content"]
    assert [m.step for m in history_of(store, search.info.run_id, "val/acc")] == [1, 2, 3, 4, 5]
    assert children(store, search)[0].info.status == "FAILED"
    recorded(runs, requests).close()
    assert publish(record, store).error == ""
    search = named(store, "mlp-batch-search1")
    assert "failed" not in search.data.tags["mlflow.note.content"]
    assert [r.info.status for r in children(store, search)] == ["FINISHED"] * 6
    record.close()


def test_a_long_trial_is_shown_while_it_runs_and_is_the_same_run_afterwards(runs: Path, store: Store) -> None:
    requests = asked(ONCE)
    record = recorded(runs, requests[:2])
    publisher = Publisher(store, runs / "bnbench.db", runs, look_every=0.05)
    publisher.start()
    study_hash = ONCE.hash("quick")
    record.enroll(study_hash, requests[2])
    publisher.expect(places(study_hash, requests[1]))
    publisher.expect(places(study_hash, requests[2]))
    number, long = next(
        (n, row.trial) for n, row in enumerate(requests[2]) if row.replicate == 1_000_000 and n >= 4
    )
    began = time.time() - 40
    LiveLog(runs, long.key, began, after=0).write(10, {"val/acc": 0.25})

    def shown() -> list[Any]:
        where = {"bnbench.key": long.key, "bnbench.role": "tune"}
        return [r for r in runs_of(store, TUNING) if where.items() <= r.data.tags.items()]

    end = time.monotonic() + 15
    while not shown() or "val/acc" not in shown()[0].data.metrics:
        assert time.monotonic() < end
        time.sleep(0.05)
    (early,) = shown()
    assert (early.info.status, early.info.run_name) == ("RUNNING", f"mlp-batch-search1-t{number}")
    parent = named(store, "mlp-batch-search1")
    assert early.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, parent.data.tags["bnbench.level"]) == ("RUNNING", "search")

    def last(trial: Trial) -> Result:
        result = at_some_time(trial)
        times = {"started": began, "finished": began + 60}
        return dataclasses.replace(result, provenance=times) if trial == long else result

    recorded(runs, requests[2:], last).close()
    publisher.notify(study_hash)
    publisher.close()
    record.close()
    (late,) = shown()
    assert (late.info.run_id, late.info.status) == (early.info.run_id, "FINISHED")
    whole = named(store, "mlp-batch-search1")
    assert (whole.info.run_id, whole.info.status) == (parent.info.run_id, "FINISHED")
    assert [r.info.run_name for r in children(store, whole)] == [f"mlp-batch-search1-t{n}" for n in range(6)]
    assert not [r for r in runs_of(store, TUNING) if r.info.status == "RUNNING"]
