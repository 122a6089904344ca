"""Publishing the record to MLflow, with real SQLite stores; servers are in test_tracking_server.py."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bnbench.registry import BadInput
from bnbench.study.table import Entry, Table
from bnbench.study.trial import Trial
from bnbench.tracking import Counts, open_store, publish, tracking_uri
from bnbench.tracking.store import Store
from tests.tracking_records import (
    MAIN,
    REPLICATES,
    STUDY_HASH,
    TUNING,
    close_connections,
    doctored_record,
    empty_store,
    failed,
    history_of,
    result,
    runs,
    runs_of,
    snapshot,
    store,
    verdict,
)

# MLflow and SQLAlchemy use what each other has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

__all__ = ["empty_store", "runs", "store"]  # fixtures

Published = tuple[Store, Counts, Table]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Published:
    """A record that was published once, for tests that only look."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    store = open_store(tracking_uri(None, {}, folder), folder)
    with doctored_record(folder) as record:
        counts = publish(record, store)
        return store, counts, record.table(STUDY_HASH)


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import sys, bnbench.tracking; print({'mlflow', 'sqlalchemy', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_new_store_keeps_everything_under_runs(empty_store: Path) -> None:
    with sqlite3.connect(empty_store) as db:
        ((place,),) = db.execute("SELECT artifact_location FROM experiments")
    db.close()
    assert place.startswith(f"{empty_store.parent.as_uri()}/mlartifacts")
    assert [p.name for p in empty_store.parent.parent.iterdir()] == ["runs"]


def test_every_recorded_thing_has_its_run(published: Published) -> None:
    store, counts, _ = published
    main, tuning = runs_of(store, MAIN), runs_of(store, TUNING)
    assert Counter(r.data.tags["bnbench.level"] for r in main) == {
        "arm": 2,
        "training": 2 * 2 * REPLICATES,
        "verdict": 1,
    }
    assert Counter(r.data.tags["bnbench.level"] for r in tuning) == {"grid": 2 * REPLICATES}
    assert counts.published == len(main) + len(tuning)
    assert (counts.left, counts.error) == (0, "")
    assert {r.info.status for r in (*main, *tuning)} == {"FINISHED"}
    names = {r.info.run_name for r in main}
    assert {"cnn-mnist1d · batch", "cnn-mnist1d-batch-s0", "cnn-mnist1d-batch-s1-common"} <= names
    assert f"verdict · {STUDY_HASH}" in names
    parents = {r.info.run_id: r for r in main if r.data.tags["bnbench.level"] == "arm"}
    for run in main:
        if run.data.tags["bnbench.level"] == "training":
            parent = parents[run.data.tags["mlflow.parentRunId"]]
            assert parent.data.tags["bnbench.arm"] == run.data.tags["bnbench.arm"]
            assert len(run.data.metrics) <= 15


def test_a_training_has_its_row_its_numbers_and_its_curve(published: Published) -> None:
    store, _, table = published
    (entry,) = [e for e in table.of(arm="batch", roles=["own"]) if e.replicate == 1]
    run = next(r for r in runs_of(store, MAIN) if r.info.run_name == "cnn-mnist1d-batch-s1")
    assert {
        k: run.data.params[k] for k in ("model", "norm", "batch_size", "nbs", "seed", "lr", "clip_norm")
    } == {
        "model": "cnn",
        "norm": "batch",
        "batch_size": "64",
        "nbs": "64",
        "seed": "1",
        "lr": str(entry.trial.lr),
        "clip_norm": "0.5",
    }
    assert run.data.metrics["test/acc"] == entry["test/acc"]
    assert run.data.metrics["val/acc"] == entry["val/acc"]  # The final value, not the curve's last.
    assert "chance" not in run.data.metrics
    # The curve reaches the registered target of .6 at its third point.
    assert run.data.metrics["steps_to_target"] == pytest.approx(100)
    assert run.info.start_time == round(entry.result.provenance["started"] * 1000)
    assert run.info.end_time == round(entry.result.provenance["finished"] * 1000)
    history = history_of(store, run.info.run_id, "val/loss")
    assert [(m.step, m.value) for m in history if m.timestamp < run.info.end_time] == list(
        zip(entry.result.curve["step"], entry.result.curve["val/loss"], strict=True)
    )
    assert run.data.tags["bnbench.key"] == entry.trial.key
    assert run.data.tags["bnbench.git"] == "abc123"
    row = json.loads(Path(store.client.download_artifacts(run.info.run_id, "trial.json")).read_text())
    assert Trial(**row) == entry.trial
    outcome = json.loads(Path(store.client.download_artifacts(run.info.run_id, "result.json")).read_text())
    assert outcome["metrics"] == dict(entry.result.metrics)


def test_an_arm_shows_mean_interval_and_count(published: Published) -> None:
    store, _, table = published
    own = table.of(arm="batch", roles=["own"])
    run = next(r for r in runs_of(store, MAIN) if r.info.run_name == "cnn-mnist1d · batch")
    scores = [e["test/acc"] for e in own]
    mean = sum(scores) / 3
    half = (
        4.302652729911275 * math.sqrt(sum((x - mean) ** 2 for x in scores) / 2) / math.sqrt(3)
    )  # t(.975; 2)
    metrics = run.data.metrics
    assert metrics["test/acc_mean"] == pytest.approx(mean, abs=1e-12)
    assert metrics["test/acc_low"] == pytest.approx(mean - half, abs=1e-9)
    assert metrics["test/acc_high"] == pytest.approx(mean + half, abs=1e-9)
    assert (metrics["n"], metrics["n_diverged"]) == (3, 0)
    assert metrics["lr_median"] == sorted(e.trial.lr for e in own)[1]
    assert run.data.tags["bnbench.verdict"] == "speed: SUPPORTED"
    assert "seed" not in run.data.params and "lr" not in run.data.params
    assert run.data.params["model"] == "cnn"


def test_a_search_is_one_run_with_its_trainings_as_a_table(published: Published) -> None:
    store, _, table = published
    grid = [e for e in table.of(arm="none", roles=["tune"]) if e.replicate == 2]
    (own,) = [e for e in table.of(arm="none", roles=["own"]) if e.replicate == 2]
    run = next(r for r in runs_of(store, TUNING) if r.info.run_name == "cnn-mnist1d-none-s2")
    history = history_of(store, run.info.run_id, "val/acc")
    assert [(m.step, m.value) for m in history] == [(i, e["val/acc"]) for i, e in enumerate(grid)]
    assert run.data.params["lr"] == str(own.trial.lr)
    shown = json.loads(Path(store.client.download_artifacts(run.info.run_id, "trainings.json")).read_text())
    rows = [dict(zip(shown["columns"], row, strict=True)) for row in shown["data"]]
    assert [(row["lr"], row["key"], row["val/acc"]) for row in rows] == [
        (e.trial.lr, e.trial.key, e["val/acc"]) for e in grid
    ]


def test_a_sweep_stands_below_its_arm_as_one_run_a_replicate(runs: Path, store: Store) -> None:
    with doctored_record(runs, role="sweep") as record:
        publish(record, store)
    main = runs_of(store, MAIN)
    assert Counter(r.data.tags["bnbench.level"] for r in main) == {
        "arm": 2,
        "grid": 2 * REPLICATES,
        "verdict": 1,
    }
    assert not runs_of(store, TUNING)
    arm = next(r for r in main if r.info.run_name == "cnn-mnist1d · batch")
    grids = [r for r in main if r.data.tags.get("mlflow.parentRunId") == arm.info.run_id]
    best = [max(m.value for m in history_of(store, g.info.run_id, "val/acc")) for g in grids]
    assert arm.data.metrics["val/acc_mean"] == pytest.approx(sum(best) / REPLICATES)


def test_the_verdict_run_has_question_table_and_files(runs: Path, store: Store, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<p>report")
    with doctored_record(runs) as record:
        publish(record, store, artifacts={STUDY_HASH: [report]})
        again = publish(record, store)
    assert again.published == 0  # Files that are not given now may stay.
    run = next(r for r in runs_of(store, MAIN) if r.data.tags["bnbench.level"] == "verdict")
    note = run.data.tags["mlflow.note.content"]
    assert "Does it help?" in note and "| 0 | speed | cnn-mnist1d | 1.5 pp | 0.5 … 2.5 |" in note
    assert "bnbench run pilot --preset quick" in note
    assert run.data.metrics["effect/mean"] == 1.5
    assert run.data.tags["bnbench.verdict"] == "1 SUPPORTED"
    files = {f.path for f in store.client.list_artifacts(run.info.run_id)}
    assert files == {"definition.json", "verdicts.json", "report"}


def test_a_note_too_long_for_a_tag_is_cut_between_rows(runs: Path, store: Store) -> None:
    with doctored_record(runs) as record:
        record.keep_verdicts(STUDY_HASH, [verdict(f"h{i}") for i in range(200)])
        publish(record, store)
    run = next(r for r in runs_of(store, MAIN) if r.data.tags["bnbench.level"] == "verdict")
    note = run.data.tags["mlflow.note.content"]
    assert len(note) <= 8000
    assert note.count("(at_least_delta) |\n") == note.count(" | cnn-mnist1d | ")
    assert "verdicts.json" in note and "bnbench run pilot" in note


def test_publishing_twice_adds_nothing(runs: Path, store: Store) -> None:
    with doctored_record(runs) as record:
        publish(record, store)
        before = snapshot(runs)
        counts = publish(record, open_store(store.uri, runs))
        assert (counts.published, counts.left) == (0, 0)
    assert snapshot(runs) == before


def test_a_record_that_forgot_what_it_sent_adds_nothing(runs: Path, store: Store) -> None:
    with doctored_record(runs) as record:
        record.keep_verdicts(STUDY_HASH, [])
        publish(record, store)
        before = snapshot(runs)
        for item in record.published(store.shown):
            record.forget_published(store.shown, item)
        counts = publish(record, store)
        assert counts.published == sum(before["runs"].values())
    assert snapshot(runs) == before


def test_two_records_never_share_a_run(runs: Path, store: Store, tmp_path: Path) -> None:
    for folder in (runs, tmp_path / "other"):
        with doctored_record(folder, replicates=range(1)) as record:
            publish(record, store)
    assert len(runs_of(store, MAIN)) == 2 * 7


def test_new_rows_are_added_and_sums_brought_up_to_date(runs: Path, store: Store) -> None:
    with doctored_record(runs, replicates=range(2)) as record:
        publish(record, store)
        before = {r.info.run_id for r in runs_of(store, MAIN)}
        with doctored_record(runs, replicates=range(2, 3)) as more:
            counts = publish(more, store)
    assert counts.published == 2 + 2 * 2 + 2  # Arms, trainings, searches.
    main = runs_of(store, MAIN)
    assert before <= {r.info.run_id for r in main}
    arm = next(r for r in main if r.info.run_name == "cnn-mnist1d · batch")
    assert arm.data.metrics["n"] == 3
    history = history_of(store, arm.info.run_id, "test/acc_mean")
    assert [m.step for m in history] == [2, 3]


def test_a_deleted_run_and_a_deleted_experiment_come_back(runs: Path, store: Store) -> None:
    with doctored_record(runs) as record:
        publish(record, store)
        names = Counter(r.info.run_name for r in runs_of(store, MAIN))
        run = next(r for r in runs_of(store, MAIN) if r.info.run_name == "cnn-mnist1d-batch-s1")
        store.client.delete_run(run.info.run_id)
        store.client.delete_experiment(store.client.get_experiment_by_name(TUNING).experiment_id)
        assert publish(record, store).error == ""
    assert Counter(r.info.run_name for r in runs_of(store, MAIN)) == names
    assert len(runs_of(store, TUNING)) == 2 * REPLICATES


@pytest.mark.parametrize(
    "damage", ["truncated", *(pytest.param(d, marks=pytest.mark.slow) for d in ("lost", "overwritten"))]
)
def test_a_lost_or_broken_store_is_built_again(damage: str, runs: Path, store: Store) -> None:
    path = runs / "mlflow.db"
    with doctored_record(runs) as record:
        first = publish(record, store)
        close_connections()  # Another process would have none to the file that is gone.
        if damage == "lost":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_bytes(b"not a database" * 1000)
        again = open_store(store.uri, runs)
        counts = publish(record, again)
    assert (damage == "lost") == (again.notice == "")
    assert counts.published == first.published
    assert len(runs_of(again, MAIN)) == 15


def test_another_store_that_is_broken_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "mine.db"
    other.write_bytes(b"precious" * 1000)
    with pytest.raises(BadInput, match=r"mine\.db"):
        open_store(f"sqlite:///{other}", tmp_path / "runs")
    assert other.read_bytes() == b"precious" * 1000


def test_a_store_of_another_mlflow_version_is_left_alone(runs: Path) -> None:
    with sqlite3.connect(runs / "mlflow.db") as db:
        db.execute("UPDATE alembic_version SET version_num = 'abcdefabcdef'")
    db.close()
    with pytest.raises(BadInput, match="mlflow db upgrade"):
        open_store(tracking_uri(None, {}, runs), runs)


def test_long_values_are_never_lost(runs: Path, store: Store) -> None:
    options = {"text": "x" * 7000}
    with doctored_record(runs, model_options=options) as record:
        assert publish(record, store).error == ""
    run = next(r for r in runs_of(store, MAIN) if r.info.run_name == "cnn-mnist1d-batch-s1")
    assert "artifacts" in run.data.params["model_options"]
    row = json.loads(Path(store.client.download_artifacts(run.info.run_id, "trial.json")).read_text())
    assert row["model_options"] == options


def test_thousands_of_points_are_sent_whole(runs: Path, store: Store) -> None:
    steps = tuple(float(s) for s in range(1000))
    curve = {"step": steps, "val/acc": tuple(s / 2000 for s in steps)}
    with doctored_record(runs, replicates=range(1), curve=curve) as record:
        assert publish(record, store).error == ""
    run = next(r for r in runs_of(store, MAIN) if r.info.run_name == "cnn-mnist1d-batch-s0")
    history = history_of(store, run.info.run_id, "val/acc")
    assert len({(m.step, m.value) for m in history}) == 1001


def test_diverged_and_failed_trainings_are_told_apart_and_nothing_infinite_is_sent(
    runs: Path, store: Store
) -> None:
    with doctored_record(runs) as record:
        trial = Trial(model="cnn", seed=90, data_seed=90, score_on="test")
        wild = result(
            trial,
            status="diverged",
            reason="loss was not finite",
            **{"train/loss": math.inf, "test/loss": math.nan},
        )
        broken = failed(trial.replace(seed=91))
        record.append([(trial, wild), (trial.replace(seed=91), broken)])
        record.enroll(
            STUDY_HASH,
            [
                Entry("cnn-mnist1d", "batch", 90, "own", trial, wild),
                Entry("cnn-mnist1d", "batch", 91, "own", trial.replace(seed=91), broken),
            ],
        )
        assert publish(record, store).error == ""
        by_name = {r.info.run_name: r for r in runs_of(store, MAIN)}
        diverged, lost = by_name["cnn-mnist1d-batch-s90"], by_name["cnn-mnist1d-batch-s91"]
        assert (diverged.info.status, diverged.data.tags["bnbench.status"]) == ("FINISHED", "diverged")
        assert all(math.isfinite(v) and v < 1e300 for v in diverged.data.metrics.values())
        assert "train/loss" not in diverged.data.metrics
        assert (lost.info.status, lost.data.tags["bnbench.status"]) == ("FAILED", "failed")
        text = Path(store.client.download_artifacts(lost.info.run_id, "traceback.txt")).read_text()
        assert "ZeroDivisionError" in text
        arm = by_name["cnn-mnist1d · batch"].data.metrics
        assert (arm["n"], arm["n_diverged"]) == (4, 1)

        # Trained again with success: another run takes its place.
        record.append([(trial.replace(seed=91), result(trial.replace(seed=91), started=9000.0))])
        assert publish(record, store).error == ""
    after = [r for r in runs_of(store, MAIN) if r.info.run_name == "cnn-mnist1d-batch-s91"]
    assert [r.info.status for r in after] == ["FINISHED"]


def test_an_interrupted_publishing_is_completed_by_the_next(
    runs: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    steps = ["create_run", "log_batch", "log_artifacts", "set_terminated"]
    with doctored_record(runs) as record:
        for number, step in enumerate(steps * 2):
            calls = 0

            def dying(*args: Any, _step: str = step, _at: int = number, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                done = getattr(type(store.client), _step)(store.client, *args, **named)
                if calls > _at % 3:
                    raise Killed
                return done

            with monkeypatch.context() as patch:
                patch.setattr(store.client, step, dying)
                with pytest.raises(Killed):
                    publish(record, store)
        assert publish(record, store).error == ""
        main = runs_of(store, MAIN)
        assert Counter(r.info.run_name for r in main).most_common(1)[0][1] == 1
        assert len(main) == 15
        assert len(runs_of(store, TUNING)) == 2 * REPLICATES
        assert {r.info.status for r in (*main, *runs_of(store, TUNING))} == {"FINISHED"}
        assert all(len(history_of(store, r.info.run_id, "test/acc")) <= 1 for r in main)
