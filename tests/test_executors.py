"""Tests of the local workers, with real processes and real signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from bnbench.engine.executors import LocalPool
from bnbench.placement import Slot, device_here, plan_workers
from bnbench.registry import BadInput


def where(*words: str) -> tuple[str, ...]:
    return (device_here(), str(os.getpid()), *words)


def confinement() -> dict[str, Any]:
    import torch

    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    return {**{name: os.environ[name] for name in names}, "threads": torch.get_num_threads()}


def announce_and_sleep(path: str, seconds: float = 60.0) -> str:
    Path(path).write_text(str(os.getpid()))
    time.sleep(seconds)
    return "awake"


def nap() -> str:
    time.sleep(0.1)
    return device_here()


def ignore_and_sleep(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    announce_and_sleep(path)


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise BadInput("no such thing")


def hit_the_end_of_a_file() -> None:
    raise EOFError("truncated")


def leave() -> None:
    sys.exit(3)


def give_what_cannot_be_sent() -> Callable[[], None]:
    return lambda: None


def is_alive(pid: int) -> bool:
    """Whether a process runs; what has ended and was not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(holds: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


def pid_in(path: Path) -> int:
    return int(wait_until(lambda: path.exists() and path.read_text()))


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(plan_workers((), 2, cpu_count=2)) as pool:
        yield pool
        for task in [pool.submit(time.sleep, 0.2) for _ in range(2)]:
            task.result()
        pids = pool.worker_pids()
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


def test_a_worker_is_confined_to_its_slot(pool: LocalPool) -> None:
    assert pool.submit(confinement).result() == {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "threads": 1,
    }
    assert pool.submit(where, "a", "b").result()[::2] == ("cpu", "a")


def test_two_slots_work_at_the_same_time(pool: LocalPool, tmp_path: Path) -> None:
    tasks = [pool.submit(announce_and_sleep, str(tmp_path / name), 0.5) for name in ("a", "b")]
    assert {pid_in(tmp_path / "a"), pid_in(tmp_path / "b")} <= set(pool.worker_pids())
    assert not any(task.done() for task in tasks)
    assert [task.result() for task in tasks] == ["awake", "awake"]


@pytest.mark.parametrize(
    ("task", "error", "said"),
    [
        (refuse, BadInput, "no such thing"),
        (hit_the_end_of_a_file, EOFError, "truncated"),
        (give_what_cannot_be_sent, RuntimeError, "pickle"),
    ],
)
def test_what_a_task_raises_comes_home_and_harms_no_worker(
    pool: LocalPool, task: Callable[..., Any], error: type[Exception], said: str
) -> None:
    before = pool.worker_pids()
    with pytest.raises(error, match=said):
        pool.submit(task).result()
    assert pool.worker_pids() == before
    assert pool.submit(where).result()[0] == "cpu"


def test_a_task_that_cannot_be_sent_is_an_error_of_its_own(pool: LocalPool) -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        pool.submit(where, lambda: None).result()
    with pytest.raises(TypeError, match="word"):
        pool.submit(where, word="a")
    assert pool.submit(where).result()[0] == "cpu"


def test_the_death_of_a_worker_fails_its_own_task_only(pool: LocalPool, tmp_path: Path) -> None:
    doomed = pool.submit(announce_and_sleep, str(tmp_path / "doomed"))
    other = pool.submit(announce_and_sleep, str(tmp_path / "other"), 0.5)
    more = [pool.submit(where, str(index)) for index in range(6)]
    os.kill(pid_in(tmp_path / "doomed"), signal.SIGKILL)
    with pytest.raises(BrokenExecutor, match="died in the middle"):
        doomed.result()
    assert other.result() == "awake"
    assert [task.result()[2] for task in more] == [str(index) for index in range(6)]


@pytest.mark.parametrize("end", [kill_oneself, leave])
def test_whoever_kills_its_worker_is_to_blame(pool: LocalPool, end: Callable[..., Any]) -> None:
    tasks = [pool.submit(task) for task in (end, where, end, where)]
    for task in tasks[::2]:
        with pytest.raises(BrokenExecutor):
            task.result()
    assert all(task.result()[0] == "cpu" for task in tasks[1::2])


def test_the_death_of_an_idle_worker_costs_no_task(pool: LocalPool) -> None:
    for _ in range(3):
        assert [task.result() for task in [pool.submit(nap) for _ in "ab"]] == ["cpu", "cpu"]
        pids = pool.worker_pids()
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert [task.result() for task in [pool.submit(nap) for _ in "abcd"]] == ["cpu"] * 4
        assert not set(pids) & set(pool.worker_pids())


def test_a_task_that_waits_can_be_cancelled(pool: LocalPool, tmp_path: Path) -> None:
    busy = [pool.submit(announce_and_sleep, str(tmp_path / name), 0.4) for name in "ab"]
    waiting = pool.submit(where)
    assert waiting.cancel()
    assert [task.result() for task in busy] == ["awake", "awake"]
    assert pool.submit(where).result()[0] == "cpu"


def outcome(future: Future[Any]) -> type[BaseException]:
    with pytest.raises((BrokenExecutor, CancelledError)) as caught:
        future.result(timeout=5)
    return caught.type


def test_stopping_ends_workers_that_ignore_the_signal(tmp_path: Path) -> None:
    pool = LocalPool(plan_workers((), 2, cpu_count=2), grace=0.3)
    running = [pool.submit(ignore_and_sleep, str(tmp_path / name)) for name in "ab"]
    pids = [pid_in(tmp_path / name) for name in "ab"]
    waiting = pool.submit(where)
    time.sleep(0.05)
    began = time.monotonic()
    pool.shutdown()
    assert 0.3 < time.monotonic() - began < 3  # the grace is for all workers together
    assert not any(map(is_alive, pids))
    assert pool.worker_pids() == []
    assert issubclass(outcome(running[0]), BrokenExecutor) and issubclass(outcome(running[1]), BrokenExecutor)
    outcome(waiting)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="stopped"):
        pool.submit(where)


