"""Publishing to a real MLflow server on this machine that is down, dies, comes back or is slow."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bnbench.registry import BadInput
from bnbench.tracking import Publisher, open_store, publish, serve_ui
from tests.tracking_records import REPLICATES, STUDY_HASH, doctored_record, runs_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MAIN, TUNING = "bnbench/pilot/quick", "bnbench/pilot/quick/tuning"


@pytest.fixture(autouse=True)
def close_connections() -> Iterator[None]:
    """Close the connections that MLflow keeps for the life of a process."""
    yield
    from mlflow.utils import request_utils

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        request_utils._cached_get_request_session.cache_clear()
        gc.collect()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """An MLflow server with its store in a folder; it can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environ = {**os.environ, "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < end, (self.folder / "log").read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def slow_proxy(target: str, delay: float) -> Iterator[str]:
    """A proxy that passes every call on after so many seconds."""

    class Handler(BaseHTTPRequestHandler):
        def _pass_on(self) -> None:
            time.sleep(delay)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
            request = urllib.request.Request(target + self.path, body or None, kept, method=self.command)
            try:
                answer = urllib.request.urlopen(request)
            except urllib.error.HTTPError as error:
                answer = error
            content = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


def assert_all_once(uri: str, runs: Path) -> None:
    store = open_store(uri, runs)
    main, tuning = runs_of(store, MAIN), runs_of(store, TUNING)
    assert set(Counter(r.info.run_name for r in main).values()) == {1}
    assert len(main) == 2 + 2 * 2 * REPLICATES + 1
    assert len(tuning) == 2 * REPLICATES
    assert {r.info.status for r in (*main, *tuning)} == {"FINISHED"}
    for run in main:
        if run.data.tags["bnbench.level"] == "training":
            assert len(store.client.get_metric_history(run.info.run_id, "val/loss")) == 5
            files = {f.path for f in store.client.list_artifacts(run.info.run_id)}
            assert files == {"trial.json", "result.json"}


def test_a_server_that_is_down_is_refused_at_once_with_its_address(tmp_path: Path) -> None:
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"http://me:\*\*\*@127\.0\.0\.1") as refused:
        open_store(uri, tmp_path)
    assert time.monotonic() - began < 10
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_gets_everything_once_when_it_is_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = Server(tmp_path)
    try:
        server.start()
        store = open_store(server.uri, tmp_path)
        with doctored_record(tmp_path) as record:
            publisher = Publisher(store, tmp_path / "bnbench.db", tmp_path, look_every=0.1)
            publisher.start()
            publisher.notify(STUDY_HASH)
            while len(record.published(server.uri)) < 5:
                time.sleep(0.01)
            server.kill()
            began = time.monotonic()
            while not publisher.problem:
                publisher.notify(STUDY_HASH)
                assert time.monotonic() - began < 60
                time.sleep(0.05)
            assert server.uri in publisher.problem and "\n" not in publisher.problem
            sent = len(record.published(server.uri))
            assert 5 <= sent < 21
            server.start()
            counts = publisher.close(120)
            assert (counts.left, publisher.problem) == (0, "")
        assert_all_once(server.uri, tmp_path)
        assert capfd.readouterr().out == ""
    finally:
        server.kill()


@pytest.mark.slow
def test_closing_beside_a_dead_server_is_bounded_and_a_later_publish_sends_the_rest(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        server.start()
        store = open_store(server.uri, tmp_path)
        with doctored_record(tmp_path) as record:
            server.kill()
            publisher = Publisher(store, tmp_path / "bnbench.db", tmp_path, look_every=0.1)
            publisher.start()
            publisher.notify(STUDY_HASH)
            began = time.monotonic()
            publisher.close(3)
            assert time.monotonic() - began < 5
            counts = publish(record, store)
            assert counts.published == 0 and counts.left > 0 and counts.error
            server.start()
            counts = publish(record, store)
            assert (counts.left, counts.error) == (0, "")
        assert_all_once(server.uri, tmp_path)
    finally:
        server.kill()


@pytest.mark.slow
def test_a_slow_server_makes_nobody_wait(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        server.start()
        with slow_proxy(server.uri, 0.2) as uri, doctored_record(tmp_path):
            store = open_store(uri, tmp_path)
            publisher = Publisher(store, tmp_path / "bnbench.db", tmp_path, look_every=0.1)
            publisher.start()
            time.sleep(0.5)
            longest = 0.0
            for _ in range(100):
                began = time.monotonic()
                publisher.notify(STUDY_HASH)
                longest = max(longest, time.monotonic() - began)
                time.sleep(0.01)
            assert longest < 0.15  # Less than one call of the server.
            began = time.monotonic()
            counts = publisher.close(1)
            assert time.monotonic() - began < 3
            assert counts.published < 21
            publisher.close(200)
        assert_all_once(server.uri, tmp_path)
    finally:
        server.kill()


@pytest.mark.slow
def test_the_ui_takes_a_free_port_on_loopback_and_ends_with_its_children(tmp_path: Path) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    code = f"""
import sys
from pathlib import Path
from bnbench.tracking import serve_ui, tracking_uri
runs = Path({str(tmp_path / "rüns 1%")!r})
sys.exit(serve_ui(runs, tracking_uri(None, {{}}, runs), {port}, lambda line: print(line, flush=True)))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stdout is not None
        first, second = child.stdout.readline(), child.stdout.readline()
        assert str(port) in first and "taken" in first
        address = second.split()[1].partition("/#")[0]
        used = int(address.rsplit(":", 1)[1])
        assert used > port
        assert b"<html" in urllib.request.urlopen(address, timeout=10).read()
        # A page of another site that names this server by a host of its own is turned away.
        search = f"{address}/api/2.0/mlflow/experiments/search?max_results=1"
        odd = urllib.request.Request(search, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(odd, timeout=10)
        assert refused.value.code == 403
        children = _children(child.pid)
        assert children
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(20) == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        taken.close()
        child.kill()
        child.wait()
        child.stdout.close() if child.stdout else None


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found += [int(folder.name), *_children(int(folder.name))]
    return found


def test_the_ui_of_a_server_is_its_address(tmp_path: Path) -> None:
    lines: list[str] = []
    assert serve_ui(tmp_path, "http://me:secret@h:5000", say=lines.append) == 0
    assert lines == ["MLflow: http://me:***@h:5000"]
