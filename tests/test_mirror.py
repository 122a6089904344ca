"""The mirror of searches and grids in real Optuna storages: a journal file and SQLite."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest

from bnbench.engine.mirror import Mirror
from bnbench.engine.search import draw
from bnbench.engine.storage import open_storage
from bnbench.record import Record
from bnbench.study import Arm, Result, Trial
from bnbench.study.programs import programs_of
from tests.mirrored_study import ARMS, GRID, SEARCH_1, brief, conduct, lines, run, searching, shown, trained
from tests.pilot_study import study


@pytest.mark.parametrize("database", [False, True])
def test_every_search_and_every_grid_is_an_optuna_study_that_reads(tmp_path: Path, database: bool) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db" if database else None
    the_study = searching()
    assert run(tmp_path, the_study, storage=storage) == []
    there = shown(storage or tmp_path / "optuna.journal")
    assert set(there) == {GRID, SEARCH_1, "pilot/quick · mlp · batch · search 2"}
    searched = [e for e in lines(tmp_path, the_study, "batch") if e.replicate == 1_000_000]
    assert brief(there[SEARCH_1]) == [
        (
            e.trial.key,
            e["val/acc"],
            {"lr": e.trial.lr, "batch size": str(e.trial.batch_size)},
            "COMPLETE",
        )
        for e in searched
    ]
    assert len(searched) == 10
    grid = lines(tmp_path, the_study, "none")
    assert brief(there[GRID]) == [(e.trial.key, e["val/acc"], {"lr": e.trial.lr}, "COMPLETE") for e in grid]
    assert Counter(t.user_attrs["replicate"] for t in there[GRID]) == {1_000_000 + s: 3 for s in range(3)}

    first, entry = there[SEARCH_1][0], searched[0]
    assert first.intermediate_values == {1: 0.25}
    assert first.datetime_start == datetime.fromtimestamp(entry.result.provenance["started"])
    assert first.duration is not None and first.duration.total_seconds() == 2.5
    assert first.user_attrs["status"] == "done"
    assert there[SEARCH_1][7].user_attrs["mlflow"] == "bnbench/pilot/quick/tuning: mlp-batch-search1-t7"
    assert there[GRID][3].user_attrs["mlflow"] == "bnbench/pilot/quick/tuning: mlp-none-s1000001"
    opened: Any = storage or optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.journal"))
    )
    loaded = optuna.load_study(study_name=SEARCH_1, storage=opened)
    assert (loaded.direction.name, loaded.metric_names) == ("MAXIMIZE", ["val/acc"])
    assert loaded.best_value == max(e["val/acc"] for e in searched)


def test_a_batch_is_there_as_soon_as_its_program_has_it(tmp_path: Path) -> None:
    storage = open_storage(None, tmp_path)
    record = Record(tmp_path / "bnbench.db")
    the_study = searching()
    mirror = Mirror(storage, record.path, [the_study.hash("quick")])
    steps = conduct(record, mirror, the_study)
    counts = []
    for _ in range(4):  # The grids, then batches of 4, 4 and 2.
        next(steps)
        expected = len(lines(tmp_path, the_study, "batch")) // 2
        end = time.monotonic() + 10
        while len(shown(tmp_path / "optuna.journal").get(SEARCH_1, ())) < expected:
            assert time.monotonic() < end
            time.sleep(0.02)
        counts.append(len(shown(tmp_path / "optuna.journal").get(SEARCH_1, ())))
    assert counts == [0, 4, 8, 10]
    mirror.close()
    record.close()


def test_every_replicate_of_a_sweep_or_a_search_of_its_own_is_there(tmp_path: Path) -> None:
    sweep = dataclasses.replace(study(program="sweep"), name="swept")
    per_replicate = searching(tuning="per_replicate", trials=3)
    assert run(tmp_path, sweep) == []
    assert run(tmp_path, per_replicate) == []
    there = shown(tmp_path / "optuna.journal")
    assert {name: len(trials) for name, trials in there.items()} == {
        **{
            f"swept/quick · {cell} · {arm}": 6
            for cell in ("mlp", "cnn")
            for arm in ("none", "batch", "group")
        },
        GRID: 6,
        "pilot/quick · mlp · batch · replicate 0": 3,
        "pilot/quick · mlp · batch · replicate 1": 3,
    }


def test_the_same_again_writes_nothing(tmp_path: Path) -> None:
    run(tmp_path, searching())
    before = (tmp_path / "optuna.journal").read_bytes()
    assert run(tmp_path, searching()) == []
    assert (tmp_path / "optuna.journal").read_bytes() == before


@pytest.mark.parametrize("requests", range(1, 6))
def test_a_run_that_was_cut_off_is_continued_to_the_same_mirror(tmp_path: Path, requests: int) -> None:
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole", searching())
    (tmp_path / "cut").mkdir()
    assert run(tmp_path / "cut", searching(), requests=requests) == []
    assert run(tmp_path / "cut", searching()) == []
    whole, cut = (shown(tmp_path / name / "optuna.journal") for name in ("whole", "cut"))
    assert {name: brief(trials) for name, trials in cut.items()} == {
        name: brief(trials) for name, trials in whole.items()
    }


def test_a_batch_of_which_some_rows_are_recorded_waits_for_the_others(tmp_path: Path) -> None:
    the_study = searching()
    study_hash = the_study.hash("quick")
    run(tmp_path, the_study)
    whole = {name: brief(trials) for name, trials in shown(tmp_path / "optuna.journal").items()}
    cut = tmp_path / "cut"
    cut.mkdir()
    run(cut, the_study, requests=2)
    record = Record(cut / "bnbench.db")
    searched = [e for e in lines(tmp_path, the_study, "batch") if e.replicate == 1_000_000]
    record.enroll(study_hash, searched[:8])
    record.append([(searched[i].trial, searched[i].result) for i in (5, 7)])
    record.close()
    other = dataclasses.replace(study(program="sweep"), name="swept")
    assert run(cut, other) == []  # Shows all of a study that it does not run, in what order there is.
    assert run(cut, the_study) == []
    assert {n: brief(t) for n, t in shown(cut / "optuna.journal").items() if n in whole} == whole


def test_failed_and_diverged_trainings_are_told_apart_and_a_repetition_replaces_a_failure(
    tmp_path: Path,
) -> None:
    def some_fail(trial: Trial) -> Result:
        result = trained(trial)
        if trial.norm == "none" and trial.lr == 1.0:
            return Result("failed", reason="Traceback\nZeroDivisionError: in a norm")
        return (
            dataclasses.replace(result, status="diverged", reason="not finite") if trial.lr == 0.1 else result
        )

    sweep = study(program="sweep")
    assert run(tmp_path, sweep, train=some_fail) == []
    trials = shown(tmp_path / "optuna.journal")[GRID]
    assert [(t.state.name, t.value is None, t.user_attrs["status"]) for t in trials[:3]] == [
        ("COMPLETE", False, "done"), ("COMPLETE", False, "diverged"), ("FAIL", True, "failed")
    ]  # fmt: skip
    assert trials[2].user_attrs["reason"] == "ZeroDivisionError: in a norm"
    assert run(tmp_path, sweep) == []
    trials = shown(tmp_path / "optuna.journal")[GRID]
    assert Counter(t.state.name for t in trials) == {"COMPLETE": 6}


def test_another_definition_takes_the_place_of_the_first(tmp_path: Path) -> None:
    run(tmp_path, searching())
    (note,) = run(tmp_path, searching(arms=(ARMS[0], Arm("batch")), lr=(0.02, 0.2)))
    assert "written anew" in note
    there = shown(tmp_path / "optuna.journal")
    assert set(there) == {GRID, "pilot/quick · mlp · batch"}
    assert {t.params["lr"] for t in there[GRID]} == {0.02, 0.2}


def test_what_a_person_keeps_in_the_same_storage_stays(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/optuna.db"
    mine = optuna.create_study(storage=address, study_name="mine")
    mine.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    run(tmp_path, searching(), storage=address)
    assert [t.value for t in shown(address)["mine"]] == [t.value for t in mine.trials]


def test_trials_name_their_published_runs_once_these_are_known(tmp_path: Path) -> None:
    the_study = searching()
    server = "http://mlflow.example:5000"
    assert run(tmp_path, the_study, tracking=server) == []
    assert not any(
        "mlflow_run" in t.user_attrs for ts in shown(tmp_path / "optuna.journal").values() for t in ts
    )
    record = Record(tmp_path / "bnbench.db")
    study_hash = the_study.hash("quick")
    for e in record.table(study_hash).of(arm="batch", roles=["tune"]):
        name = f"{study_hash}/tune/mlp/batch/s{e.replicate}/{e.trial.key}"
        record.note_published(server, name, f"run-of-{e.trial.key}", "some mark")
    for replicate in range(1_000_000, 1_000_003):
        mark = "running lr 0.1" if replicate == 1_000_002 else "some mark"
        record.note_published(server, f"{study_hash}/tune/mlp/none/s{replicate}", f"grid-{replicate}", mark)
    record.close()
    before = shown(tmp_path / "optuna.journal")
    assert run(tmp_path, the_study, tracking=server) == []
    after = shown(tmp_path / "optuna.journal")
    assert {n: brief(t) for n, t in after.items()} == {n: brief(t) for n, t in before.items()}
    assert [t.user_attrs["mlflow_run"] for t in after[SEARCH_1]] == [
        f"{server}/#/runs/run-of-{t.user_attrs['row']}" for t in after[SEARCH_1]
    ]
    assert [t.user_attrs.get("mlflow_run") for t in after[GRID]] == [
        *[f"{server}/#/runs/grid-1000000"] * 3, *[f"{server}/#/runs/grid-1000001"] * 3, *[None] * 3
    ]  # fmt: skip
    size = (tmp_path / "optuna.journal").stat().st_size
    assert run(tmp_path, the_study, tracking=server) == run(tmp_path, the_study) == []
    assert (tmp_path / "optuna.journal").stat().st_size == size  # Known runs are named once.


def test_a_smoke_preset_is_not_shown(tmp_path: Path) -> None:
    record = Record(tmp_path / "bnbench.db")
    the_study = searching()
    study_hash = the_study.hash("smoke")
    record.register(study_hash, the_study.definition("smoke"))
    mirror = Mirror(open_storage(None, tmp_path), record.path, [study_hash])
    for _, program in programs_of(the_study, "smoke", draw):
        wanted = next(program)
        mirror.tell(
            study_hash, [row.measured({r.trial.key: trained(r.trial) for r in wanted}) for row in wanted]
        )
    mirror.close()
    record.close()
    assert mirror.notes == []
    assert shown(tmp_path / "optuna.journal") == {}
