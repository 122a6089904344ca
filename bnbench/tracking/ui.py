"""Serving MLflow's pages over a store, on this machine alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from bnbench.registry import BadInput
from bnbench.tracking.address import mask
from bnbench.tracking.store import open_store, prepare_environment

_HOST = "127.0.0.1"
#: Without the second part MLflow shows its pages for language models.
_PAGE = "#/experiments?workflowType=machine_learning"


def serve_ui(runs: Path, uri: str, port: int = 5000, say: Callable[[str], None] = print) -> int:
    """Serve the store's pages until Ctrl-C or SIGTERM, and give the exit code: 0, or the server's own.

    A port that is taken is told, and the next free one is used. The server binds to the loopback address
    only, and MLflow's check of the host that a browser asks for stays on. Of a store that is a server
    itself only the address is told.
    """
    if re.match(r"https?:", uri):
        say(f"MLflow: {mask(uri)}")
        return 0
    store = open_store(uri, runs)
    if store.notice:
        say(store.notice)
    free = _free_port(port)
    if free != port:
        say(f"port {port} is taken: using {free}")
    environ = {
        **os.environ,
        # Jobs are for language models; without them there is no second process.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # By environment, so that a password is in no list of processes.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": store.artifacts or "",
    }
    prepare_environment(environ)
    runs.mkdir(parents=True, exist_ok=True)
    log = runs / "mlflow-server.log"
    options = ["--host", _HOST, "--port", str(free), "--workers", "1"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            env=environ,
            cwd=runs,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        address = f"http://{_HOST}:{free}"
        while server.poll() is None and not _answers(address):
            time.sleep(0.2)
        if server.poll() is None:
            say(f"MLflow: {address}/{_PAGE}   (Ctrl-C ends it)")
        code = server.wait()
        say(f"the MLflow server ended with exit code {code}; its log is {log}")
        return code or 1
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
        _end(server)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _answers(address: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(f"{address}/health", timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def _free_port(first: int) -> int:
    for port in range(first, min(first + 100, 65536)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((_HOST, port))
            return port
    raise BadInput(f"no free port from {first} to {first + 99}; name another with --port")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server with all its processes, which are one group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=5)
