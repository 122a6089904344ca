"""Real faults on real processes: the study completes, and its numbers are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_study import (
    call,
    call_here,
    children_of,
    is_alive,
    keys_of,
    metrics_of,
    start,
    statuses,
    verdicts_of,
    write_tiny,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def write_small(folder: Path, **replaced: str) -> Path:
    """A study of some fifty rows."""
    fewer = {"replicates=5": "replicates=3", "(0.01, 0.1, 1.0)": "(0.1, 1.0)"}
    return write_tiny(folder, **fewer, **replaced)


#: What MLflow has after a fault is a test of its own; publishing would only make the others slower.
RUN = ("run", "tiny.py", "--preset", "quick", "--offline")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The runs folder of a run with one worker that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_small(folder)
    call_here(*RUN, "--workers", "1", folder=folder, data=data)
    return folder / "runs"


def wait_for_rows(runs: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many rows are recorded, or the process has ended."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(Exception):
            if sum(statuses(runs).values()) >= count:
                return
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The workers: the grandchildren, whose parent is the server that forks them."""
    return [pid for child in children_of(process.pid) for pid in children_of(child)]


def test_rerun_trains_nothing_and_says_so(undisturbed: Path, data: Path) -> None:
    before = metrics_of(undisturbed)
    out, _ = call_here(*RUN, folder=undisturbed.parent, data=data)
    assert "nothing was trained" in out
    assert metrics_of(undisturbed) == before


@pytest.mark.slow  # two workers that are killed are two as well
def test_two_workers_give_the_bits_of_one(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    write_small(tmp_path)
    call(*RUN, "--workers", "2", folder=tmp_path, data=data)
    assert verdicts_of(tmp_path / "runs") == verdicts_of(undisturbed)
    assert metrics_of(tmp_path / "runs") == metrics_of(undisturbed)


def disturb_workers(tmp_path: Path, data: Path, kills: int, seed: int) -> Path:
    """Kill workers at random moments of a run with two of them, and let it end.

    A row that kills its worker twice is rightly recorded as failed, so the next worker is killed only when
    the row of the last one is in the record.
    """
    chance = random.Random(seed)
    write_small(tmp_path)
    notes = tmp_path / "notes"
    with notes.open("w") as stderr:
        process = start(*RUN, "--workers", "2", "--quiet", folder=tmp_path, data=data, stderr=stderr)
    runs = tmp_path / "runs"
    killed = 0
    wait_for_rows(runs, 1, process)
    while killed < kills and process.poll() is None:
        time.sleep(chance.uniform(0.0, 0.3))
        rows, died = keys_of(runs), died_in(notes)
        if workers := workers_of(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(workers), signal.SIGKILL)
                killed += 1
        # One that was between two rows dies without a note: then others go on.
        while not ended(process) and died_in(notes) == died and len(keys_of(runs) - rows) <= 15:
            time.sleep(0.02)
        while not ended(process) and not died_in(notes) <= keys_of(runs):
            time.sleep(0.02)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, f"{out}\n{notes.read_text()}"
    assert killed >= 1
    return runs


def ended(process: subprocess.Popen[str]) -> bool:
    """Whether a process is no more."""
    return process.poll() is not None


def died_in(notes: Path) -> set[str]:
    """The rows whose worker has died so far, by what was printed."""
    return set(re.findall(r"the worker of row (\w+) died", notes.read_text()))


def test_killed_workers_lose_nothing(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    runs = disturb_workers(tmp_path, data, kills=3, seed=0)
    assert verdicts_of(runs) == verdicts_of(undisturbed)
    assert metrics_of(runs) == metrics_of(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 8))
def test_workers_killed_again_and_again_lose_nothing(
    undisturbed: Path, data: Path, tmp_path: Path, seed: int
) -> None:
    runs = disturb_workers(tmp_path, data, kills=3, seed=seed)
    assert verdicts_of(runs) == verdicts_of(undisturbed)


def stop(process: subprocess.Popen[str], signum: signal.Signals, group: bool = False) -> str:
    """End a run by a signal, and check that it leaves no process; returns what it said."""
    family = children_of(process.pid)
    (os.killpg if group else os.kill)(process.pid, signum)
    _, err = process.communicate(timeout=60)
    end = time.monotonic() + 10
    while any(map(is_alive, family)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in family if is_alive(pid)], "a child outlived its coordinator"
    return err


def stop_and_go_on(
    tmp_path: Path, data: Path, signum: signal.Signals, after: int, group: bool = False, command: Any = RUN
) -> tuple[Path, str, int]:
    """Stop a run once so many rows are recorded, and run it again."""
    write_small(tmp_path)
    runs = tmp_path / "runs"
    process = start(*command, "--workers", "2", folder=tmp_path, data=data)
    wait_for_rows(runs, after, process)
    err = stop(process, signum, group)
    recorded = metrics_of(runs)
    call(*command, "--workers", "2", folder=tmp_path, data=data)
    assert metrics_of(runs).items() >= recorded.items()
    return runs, err, process.returncode


def test_a_killed_coordinator_loses_nothing_and_leaves_no_run_running(
    undisturbed: Path, data: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    published = ("run", "tiny.py", "--preset", "quick")
    runs, _, code = stop_and_go_on(tmp_path, data, signal.SIGKILL, after=30, command=published)
    assert code == -signal.SIGKILL
    assert verdicts_of(runs) == verdicts_of(undisturbed)
    assert metrics_of(runs) == metrics_of(undisturbed)
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    found = client.search_experiments(filter_string="name LIKE 'bnbench/%'")
    pages = client.search_runs([e.experiment_id for e in found], max_results=1000)
    names = [page.data.tags["bnbench.item"] for page in pages if page.info.status != "KILLED"]
    assert len(names) == len(set(names)) > 20
    assert {page.info.status for page in pages} <= {"FINISHED", "KILLED"}


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 40])
def test_a_coordinator_killed_early_or_late_loses_nothing(
    undisturbed: Path, data: Path, tmp_path: Path, after: int
) -> None:
    runs, _, code = stop_and_go_on(tmp_path, data, signal.SIGKILL, after)
    assert code in (-signal.SIGKILL, 0)
    assert verdicts_of(runs) == verdicts_of(undisturbed)
    assert metrics_of(runs) == metrics_of(undisturbed)