def test_a_pool_that_did_nothing_can_be_stopped() -> None:
    LocalPool(plan_workers((), 1, cpu_count=1)).shutdown()


def test_a_worker_that_cannot_start_fails_the_task() -> None:
    # No environment takes such a name.
    with LocalPool([Slot(0, ("\0",))]) as pool, pytest.raises(BrokenExecutor, match="before it began"):
        pool.submit(where).result()


def start_a_process() -> int:
    child = multiprocessing.get_context("fork").Process(target=os._exit, args=(7,))
    child.start()
    child.join(10)
    assert child.exitcode is not None
    return child.exitcode


@pytest.mark.parametrize("devices", [1, 2])
def test_a_worker_may_start_processes_of_its_own(pool: LocalPool, devices: int) -> None:
    assert pool.submit(start_a_process, devices=devices).result() == 7


COORDINATOR = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from bnbench.engine.executors import LocalPool
from bnbench.placement import plan_workers
from tests.test_executors import announce_and_sleep
folder = Path(sys.argv[1])
pool = LocalPool(plan_workers((), 2, cpu_count=2))
tasks = [pool.submit(announce_and_sleep, str(folder / name)) for name in sys.argv[2:]]
try:
    tasks[0].result()
except KeyboardInterrupt:
    print("interrupted", [task.done() for task in tasks], flush=True)
    sys.stdin.read(1)
    pool.shutdown()
"""

FORGETFUL = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from bnbench.engine.executors import LocalPool
from bnbench.placement import plan_workers
from tests.test_executors import announce_and_sleep, pid_in
folder = Path(sys.argv[1])
pool = LocalPool(plan_workers((), 2, cpu_count=2))
for name in sys.argv[2:]:
    pool.submit(announce_and_sleep, str(folder / name))
    pid_in(folder / name)
raise RuntimeError("forgot to stop the workers")
"""


def coordinator(folder: Path, *names: str, program: str = COORDINATOR) -> subprocess.Popen[str]:
    code = program.format(root=str(Path(__file__).parents[1]))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def group(process: subprocess.Popen[str]) -> list[int]:
    """All processes of the group that a coordinator leads: itself, its workers and the servers between."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == process.pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_outlive_ctrl_c_in_silence_but_not_their_coordinator(tmp_path: Path) -> None:
    with coordinator(tmp_path, "a", "b") as process:
        assert process.stdout is not None and process.stderr is not None
        pids = [pid_in(tmp_path / "a"), pid_in(tmp_path / "b")]
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "interrupted [False, False]\n"
        time.sleep(0.2)
        assert all(map(is_alive, pids))
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)), seconds=2)
        wait_until(lambda: not group(process))
        assert process.stderr.read() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_while_workers_start_is_silent_too(tmp_path: Path) -> None:
    with coordinator(tmp_path, "a") as process:
        assert process.stdin is not None and process.stderr is not None
        # The coordinator, the resource tracker and the server, which is loading torch.
        wait_until(lambda: len(group(process)) >= 3)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0
        wait_until(lambda: not group(process))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_coordinator_that_crashes_waits_for_no_worker(tmp_path: Path) -> None:
    with coordinator(tmp_path, "a", "b", program=FORGETFUL) as process:
        assert process.stderr is not None
        pids = [pid_in(tmp_path / "a"), pid_in(tmp_path / "b")]
        assert process.stderr.read().splitlines()[-1] == "RuntimeError: forgot to stop the workers"
        assert process.wait(10) == 1
        assert not any(map(is_alive, pids))
        wait_until(lambda: not group(process))
