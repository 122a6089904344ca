"""A real Ray cluster of several nodes on this machine, for tests that kill them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("ray", reason='needs Ray: pip install -c constraints.txt -e ".[ray]"')

_START = "start --node-ip-address=127.0.0.1 --num-cpus=1 --object-store-memory=80000000 --block"


def _wait(holds: Callable[[], object], complaint: str) -> None:
    end = time.monotonic() + 150
    while not holds():
        assert time.monotonic() < end, complaint
        time.sleep(0.05)


class Cluster:
    """Nodes of one core each, the first of which is the head; `gpus` names the made-up GPUs of each."""

    def __init__(self, gpus: Sequence[str] = ("", "", "")) -> None:
        # Sockets lie below it, and their names must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="bnr"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.folder}")
        self.nodes: list[subprocess.Popen[bytes]] = []
        try:
            for node, names in enumerate(gpus):
                self.nodes.append(
                    self._start(names, *(head if node == 0 else (f"--address={self.address}",)))
                )
                # One after the other, since nodes of one machine choose free names of files and sockets.
                _wait(lambda node=node: self.processes(node, "raylet/raylet"), f"node {node} did not start")
            _wait(lambda: self.status().count(" node_") == len(gpus), "not all nodes joined")
        except BaseException:
            self.stop()
            raise

    def _start(self, gpus: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": gpus}
        count = len(gpus.split(",")) if gpus else 0
        program = Path(sys.executable).with_name("ray")
        return subprocess.Popen(
            [program, *_START.split(), f"--num-gpus={count}", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Its own session, by which its processes are found.
            start_new_session=True,
        )

    def status(self) -> str:
        """What `ray status` prints."""
        program = Path(sys.executable).with_name("ray")
        call = [program, "status", f"--address={self.address}"]
        return subprocess.run(call, capture_output=True, text=True, timeout=60).stdout

    def processes(self, node: int, name: str = "") -> list[int]:
        """The living processes of a node whose command line has this name."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                command = (entry / "cmdline").read_text().replace("\0", " ")
                if int(session) == self.nodes[node].pid and state != "Z" and name in command:
                    found.append(int(entry.name))
        return found

    def kill(self, node: int, name: str = "") -> None:
        """End the processes of a node that have this name, by SIGKILL; without a name, the whole node."""
        for pid in self.processes(node, name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End everything."""
        for number, node in enumerate(self.nodes):
            while self.processes(number):
                self.kill(number)
                time.sleep(0.05)
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(gpus: Sequence[str] = ("", "", "")) -> Iterator[Cluster]:
    """A cluster that ends with its block."""
    started = Cluster(gpus)
    try:
        yield started
    finally:
        started.stop()