@pytest.mark.slow
def test_a_killed_process_group_loses_nothing(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    runs, _, _ = stop_and_go_on(tmp_path, data, signal.SIGKILL, 20, group=True)
    assert verdicts_of(runs) == verdicts_of(undisturbed)


@pytest.mark.parametrize(
    ("signum", "group", "word"),
    [
        (signal.SIGINT, True, "interrupted"),
        pytest.param(signal.SIGTERM, False, "terminated", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, False, "terminated", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_is_one_line_and_resumable(
    undisturbed: Path, data: Path, tmp_path: Path, signum: signal.Signals, group: bool, word: str
) -> None:
    runs, err, code = stop_and_go_on(tmp_path, data, signum, 20, group)
    assert code == -(signal.SIGTERM if signum == signal.SIGHUP else signum)
    assert word in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert verdicts_of(runs) == verdicts_of(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(50))
def test_an_interrupt_at_any_moment_leaves_no_process(data: Path, tmp_path: Path, moment: int) -> None:
    write_small(tmp_path)
    process = start("run", "tiny.py", "--workers", "2", "--preset", "quick", folder=tmp_path, data=data)
    time.sleep(0.5 + 0.25 * moment)
    family = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 0)
    assert "Traceback" not in err
    assert not [pid for pid in family if is_alive(pid)]


def test_a_second_run_in_the_folder_says_who_holds_it_and_the_first_ends_with_one_line(
    data: Path, tmp_path: Path
) -> None:
    write_tiny(tmp_path, **{"replicates=5": "replicates=50"})
    first = start(*RUN, "--workers", "1", folder=tmp_path, data=data)
    try:
        wait_for_rows(tmp_path / "runs", 1, first)
        _, err = call_here(*RUN, folder=tmp_path, data=data, expect=2)
        assert f"process {first.pid}" in err
        assert len(err.strip().splitlines()) == 1
    finally:
        said = stop(first, signal.SIGTERM)
    assert first.returncode == -signal.SIGTERM
    assert "terminated" in said
    assert len(said.strip().splitlines()) == 1


def test_an_error_in_one_arm_leaves_the_others_complete(data: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, in_shape, num_classes):\n"
        "        super().__init__()\n"
        "        self.head = torch.nn.Linear(64, num_classes)\n"
        "        self.calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += self.training\n"
        "        if self.calls > 10:\n"
        "            raise RuntimeError('the net is broken')\n"
        "        return self.head(x.flatten(1))\n"
    )
    arm = 'Arm("batch", norm="batch", dropout=0.1)'
    write_small(tmp_path, **{arm: 'Arm("batch", model="broken:Net", model_options={})'})
    out, err = call_here(*RUN, folder=tmp_path, data=data, expect=1)
    assert "the net is broken" in out
    assert "Traceback" not in out + err
    # Of each arm the grid, and a confirmation at the rate that suits the arm without a fault.
    grid, confirmed = 2 * 3 * 2, 2 * 3
    found = statuses(tmp_path / "runs")
    assert found.pop("failed") == grid + confirmed
    assert sum(found.values()) == grid + confirmed
    assert b'"incomplete"' in verdicts_of(tmp_path / "runs")
