"""Tests of the script for SLURM: its syntax, and a whole job whose machines are this one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_study import statuses, write_tiny

SCRIPT = Path(__file__).parents[1] / "deploy" / "slurm.sh"

# Takes its options for granted, and runs the command here.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


def test_the_script_can_be_read() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_has_no_trap_of_the_shell() -> None:
    assert subprocess.run(["shellcheck", SCRIPT]).returncode == 0


def submit(folder: Path, job: int, *arguments: str) -> subprocess.Popen[str]:
    """Start the script as SLURM would, on an allocation of two machines of one core."""
    pytest.importorskip("ray")
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\nprintf 'one\\ntwo\\n'\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "BIN": str(Path(sys.executable).parent),
        "BNBENCH_DATA": str(folder / "data"),
        "CUDA_VISIBLE_DEVICES": "",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "[one-two]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": str(folder),
        "TMPDIR": str(folder / "disk"),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_is_continued_by_the_next(tmp_path: Path) -> None:
    study = str(write_tiny(tmp_path))
    first = submit(tmp_path, os.getpid(), study, "--preset", "quick")
    database = next_file(tmp_path / "disk", "*/runs/bnbench.db")
    wait_for_some_rows(database)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 143, out
    assert (tmp_path / "rows.parquet").exists()
    assert not list((tmp_path / "disk").glob("bnbench-*"))
    second = submit(tmp_path, os.getpid() + 1, study, "--preset", "quick")
    out, _ = second.communicate(timeout=240)
    assert second.returncode == 0, out
    assert "rows added" in out and " reused" in out
    assert (tmp_path / "results" / "report" / "index.html").exists()


def next_file(folder: Path, pattern: str) -> Path:
    end = time.monotonic() + 120
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return found[0]


def wait_for_some_rows(database: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(sqlite3.OperationalError):  # the file is there before its table
            if sum(statuses(database.parent).values()) >= 10:
                return
        time.sleep(0.1)
    pytest.fail("waited in vain")
