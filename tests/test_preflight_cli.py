"""Tests of preflight at the command line: `doctor --smoke`, and the first step of a run on GPUs."""

from __future__ import annotations

import dataclasses
import platform
import resource
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bnbench.cli import preflight as at_the_terminal
from bnbench.cli import run as running
from bnbench.cli.app import call
from bnbench.doctor import Finding
from bnbench.engine.cost import shape_of
from bnbench.engine.preflight import Preflight
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study import Trial
from bnbench.study.table import Result
from tests.test_doctor import gpu_machine as gpu_machine
from tests.tiny_study import start, write_tiny

ROW = Trial(data="digits", model="mlp", model_options={"depth": 2, "width": 32})


def request_for(folder: Path, **changes: Any) -> running.Request:
    request = running.Request((), "quick", "all", None, 1, None, folder / "runs", folder / "data")
    return dataclasses.replace(request, **changes)


LEFT_OUT = Finding("fault", "numbers", "GPU 1 fails in a batch-norm step: too bad", "leave it out")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, gpu_machine: dict[str, str]) -> pytest.MonkeyPatch:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", gpu_machine["PATH"])
    return monkeypatch


def test_a_run_goes_on_with_the_other_cards(
    tmp_path: Path, two_gpus: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = (Finding("ok", "GPU", "1"), Finding("warn", "compiler", "eager"))
    two_gpus.setattr(
        at_the_terminal, "look", lambda *rows, **options: Preflight(found, ("0",), (LEFT_OUT,), ())
    )
    request = request_for(tmp_path, workers=4, per_gpu=2)
    changed = at_the_terminal.on_fit_gpus(request, [], Console(width=200))
    assert (changed.gpus, changed.workers) == ("0", 2)
    out = capsys.readouterr().out
    assert "note: left out: GPU 1 fails in a batch-norm step: too bad" in out
    assert "note: eager" in out


def test_a_run_without_a_card_is_refused_with_all_faults(
    tmp_path: Path, two_gpus: pytest.MonkeyPatch
) -> None:
    found = (Finding("fault", "MLflow", "no server", "start it"), Finding("fault", "data", "no data"))
    two_gpus.setattr(at_the_terminal, "look", lambda *rows, **options: Preflight(found, (), (LEFT_OUT,), ()))
    with pytest.raises(BadInput) as refused:
        at_the_terminal.on_fit_gpus(request_for(tmp_path), [], Console())
    assert str(refused.value) == f"{LEFT_OUT} | no server; start it | no data"


def test_a_run_on_gpus_looks_first_and_trains_nothing_before(
    tmp_path: Path, two_gpus: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def refuse(rows: list[Trial], *others: Any, **options: Any) -> Preflight:
        asked.append({trial.data for trial in rows})
        raise BadInput("this machine is not fit")

    two_gpus.setattr(at_the_terminal, "look", refuse)
    arguments = ["run", str(write_tiny(tmp_path)), "--preset", "quick", "--runs", str(tmp_path / "runs")]
    assert call(arguments) == 2
    assert "not fit" in capsys.readouterr().err
    assert asked == [{"digits"}]
    assert not (tmp_path / "runs" / "bnbench.db").exists()


def test_shapes_that_a_gpu_has_trained_are_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "bnbench.db"
    assert at_the_terminal._recorded_shapes(path) == set()
    on_gpu, on_processor = {"device": "NVIDIA A100"}, {"device": platform.machine()}
    rows = [
        (ROW, Result("done", provenance=on_gpu)),
        (ROW.replace(norm="group"), Result("failed", provenance=on_gpu)),
        (ROW.replace(norm="layer"), Result("done", provenance=on_processor)),
    ]
    with closing(Record(path)) as record:
        record.append(rows)
    assert at_the_terminal._recorded_shapes(path) == {shape_of(ROW)}


def test_studies_are_tried_with_smoke_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["doctor", "convergence"]) == 2
    assert "convergence only with --smoke" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_passes_smoke_on() -> None:
    command = ["make", "-n", "doctor", "VENV=none", "SMOKE=1", "STUDY=convergence", "PRESET=quick"]
    answer = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert '--runs "runs" --smoke --preset quick convergence' in answer.stdout
    plain = subprocess.run(command[:4], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert "--smoke" not in plain.stdout


def limit_files() -> None:
    """Let no file grow above 800 KB, as on a disk that is full: a store of MLflow is larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))


def test_doctor_lists_all_faults_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler, no nvidia-smi
    study = write_tiny(tmp_path, **{'norm="batch", dropout=0.1': 'norm="batch", data="cifar10"'})
    arguments = ("doctor", study, "--smoke", "--preset", "quick", "--gpus", "0")
    process = start(*arguments, folder=tmp_path, data=tmp_path / "data", preexec_fn=limit_files)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    assert err == ""
    findings, table = out.split("\n\n")
    levels = {level: [] for level in ("ok", "warn", "fault")}
    for line in findings.splitlines():
        levels[line.split()[0]].append(line[7:19].strip())
    assert levels["fault"] == ["GPU", "data", "MLflow"]
    assert levels["warn"] == ["compiler"]
    assert {"numbers", "bf16", "SyncBN", "data", "shapes"} <= set(levels["ok"])
    assert "`bnbench data cifar10`" in findings
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        ["digits", "mlp", "none"],
        ["cifar10", "mlp", "batch"],
    ]
