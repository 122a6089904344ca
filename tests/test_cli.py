"""The command line: what it prints, its exit codes, and one line for everything that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnbench.cli.app import call
from bnbench.cli.progress import duration
from bnbench.cli.run import seconds
from bnbench.registry import BadInput
from tests.tiny_study import call_here, metrics_of, verdicts_of, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny study has been run."""
    folder = tmp_path_factory.mktemp("cli")
    call_here("run", write_tiny(folder), "--preset", "quick", folder=folder, data=folder / "data")
    return folder


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a call ends with; its exit code is 2."""
    assert call([str(word) for word in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bnbench: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "convergense"), ("convergense", "did you mean 'convergence'")),
        (("run", "--preset", "quik"), ("quik", "did you mean 'quick'")),
        (("run", "--budget", "soon"), ("--budget 'soon'", "2h")),
        (("run", "--gpus", "5x"), ("5x", "all, none")),
        (("run", "--workers", "0"), ("--workers 0", "1 or more")),
        (("run", "--devices", "2"), ("--devices 2",)),
        (("run", "nowhere.py"), ("no study file 'nowhere.py'",)),
        (("rerun", "abc", "--runs", "nowhere"), ("nothing is recorded in nowhere",)),
        (("train", "nowhere.json"), ("cannot read nowhere.json",)),
        (("export", "rows.csv", "--runs", "nowhere"), (".parquet",)),
        (("show", "convergence", "--preset", "x"), ("no preset named 'x'",)),
        (("rnu",), ("rnu",)),
        (("run", "--prest", "quick"), ("--prest",)),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = complaint(capsys, *arguments)
    for word in words:
        assert word in line
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("runs", ".lock")]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('norm="none"', 'nrom="none"', ("tiny.py:", "nrom", "did you mean 'norm'")),
        ('norm="batch"', 'norm="bacth"', ("bacth", "did you mean 'batch'")),
        (
            'Arm("batch", norm="batch", dropout=0.1)',
            'Arm("batch", norm="group", norm_options={"num_groups": 5})',
            ("tiny.py", "batch", "num_groups", "5", "1, 2, 4, 8, 16, 32"),
        ),
        (
            'Arm("batch", norm="batch", dropout=0.1)',
            'Arm("batch", norm="ghost_batch", norm_options={"ghost_size": 7})',
            ("ghost_size", "7", "2, 4, 8, 16, 32, 64"),
        ),
        ('unit="pp"', 'unti="pp"', ("tiny.py:", "unti", "did you mean 'unit'")),
        ('data="digits"', 'data="digit"', ("digit", "did you mean 'digits'")),
        ('model="mlp"', 'model="mpl"', ("mpl", "did you mean 'mlp'")),
        ("replicates=5", 'replicates="5"', ("replicates", "'5'")),
    ],
)
def test_a_study_file_with_a_fault_is_explained_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    line = complaint(capsys, "run", write_tiny(tmp_path, **{old: new}), "--runs", tmp_path / "runs")
    for word in words:
        assert word in line
    assert not (tmp_path / "runs" / "bnbench.db").exists()


def test_a_study_file_cannot_take_the_name_of_a_study_of_the_project(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_tiny(tmp_path, **{'name="tiny"': 'name="convergence"'})
    line = complaint(capsys, "run", path, "--runs", tmp_path / "runs")
    assert "tiny.py" in line
    assert "'convergence'; give yours another name" in line


def test_a_model_that_cannot_be_built_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unbuildable.py").write_text("def make(num_classes):\n    raise OSError('no such thing')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arm = 'Arm("batch", norm="batch", dropout=0.1)'
    study = write_tiny(tmp_path, **{arm: 'Arm("batch", model="unbuildable:make", model_options={})'})
    line = complaint(capsys, "run", study, "--runs", tmp_path / "runs")
    assert "tiny.py" in line
    assert "unbuildable:make" in line
    assert "no such thing" in line


def test_a_claim_is_judged_within_one_preset() -> None:
    from bnbench.cli.recorded import gather
    from tests.doctored_results import doctored_report

    whole = doctored_report()
    (quick,) = [r for r in whole.results if r.study.name == "convergence"]
    import dataclasses

    other = dataclasses.replace(
        quick,
        preset="full",
        verdicts=tuple(
            dataclasses.replace(v, decision="INCONCLUSIVE", gate="incomplete") for v in quick.verdicts
        ),
    )
    alone = {claim.id: verdict for claim, verdict in gather([quick], whole.runs).claims}
    both = {claim.id: verdict for claim, verdict in gather([other, quick], whole.runs).claims}
    assert both == alone


def test_list_and_norms_name_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["list"]) == 0
    assert "convergence" in capsys.readouterr().out
    assert call(["norms", "--json"]) == 0
    assert {"none", "batch", "layer"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}


def test_status_says_that_all_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The tiny study is none of the suite, so its record alone tells of it.
    assert call(["report", str(folder / "tiny.py"), "--format", "json", "--runs", str(folder / "runs")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(verdicts_of(folder / "runs"))
    assert {v["n"] for study in printed["studies"] for v in study["verdicts"]} == {5}


@pytest.mark.parametrize("form", ["md", "csv"])
def test_reports_come_in_other_formats(folder: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    arguments = ["report", str(folder / "tiny.py"), "--format", form, "--runs", str(folder / "runs")]
    assert call(arguments) == 0
    assert "T.a" in capsys.readouterr().out


def test_a_row_is_retrained_to_the_bit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = next(key for key, (metrics, _) in metrics_of(folder / "runs").items() if "test/acc" in metrics)
    more = ["--runs", str(folder / "runs"), "--data-folder", str(folder / "data")]
    assert call(["rerun", key, "--check", *more]) == 0
    assert "equal to the bit" in capsys.readouterr().out


def test_a_saved_model_is_loaded_as_it_was(folder: Path) -> None:
    import torch

    import bnbench
    from bnbench.data import load_test

    saved = folder / "runs" / "models" / "tiny" / "quick" / "long" / "batch"
    module = bnbench.load(saved)
    trial = json.loads((saved / "trial.json").read_text())
    test = load_test(trial["data"], trial["data_seed"], folder=folder / "data")
    with torch.no_grad():
        accuracy = (module(test.x).argmax(1) == test.y).double().mean().item()
    recorded = [m["test/acc"] for m, _ in metrics_of(folder / "runs").values() if "test/acc" in m]
    assert accuracy in recorded


def test_an_export_merges_into_another_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.parquet"
    assert call(["export", str(file), "--runs", str(folder / "runs")]) == 0
    for line in ("rows added, 0 were there", "0 rows added"):
        assert call(["import", str(file), "--runs", str(tmp_path / "runs")]) == 0
        assert line in capsys.readouterr().out
    assert metrics_of(tmp_path / "runs") == metrics_of(folder / "runs")


def test_publishing_again_adds_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["publish", "--runs", str(folder / "runs")]) == 0
    assert "0 runs published, 0 left" in capsys.readouterr().out


def test_a_whole_record_is_published_elsewhere(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path / 'home.db'}"
    assert call(["publish", "--runs", str(folder / "runs"), "--tracking-uri", uri]) == 0
    published = int(capsys.readouterr().out.split()[0])
    assert published > 40
    assert call(["publish", "--runs", str(folder / "runs"), "--tracking-uri", uri]) == 0
    assert "0 runs published, 0 left" in capsys.readouterr().out


def test_lightning_verbs_train_and_test(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bnbench.cli", "fit", "--data.name", "digits", "--model.norm", "group"]
    command += ["--trainer.max_epochs", "1", "--trainer.logger", "MLFlowLogger"]
    command += ["--trainer.logger.tracking_uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    environment = {**os.environ, "BNBENCH_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("45m", 2700), ("2h", 7200), ("1h30m", 5400), ("0.5h", 1800), ("7", 7)],
)
def test_a_budget_is_read(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "h", "2 days", "-1h", "1m2h"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="no duration"):
        seconds(text)


@pytest.mark.parametrize(
    ("value", "text"), [(8.2, "8 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (-3, "0 s")]
)
def test_durations_are_for_people(value: float, text: str) -> None:
    assert duration(value) == text
