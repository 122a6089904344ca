"""Doctored records and new stores for the tests of publishing: plausible numbers, no training."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bnbench.record import Record
from bnbench.study.table import Entry, Result, Role
from bnbench.study.trial import Trial
from bnbench.tracking import Store, open_store, tracking_uri

STUDY_HASH = "0123456789ab"
MAIN, TUNING = "bnbench/pilot/quick", "bnbench/pilot/quick/tuning"
LR = (0.01, 0.03, 0.1, 0.3)
REPLICATES = 3
ARMS = ("none", "batch")


def definition(cells: Sequence[str], arms: Sequence[str], **changes: Any) -> dict[str, Any]:
    row = {"model": "cnn", "clip_norm": 0.5, **changes}
    return {
        "name": "pilot",
        "preset": "quick",
        "question": "Does it help?",
        "program": "search",
        "baseline": "none",
        "analysis_version": 1,
        "lr": list(LR),
        "replicates": REPLICATES,
        "tuning": "per_replicate",
        "cells": {
            cell: {
                "constants": {"target": 0.6},
                "arms": {arm: {**row, **({"norm": arm} if arm != "batch" else {})} for arm in arms},
            }
            for cell in cells
        },
        "hypotheses": {"speed": {"claim": "C1", "better": ["batch"], "other": ["none"]}},
    }


def result(
    trial: Trial,
    *,
    status: Any = "done",
    reason: str = "",
    started: float | None = None,
    curve: Mapping[str, tuple[float, ...]] | None = None,
    **metrics: float,
) -> Result:
    """What a training of this row might have given: some function of its key."""
    luck = int(trial.key, 16) % 1000 / 1000
    accuracy = 0.75 + 0.125 * luck
    began = 1.7e9 + 1000 * luck if started is None else started
    steps = (1.0, 10.0, 100.0, float(trial.steps))
    return Result(
        status=status,
        reason=reason,
        metrics={
            "train/loss": 0.25,
            "val/loss": 0.5 + luck,
            "val/acc": accuracy,
            "test/loss": 0.5,
            "test/acc": accuracy - 0.01,
            "time/total_s": 2.5,
            "chance": 0.1,
            **metrics,
        },
        curve=curve or {"step": steps, "val/loss": (2.0, 1.5, 1.0, 0.6), "val/acc": (0.1, 0.4, 0.6, 0.7)},
        provenance={
            "started": began,
            "finished": began + 2.5,
            "git": "abc123",
            "dirty": False,
            "host": "here",
        },
    )


def failed(trial: Trial) -> Result:
    reason, trace = "ZeroDivisionError: in a norm", "Traceback\nZeroDivisionError: in a norm"
    return Result("failed", reason=reason, provenance={"started": 1.7e9, "traceback": trace})


def verdict(name: str = "speed", cell: str = "cnn-mnist1d") -> dict[str, Any]:
    numbers = {"n": 3, "estimate": 1.5, "low": 0.5, "high": 2.5, "p": 0.01, "p_holm": None}
    kind = {"unit": "pp", "decision": "SUPPORTED", "label": "at_least_delta", "gate": ""}
    return {"hypothesis": name, "claim": "C1", "cell": cell, **numbers, **kind}


@contextmanager
def doctored_record(
    runs: Path,
    *,
    cells: Sequence[str] = ("cnn-mnist1d",),
    arms: Sequence[str] = ARMS,
    replicates: range = range(REPLICATES),
    role: Role = "tune",
    curve: Mapping[str, tuple[float, ...]] | None = None,
    **changes: Any,
) -> Iterator[Record]:
    """A record of one study whose arms were tuned and confirmed, or swept."""
    record = Record(runs / "bnbench.db")
    record.register(STUDY_HASH, definition(cells, arms, **changes))
    entries = []

    def add(cell: str, arm: str, replicate: int, as_role: Role, trial: Trial) -> Result:
        outcome = result(trial, curve=curve)
        entries.append(Entry(cell, arm, replicate, as_role, trial, outcome))
        return outcome

    for number, cell in enumerate(cells):
        for arm in arms:
            for replicate in replicates:
                row = Trial(
                    **{"model": "cnn", "clip_norm": 0.5, "norm": arm, "steps": 500 + number, **changes},
                    data_seed=replicate,
                    seed=replicate,
                )
                scores = [add(cell, arm, replicate, role, row.replace(lr=lr)).metrics["val/acc"] for lr in LR]
                if role == "tune":
                    best = LR[scores.index(max(scores))]
                    confirmed = row.replace(score_on="test")
                    add(cell, arm, replicate, "own", confirmed.replace(lr=best))
                    add(cell, arm, replicate, "common", confirmed.replace(lr=0.05))
    record.append([(e.trial, e.result) for e in entries])
    record.enroll(STUDY_HASH, entries)
    record.keep_verdicts(STUDY_HASH, [verdict()])
    try:
        yield record
    finally:
        record.close()


def runs_of(store: Store, experiment: str) -> list[Any]:
    """All runs of an experiment that are not deleted."""
    found = store.client.get_experiment_by_name(experiment)
    return list(store.client.search_runs([found.experiment_id], max_results=5000)) if found else []


def history_of(store: Store, run_id: str, key: str) -> list[Any]:
    """All values of a metric, by step."""
    return sorted(store.client.get_metric_history(run_id, key), key=lambda m: (m.step, m.timestamp))


def snapshot(runs: Path) -> dict[str, Counter[Any]]:
    """What the MLflow database under a folder holds: runs by name, and rows a table."""
    with closing(sqlite3.connect(runs / "mlflow.db")) as db:
        names = Counter(name for (name,) in db.execute("SELECT name FROM runs"))
        tables = ("runs", "metrics", "latest_metrics", "params", "tags", "experiments")
        sizes = {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}
    return {"runs": names, "rows": Counter(sizes)}


def close_connections() -> None:
    """Close what MLflow keeps open to its databases."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose()


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database, made once in a working folder of its own: its schema takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with contextlib.chdir(folder):
        open_store(tracking_uri(None, {}, Path("runs")), Path("runs"))
    close_connections()
    return folder / "runs" / "mlflow.db"


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Path:
    folder = tmp_path / "rüns 1%"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    return folder


@pytest.fixture
def store(runs: Path) -> Store:
    return open_store(tracking_uri(None, {}, runs), runs)
