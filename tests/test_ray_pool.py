"""Tests of the workers of a Ray cluster, on real nodes of this machine that are really killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import pytest

from bnbench.engine import ray_pool
from bnbench.engine.ray_pool import RayPool
from bnbench.registry import BadInput
from tests.ray_cluster import Cluster, cluster
from tests.test_executors import (
    announce_and_sleep,
    confinement,
    hit_the_end_of_a_file,
    kill_oneself,
    pid_in,
    refuse,
    wait_until,
    where,
)
from tests.test_executors_wide import hold_devices, replay
from tests.test_faults import wait_for_rows
from tests.tiny_study import call, metrics_of, start, verdicts_of, write_tiny


def meet(folder: str, name: str, count: int) -> str:
    """Wait for the other tasks of a group, and say on which GPU."""
    (Path(folder) / f"met-{name}").touch()
    wait_until(lambda: len(list(Path(folder).glob("met-*"))) == count, seconds=60)
    return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    # The GPUs exist in Ray's books only: tasks of these tests never use them.
    with cluster(("4,GPU-x", "", "")) as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@contextlib.contextmanager
def pool_of(nodes: Cluster, **options: Any) -> Iterator[RayPool]:
    pool = RayPool(nodes.address, **options)
    try:
        yield pool
    finally:
        pool.shutdown()


@pytest.fixture(scope="module")
def pool(nodes: Cluster) -> Iterator[RayPool]:
    before = signal.getsignal(signal.SIGTERM)
    with pool_of(nodes, gpus="none") as joined:
        # Ray takes the signal for itself, and a coordinator would end without its line.
        assert signal.getsignal(signal.SIGTERM) is before
        yield joined


def test_each_core_of_each_node_is_a_place(pool: RayPool) -> None:
    assert (pool.width, pool.gpus) == (3, 0)


def test_a_task_on_a_core_sees_no_gpu_of_its_node_and_has_one_thread(pool: RayPool) -> None:
    expected = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "threads": 1}
    assert [task.result() for task in [pool.submit(confinement) for _ in range(6)]] == [expected] * 6


@pytest.mark.parametrize(
    ("task", "error", "said"),
    [(refuse, BadInput, "no such thing"), (hit_the_end_of_a_file, EOFError, "trunc")],
)
def test_what_a_task_raises_comes_home_as_it_is(
    pool: RayPool, task: Callable[..., Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        pool.submit(task).result()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_a_task_that_kills_its_worker_is_to_blame_and_no_other_is(pool: RayPool) -> None:
    tasks = [pool.submit(task) for task in (kill_oneself, where, where)]
    with pytest.raises(BrokenExecutor, match="died in the middle"):
        tasks[0].result()
    assert [task.result()[0] for task in tasks[1:]] == ["cpu", "cpu"]


def test_on_cores_a_row_of_many_devices_takes_what_one_node_has(pool: RayPool) -> None:
    assert pool.submit(where, devices=8).result()[0] == "cpu"


def test_a_closed_pool_takes_no_task_and_ends_those_that_run(
    pool: RayPool, nodes: Cluster, tmp_path: Path
) -> None:
    task = pool.submit(announce_and_sleep, str(tmp_path / "running"))
    pid = pid_in(tmp_path / "running")
    pool.shutdown()
    with pytest.raises(BrokenExecutor, match="closed"):
        task.result(0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(where)
    wait_until(lambda: not any(pid in nodes.processes(node) for node in range(3)))


@pytest.mark.slow
def test_gpus_are_shared_as_far_as_was_asked_for_and_wide_rows_get_whole_ones(
    nodes: Cluster, tmp_path: Path
) -> None:
    wanted = [1, 1, 1, 2, 1, 1, 2, 1, 1, 1]
    with pool_of(nodes, per_gpu=2) as pool:
        assert (pool.width, pool.gpus) == (4, 2)
        with pytest.raises(BadInput, match="3 GPUs"):
            pool.submit(where, devices=3)
        tasks = [
            pool.submit(hold_devices, str(tmp_path), str(name), 0.1, devices=devices)
            for name, devices in enumerate(wanted)
        ]
        answers = [task.result() for task in tasks]
        # All four meet, so they ran at the same time.
        met = [pool.submit(meet, str(tmp_path), str(name), 4) for name in range(4)]
        assert sorted(task.result() for task in met) == ["4", "4", "GPU-x", "GPU-x"]
    _, gpus, most = replay(tmp_path)
    assert most <= 2
    for answer, devices in zip(answers, wanted, strict=True):
        assert len(answer.split(",")) == devices
        assert set(answer.split(",")) <= {"4", "GPU-x"}
    wide = {name for name, devices in enumerate(wanted) if devices == 2}
    log = (tmp_path / "log").read_text().splitlines()
    for name in wide:
        begin, end = (log.index(f"{name} {word} {','.join(gpus[str(name)])}") for word in ("begins", "ends"))
        assert end == begin + 1, "another task ran beside a row that needs whole GPUs"


def test_nodes_with_other_versions_are_refused_unless_they_are_asked_for(
    nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ray_pool._versions()
    monkeypatch.setattr(ray_pool, "_versions", lambda: {**here, "torch": "1.0"})
    said = rf"torch {re.escape(here['torch'])}.*torch 1\.0.*--allow-mixed"
    with pytest.raises(BadInput, match=said) as caught:
        RayPool(nodes.address)
    assert "\n" not in str(caught.value)
    with pool_of(nodes, gpus="none", allow_mixed=True) as pool:
        assert pool.submit(where).result()[0] == "cpu"


def test_cards_by_their_position_are_refused() -> None:
    with pytest.raises(BadInput, match="--gpus 0,2"):
        RayPool("auto", gpus="0,2")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:port"])
def test_an_address_that_is_none_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(BadInput, match=f"--ray {address}: no Ray cluster") as caught:
        RayPool(address)
    assert "\n" not in str(caught.value)


def test_a_cluster_that_is_not_there_is_refused_soon() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(BadInput, match=r"refused.*ray start"):
            RayPool(address)
        assert time.monotonic() - began < 10


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r'pip install -c constraints.txt -e "\.\[ray\]"'):
        RayPool("auto")


SMALL = {"replicates=5": "replicates=3"}


def start_study(nodes: Cluster, folder: Path, data: Path) -> tuple[Path, subprocess.Popen[str]]:
    study = write_tiny(folder, **SMALL)
    arguments = ("--ray", nodes.address, "--gpus", "none", "--preset", "quick", "--quiet")
    return folder / "runs", start("run", study, *arguments, folder=folder, data=data)


@pytest.mark.slow
def test_a_study_gives_the_bits_of_local_workers_also_when_a_node_is_killed(
    nodes: Cluster, data: Path, tmp_path: Path
) -> None:
    local, far = tmp_path / "local", tmp_path / "far"
    local.mkdir()
    far.mkdir()
    call("run", write_tiny(local, **SMALL), "--workers", "2", "--preset", "quick", folder=local, data=data)
    runs, process = start_study(nodes, far, data)
    wait_for_rows(runs, 15, process)
    nodes.kill(2, "raylet/raylet")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"{out}\n{err}"
    assert "raylet" not in out + err  # Ray's own words do not flood the terminal
    assert metrics_of(runs) == metrics_of(local / "runs")
    assert verdicts_of(runs) == verdicts_of(local / "runs")
    wait_until(lambda: not nodes.processes(2, "ray::"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "line"), [(signal.SIGINT, "interrupted: "), (signal.SIGTERM, "terminated: ")]
)
def test_an_interrupt_ends_the_tasks_on_all_nodes(
    nodes: Cluster, data: Path, tmp_path: Path, signum: signal.Signals, line: str
) -> None:
    runs, process = start_study(nodes, tmp_path, data)
    wait_for_rows(runs, 5, process)
    os.kill(process.pid, signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signum
    assert err.strip().startswith(line) and len(err.strip().splitlines()) == 1
    wait_until(lambda: not any(nodes.processes(node, "ray::_work") for node in range(3)), seconds=10)


@pytest.mark.slow
def test_a_dead_head_ends_the_run_in_one_line_and_the_next_goes_on(data: Path, tmp_path: Path) -> None:
    with cluster(("", "")) as mortal:
        runs, process = start_study(mortal, tmp_path, data)
        wait_for_rows(runs, 15, process)
        recorded = metrics_of(runs)
        mortal.kill(0)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "the head of the Ray cluster" in err and len(err.strip().splitlines()) == 1
    call("run", tmp_path / "tiny.py", "--preset", "quick", folder=tmp_path, data=data)
    assert metrics_of(runs).items() >= recorded.items()
