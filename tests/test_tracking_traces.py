"""What MLflow shows of probes, with real SQLite stores: metrics over the steps, and all in one file."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bnbench.probes import Trace
from bnbench.record import Record
from bnbench.study.table import Entry, Result, Role
from bnbench.study.trial import Trial
from bnbench.tracking import LiveLog, Place, Publisher, publish
from bnbench.tracking.draft import METRICS, MOST_METRICS, YIELDING, Definition, Draft, training_draft
from bnbench.tracking.store import Store
from tests.probe_traces import TRACES
from tests.tracking_records import (
    MAIN,
    STUDY_HASH,
    TUNING,
    definition,
    doctored_record,
    empty_store,
    history_of,
    result,
    runs,
    runs_of,
    snapshot,
    store,
)

# MLflow and SQLAlchemy use what each other has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

__all__ = ["empty_store", "runs", "store"]  # fixtures

CELL, ARM = "cnn-mnist1d", "batch"
DEFINITION = Definition(STUDY_HASH, 1.7e9, definition((CELL,), (ARM,)))
TRIAL = Trial(model="cnn", seed=50, data_seed=50, lr=0.3, steps=40, score_on="test")
NAME = "cnn-mnist1d-batch-s50"
#: The finite numbers of the traces, by metric and step.
SHOWN = {
    "probe/gradient_flow/growth": {0: 1.2, 40: 0.1 + 0.2},
    "probe/gradient_flow/ratio": {0: 2.0, 5: 3.0, 40: 0.0},
    "probe/landscape/range": {40: 0.75},
}


def probed(trial: Trial = TRIAL, **changes: Any) -> Result:
    return dataclasses.replace(result(trial), **{"traces": TRACES, **changes})


def add(record: Record, found: Result, trial: Trial = TRIAL, role: Role = "own") -> None:
    record.append([(trial, found)])
    record.enroll(STUDY_HASH, [Entry(CELL, ARM, 50, role, trial, found)])


def draft_of(found: Result) -> Draft:
    return training_draft(DEFINITION, Entry(CELL, ARM, 50, "own", TRIAL, found))


def probe_series(draft: Draft) -> dict[str, dict[int, float]]:
    series: dict[str, dict[int, float]] = {}
    for point in draft.points:
        if point.key.startswith("probe/"):
            series.setdefault(point.key, {})[point.step] = point.value
    return series


def histories(store: Store, run: Any) -> Mapping[str, dict[int, float]]:
    keys = [key for key in run.data.metrics if key.startswith("probe/")]
    return {key: {m.step: m.value for m in history_of(store, run.info.run_id, key)} for key in keys}


def file_of(store: Store, run: Any, name: str) -> str:
    return Path(store.client.download_artifacts(run.info.run_id, name)).read_text()


def test_a_probed_training_has_its_values_over_the_steps_and_all_in_one_file(
    runs: Path, store: Store
) -> None:
    with doctored_record(runs, replicates=range(1)) as record:
        add(record, probed())
        assert publish(record, store).error == ""
        before = snapshot(runs)
        assert publish(record, store).published == 0
    assert snapshot(runs) == before
    by_name = {run.info.run_name: run for run in runs_of(store, MAIN)}
    run = by_name[NAME]
    assert histories(store, run) == SHOWN
    assert all(
        run.info.start_time <= m.timestamp <= run.info.end_time
        for key in SHOWN
        for m in history_of(store, run.info.run_id, key)
    )
    found = json.loads(file_of(store, run, "probes.json"))
    assert {probe: repr(Trace.from_json(trace)) for probe, trace in found.items()} == {
        probe: repr(trace) for probe, trace in TRACES.items()
    }
    assert "mlflow.note.content" not in run.data.tags
    other = by_name["cnn-mnist1d-batch-s0"]
    assert not histories(store, other)
    assert {file.path for file in store.client.list_artifacts(other.info.run_id)} == {
        "trial.json",
        "result.json",
    }


#: Metrics that a probed run keeps, and a trace with more values than there is room for.
KEPT = tuple(name for name in METRICS if name not in YIELDING)
MANY = {"p": Trace(steps=(40,), values={f"v{i}": (1.0,) for i in range(9)})}


def test_a_run_has_15_metrics_at_most_and_names_the_values_that_are_only_in_the_file(
    runs: Path, store: Store
) -> None:
    scores = {name: 0.5 for name in METRICS if name not in ("train/steps", "steps_to_target")}
    curve = {"step": (10.0, 40.0), "val/acc": (0.1, 0.2)}  # It never reaches the target.
    with doctored_record(runs, replicates=range(1)) as record:
        add(record, probed(metrics=scores, curve=curve, traces=MANY))
        assert publish(record, store).error == ""
    (run,) = [r for r in runs_of(store, MAIN) if r.info.run_name == NAME]
    assert len(run.data.metrics) == MOST_METRICS == 15
    kept = scores.keys() - set(YIELDING)
    assert run.data.metrics.keys() >= kept
    shown = 15 - len(kept)
    assert histories(store, run) == {f"probe/p/v{i}": {40: 1.0} for i in range(shown)}
    hidden = ", ".join(f"probe/p/v{i}" for i in range(shown, 9))
    assert run.data.tags["mlflow.note.content"] == f"Only in probes.json: {hidden}"
    assert json.loads(file_of(store, run, "probes.json"))["p"]["values"]["v8"] == [1.0]


@pytest.mark.parametrize("free", range(5))
def test_values_of_probes_take_what_other_metrics_leave(free: int) -> None:
    names = KEPT[: len(KEPT) - free]
    draft = draft_of(probed(metrics=dict.fromkeys((*names, *YIELDING), 40.0), curve={}, traces=MANY))
    room = MOST_METRICS - len(names)
    assert list(probe_series(draft)) == [f"probe/p/v{i}" for i in range(9)][:room]
    assert {point.key for point in draft.points} == {*names, *probe_series(draft)}


def test_a_run_without_probes_keeps_all_its_metrics() -> None:
    draft = draft_of(probed(metrics=dict.fromkeys(METRICS, 40.0), curve={}, traces={}))
    assert {point.key for point in draft.points} == set(METRICS)


def test_a_metric_that_is_not_finite_leaves_its_place_to_a_probe() -> None:
    scores = dict.fromkeys(METRICS, 40.0) | {"test/loss": math.inf}
    draft = draft_of(probed(metrics=scores, curve={}, traces=MANY))
    assert len(probe_series(draft)) == MOST_METRICS - len(KEPT) + 1


def test_a_diverged_training_says_why_and_what_is_in_the_file() -> None:
    scores = dict.fromkeys(METRICS, 40.0)
    changes = {"status": "diverged", "reason": "the loss became NaN", "metrics": scores, "curve": {}}
    draft = draft_of(probed(**changes, traces=MANY))
    hidden = ", ".join(f"probe/p/v{i}" for i in range(MOST_METRICS - len(KEPT), 9))
    assert draft.tags["mlflow.note.content"].split("\n\n") == [
        "diverged: the loss became NaN",
        f"Only in probes.json: {hidden}",
    ]
    many = {f"v{i:03}": (1.0,) for i in range(1000)}
    draft = draft_of(probed(metrics=scores, traces={"p": Trace(steps=(40,), values=many)}))
    assert len(draft.tags["mlflow.note.content"]) == 8000


def test_a_probed_training_that_was_shown_live_has_all_its_values(runs: Path, store: Store) -> None:
    with doctored_record(runs, replicates=range(1)) as record:
        publisher = Publisher(store, runs / "bnbench.db", runs, look_every=0.05)
        publisher.start()
        publisher.expect([Place(STUDY_HASH, CELL, ARM, 50, "own", TRIAL)])
        started = time.time() - 60
        log = LiveLog(runs, TRIAL.key, started)
        for step in (10, 30):
            log.write(step, {"val/acc": step / 100})

        def shown() -> list[Any]:
            return [run for run in runs_of(store, MAIN) if run.info.run_name == NAME]

        end = time.monotonic() + 15
        while not (shown() and "val/acc" in shown()[0].data.metrics):
            assert time.monotonic() < end, "it was not shown in time"
            time.sleep(0.05)
        curve = {"step": (10.0, 30.0), "val/acc": (0.1, 0.3)}
        add(record, dataclasses.replace(result(TRIAL, started=started, curve=curve), traces=TRACES))
        publisher.notify(STUDY_HASH)
        (early,) = shown()
        assert publisher.close().left == 0
    (run,) = shown()
    assert (run.info.run_id, run.info.status) == (early.info.run_id, "FINISHED")
    assert histories(store, run) == SHOWN
    assert [m.step for m in history_of(store, run.info.run_id, "val/acc")] == [10, 30, 40]


def test_a_probed_training_within_a_grid_adds_no_run(runs: Path, store: Store) -> None:
    trial = TRIAL.replace(score_on="val")
    with doctored_record(runs, replicates=range(1)) as record:
        add(record, probed(trial), trial, "tune")
        assert publish(record, store).error == ""
    (run,) = [r for r in runs_of(store, TUNING) if r.info.run_name == NAME]
    assert run.data.tags["bnbench.level"] == "grid"
    assert not histories(store, run)
