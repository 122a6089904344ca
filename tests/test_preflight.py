"""Tests of preflight: every check with a real fault, or with a task that stands for a broken device."""

from __future__ import annotations

import functools
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from bnbench import doctor
from bnbench.cli import preflight as at_the_terminal
from bnbench.doctor import Finding, Torch
from bnbench.engine import known_step, preflight, tryouts
from bnbench.engine.cost import shape_of
from bnbench.engine.known_step import Step
from bnbench.engine.preflight import look
from bnbench.placement import Slot
from bnbench.study import Trial
from bnbench.study.table import Result
from tests.pretended_tasks import (
    bf16_fault_on_card_1,
    compiled,
    compiled_wrong,
    dies_on_card_1,
    hangs_on_card_1,
    joined_batch,
    loaded,
    local_shares,
    nan_everywhere,
    no_bf16_fault,
    right_step,
    trained,
    written,
    wrong_on_card_1,
)
from tests.test_doctor import gpu_machine as gpu_machine

ROW = Trial(data="digits", model="mlp", model_options={"depth": 2, "width": 32})


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """The process from which workers are forked, so that no test waits for torch."""
    assert preflight._Answer((), no_bf16_fault).get(120) == ("", "")


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Tasks that find nothing wrong and take no time, and a doctor who believes in the GPUs."""
    monkeypatch.setattr(known_step, "bf16_fault_here", no_bf16_fault)
    monkeypatch.setattr(known_step, "sync_here", joined_batch)
    for name, task in (("compile_function", compiled), ("load", loaded), ("write_run", written)):
        monkeypatch.setattr(tryouts, name, task)
    monkeypatch.setattr(tryouts, "train_twice", trained)

    def healthy(environ: Mapping[str, str]) -> Torch:
        return Torch("2.13.0", "12.1", len(environ["CUDA_VISIBLE_DEVICES"].split(",")))

    monkeypatch.setattr(doctor, "check", functools.partial(doctor.check, try_torch=healthy))
    return monkeypatch


def topics(findings: tuple[Finding, ...], *levels: str) -> list[str]:
    return [finding.topic for finding in findings if finding.level in levels]


# --- Devices. ---


def test_everything_is_tried_on_a_processor(
    tmp_path: Path, tasks: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks.undo()
    tasks.setattr(tryouts, "compile_function", compiled)  # takes 20 s; tested below
    told: list[Finding] = []
    rows = [ROW, ROW.replace(norm="layer"), ROW.replace(norm="sync_batch", devices=2)]
    flight = look(rows, tmp_path / "runs", tmp_path / "data", "none", environ={"PATH": ""}, told=told.append)
    assert told == list(flight.findings)
    assert topics(flight.findings, "fault", "warn") == []
    assert topics(flight.findings, "ok") == [
        *("python", "packages", "file system", "folder", "processor", "GPU"),
        *("numbers", "bf16", "SyncBN", "compiler", "data", "MLflow", "shapes"),
    ]
    assert [trial.norm for trial, _ in flight.shapes] == ["batch", "layer", "sync_batch"]
    assert all(result.metrics["time/step_ms"] > 0 for _, result in flight.shapes)
    assert (flight.gpus, flight.left_out) == ((), ())
    assert not (tmp_path / "runs").exists()
    head, *lines = at_the_terminal.shape_lines(flight)
    assert head.split() == ["model", "norm", "batch_size", "devices", "ms", "a", "step", "peak", "MiB"]
    assert [line.split()[:4] for line in lines] == [
        ["mlp", "batch", "64", "1"],
        ["mlp", "layer", "64", "1"],
        ["mlp", "sync_batch", "64", "2"],
    ]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (wrong_on_card_1, "the running variance is off by 0.01 of"),
        (dies_on_card_1, "its process died"),
        (hangs_on_card_1, "no answer within 5 s"),
    ],
)
def test_a_card_that_fails_is_left_out_by_name(
    tmp_path: Path,
    tasks: pytest.MonkeyPatch,
    gpu_machine: dict[str, str],
    step: Callable[[], Step],
    said: str,
) -> None:
    tasks.setattr(preflight, "DEVICE_TIMEOUT", 5.0)
    rows = [ROW, ROW.replace(norm="sync_batch", devices=2)]
    flight = look(rows, tmp_path, tmp_path, environ=gpu_machine, step=step)
    (found,) = flight.left_out
    assert (found.level, found.topic) == ("fault", "numbers")
    assert found.text.startswith("GPU 1 fails")
    assert said in found.text
    assert flight.gpus == ("0",)
    texts = {finding.topic: finding.text for finding in flight.findings}
    assert texts["GPU"].startswith("1 with driver")
    assert texts["numbers"].startswith("GPU 0")
    assert texts["SyncBN"].startswith("2 processes (gloo")
    shapes = [finding for finding in flight.findings if finding.topic == "shapes"]
    assert [finding.level for finding in shapes] == ["warn", "ok"]
    assert "sync_batch · B=64 · digits on 2 devices" in shapes[0].text


def test_two_cards_that_compute_right_are_tried_together(
    tmp_path: Path, tasks: pytest.MonkeyPatch, gpu_machine: dict[str, str]
) -> None:
    flight = look([ROW], tmp_path, tmp_path, "1,0", environ=gpu_machine, step=right_step)
    assert (flight.gpus, flight.left_out) == (("1", "0"), ())
    assert preflight.positions(flight.gpus, gpu_machine) == "1,0"
    texts = [finding.text for finding in flight.findings]
    assert any("2 processes (NCCL on GPU 1 and GPU 0)" in text for text in texts)


def test_where_no_card_computes_right_nothing_is_tried_on_devices(
    tmp_path: Path, tasks: pytest.MonkeyPatch, gpu_machine: dict[str, str]
) -> None:
    flight = look([ROW], tmp_path, tmp_path, environ=gpu_machine, step=nan_everywhere)
    assert flight.gpus == ()
    assert [finding.text[:5] for finding in flight.left_out] == ["GPU 0", "GPU 1"]
    assert {"compiler", "data", "MLflow"} <= set(topics(flight.findings, "ok"))
    assert not {"numbers", "bf16", "SyncBN", "shapes"} & set(topics(flight.findings, "ok", "warn", "fault"))


def test_a_processor_that_computes_wrong_is_a_fault(tmp_path: Path, tasks: pytest.MonkeyPatch) -> None:
    flight = look([ROW], tmp_path, tmp_path, "none", environ={"PATH": ""}, step=nan_everywhere)
    assert topics(flight.findings, "fault") == ["numbers"]
    assert flight.left_out == ()


@pytest.mark.parametrize(("precision", "level"), [("32-true", "warn"), ("bf16-mixed", "fault")])
def test_bfloat16_is_a_fault_where_a_row_needs_it(
    tmp_path: Path, tasks: pytest.MonkeyPatch, gpu_machine: dict[str, str], precision: str, level: str
) -> None:
    tasks.setattr(known_step, "bf16_fault_here", bf16_fault_on_card_1)
    rows = [ROW.replace(precision=precision)]
    flight = look(rows, tmp_path, tmp_path, environ=gpu_machine, step=right_step)
    (found,) = [one for one in flight.findings if one.topic == "bf16" and one.level != "ok"]
    assert found.level == level
    assert "GPU 1" in found.text


@pytest.mark.parametrize(("devices", "level"), [(1, "warn"), (2, "fault")])
def test_synchronization_is_a_fault_where_a_row_needs_it(
    tmp_path: Path, tasks: pytest.MonkeyPatch, devices: int, level: str
) -> None:
    tasks.setattr(known_step, "sync_here", local_shares)
    flight = look([ROW.replace(devices=devices)], tmp_path, tmp_path, "none", environ={"PATH": ""})
    (found,) = [one for one in flight.findings if one.topic == "SyncBN"]
    assert found.level == level
    assert "loopback" in found.remedy


# --- Compiler, data, MLflow. ---


def answered(check: Callable[..., Iterator[Finding]], *arguments: Any) -> Finding:
    (finding,) = check(*arguments)
    assert "\n" not in finding.line()
    return finding


def test_without_a_compiler_training_is_eager(tmp_path: Path) -> None:
    answer = preflight._Answer((), tryouts.compile_function, str(tmp_path), str(tmp_path / "cache"))
    finding = answered(preflight._check_compiler, answer)
    assert finding.level == "warn"
    assert "eager" in finding.text
    assert "No working C++ compiler found" in finding.text
    assert "install gcc and g++" in finding.remedy


@pytest.mark.slow
def test_a_function_is_really_compiled(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    answer = preflight._Answer((), tryouts.compile_function, os.environ["PATH"], str(cache))
    assert answered(preflight._check_compiler, answer).level == "ok"
    assert list(cache.rglob("*.so"))


def test_a_compiler_that_computes_wrong_is_not_used() -> None:
    answer = preflight._Answer((), compiled_wrong, "", "")
    finding = answered(preflight._check_compiler, answer)
    assert finding.level == "warn"
    assert "off by 0.5" in finding.text


def test_missing_data_is_named_with_its_remedy(tmp_path: Path) -> None:
    rows = [Trial(data="cifar10", model="cnn"), ROW, Trial(data="image_folder", data_options={"path": "no"})]
    rows.append(Trial(data="cifar10", model="cnn", data_options={"synthetic": True}))
    loading = preflight._ask_data(preflight._Answer, rows, tmp_path)
    missing, images, present = preflight._check_data(loading, tmp_path)
    assert missing.level == images.level == "fault"
    assert missing.text.startswith(f"cifar10: {tmp_path}")
    assert missing.text.endswith("is missing")
    assert "`bnbench data cifar10`" in missing.remedy
    assert "no has no folder train/" in images.text
    assert present.text == f"digits in {tmp_path}"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def store_finding(stack: ExitStack, runs: Path, uri: str | None = None) -> Finding:
    writing = preflight._ask_mlflow(preflight._Answer, stack, uri, {}, runs)
    return answered(preflight._check_mlflow, writing)


def test_a_store_that_is_named_takes_a_run_again_and_again(tmp_path: Path) -> None:
    for _ in range(2):
        tryouts.write_run(f"sqlite:///{tmp_path / 'named.db'}", str(tmp_path / "runs"))
    with closing(sqlite3.connect(tmp_path / "named.db")) as db:
        assert db.execute("SELECT lifecycle_stage FROM runs").fetchall() == [("deleted",)] * 2
        stages = db.execute("SELECT name, lifecycle_stage FROM experiments").fetchall()
    assert dict(stages)["bnbench/preflight"] == "deleted"


def test_a_store_that_cannot_be_written_to_is_a_fault(tmp_path: Path, stack: ExitStack) -> None:
    (tmp_path / "mlflow.db").mkdir()
    finding = store_finding(stack, tmp_path)
    assert finding.level == "fault"
    assert "mlflow.db (Is a directory)" in finding.text
    assert "--tracking-uri" in finding.remedy


def test_a_folder_as_an_address_is_a_fault(tmp_path: Path, stack: ExitStack) -> None:
    finding = store_finding(stack, tmp_path, "file:mlruns")
    assert finding.level == "fault"
    assert "MLflow no longer writes to folders" in finding.text


def test_a_server_that_is_down_is_a_fault_without_its_password(tmp_path: Path, stack: ExitStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    finding = store_finding(stack, tmp_path, f"http://ada:secret@127.0.0.1:{port}")
    assert finding.level == "fault"
    assert f"127.0.0.1:{port}" in finding.text
    assert "secret" not in finding.line()


def test_no_password_is_shown() -> None:
    finding = answered(preflight._check_mlflow, ("", "API request to http://ada:secret@host failed"))
    assert "http://ada:***@host" in finding.text


def test_what_will_not_be_published_needs_no_store(tmp_path: Path, tasks: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"environ": {"PATH": ""}, "uri": "file:mlruns", "offline": True}
    flight = look([ROW], tmp_path, tmp_path, "none", **options)
    assert topics(flight.findings, "warn", "fault") == []
    assert "MLflow" not in topics(flight.findings, "ok")


# --- Shapes. ---


def tried(rows: list[Trial], folder: Path, *known: Trial) -> tuple[list[Finding], list[Trial]]:
    shapes: list[tuple[Trial, Result]] = []
    with ExitStack() as stack:
        found = preflight._check_shapes(rows, {shape_of(t) for t in known}, (), folder, folder, stack, shapes)
        return list(found), [trial for trial, _ in shapes]


def test_rows_of_one_shape_are_tried_once(tmp_path: Path) -> None:
    rows = [ROW.replace(lr=lr, seed=seed, steps=300) for lr in (0.1, 1.0) for seed in (0, 1)]
    rows += [ROW.replace(norm=norm, dropout=dropout) for norm in ("batch", "group") for dropout in (0, 0.5)]
    found, shapes = tried(rows, tmp_path)
    assert [(trial.norm, trial.dropout) for trial in shapes] == [("batch", 0.5), ("group", 0.5)]
    assert [finding.level for finding in found] == ["ok"]


def test_shapes_that_are_known_are_not_tried(tmp_path: Path) -> None:
    assert tried([ROW, ROW.replace(norm="group")], tmp_path, ROW)[1] == [ROW.replace(norm="group")]
    assert tried([ROW], tmp_path, ROW.replace(lr=1.0, seed=3)) == ([], [])


def test_shapes_that_fail_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    deadly = "tests.pretended_tasks:DiesInForward"
    rows = [
        *(ROW.replace(model=deadly, model_options={}, batch_size=size) for size in (32, 64)),
        ROW,
        ROW.replace(data="cifar10", batch_size=4096),
        ROW.replace(num_nodes=2),
    ]
    found, shapes = tried(rows, tmp_path)
    assert shapes == [ROW]
    by_level = {level: [f.text for f in found if f.level == level] for level in ("fault", "warn")}
    large, dead = sorted(by_level["fault"])
    assert dead.endswith(
        "DiesInForward · batch · B=32 · digits and 1 more: its process died (out of memory?)"
    )
    assert large.startswith("mlp · batch · B=4096 · cifar10: ")
    assert "4096" in large.partition(": ")[2]
    assert by_level["warn"] == ["mlp · batch · B=64 · digits on 2 devices: needs more devices than are here"]


def test_what_waits_behind_a_training_that_hangs_is_tried(
    tmp_path: Path, tasks: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    tasks.setattr(preflight, "DEVICE_TIMEOUT", 3.0)
    rows = [ROW.replace(norm=norm) for norm in ("none", "batch", "layer", "group")]
    answers = list(preflight._train(rows, [Slot(0, ("0",))], tmp_path, tmp_path, stack))
    assert [trial.norm for trial, _ in answers] == ["none", "batch", "layer", "group"]
    assert answers[0][1] == "no answer within 3 s"
    assert all(isinstance(result, Result) for _, result in answers[1:])


def peaks(rows: list[Trial], slots: list[Slot], folder: Path, stack: ExitStack) -> set[float]:
    answers = preflight._train(rows, slots, folder, folder, stack)
    return {result.metrics["memory/peak_mib"] for _, result in answers if isinstance(result, Result)}


def test_on_processors_each_shape_has_a_process_of_its_own(
    tmp_path: Path, tasks: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    rows = [ROW.replace(norm=norm) for norm in ("batch", "layer", "group")]
    assert len(peaks(rows, [Slot(0), Slot(1)], tmp_path, stack)) == 3
    assert len(peaks(rows, [Slot(0, ("0",))], tmp_path, stack)) == 1
