"""Tests of the lock on a folder, with real processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bnbench.engine.lock import hold
from bnbench.registry import BadInput

HOLDER = """
import sys
from pathlib import Path
from bnbench.engine.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(runs: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(runs)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    runs = tmp_path / "new" / "runs"
    with holder(runs) as process:
        with pytest.raises(BadInput) as caught, hold(runs):
            pass
        said = str(caught.value)
        assert "\n" not in said and str(runs) in said and "--runs" in said
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.search(rf"process {process.pid} on {re.escape(socket.gethostname())} since {since}", said)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(runs):
            assert f"process {os.getpid()} on" in (runs / ".lock").read_text()


def test_the_holder_frees_the_folder_when_it_ends(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        with pytest.raises(BadInput, match=f"in use by process {os.getpid()} "), hold(tmp_path):
            pass
        _ = 1 / 0
    with hold(tmp_path):
        assert len((tmp_path / ".lock").read_text().splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for runs in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/self")):
        with pytest.raises(BadInput, match=r"cannot write to .*--runs") as caught, hold(runs):
            pass
        assert "\n" not in str(caught.value)


def test_a_disk_that_knows_no_locks_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(BadInput, match=r"cannot lock .*: No locks available; --runs names"), hold(tmp_path):
        pass
