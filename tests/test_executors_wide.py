"""Tests of tasks that need several devices, on GPUs that a list only names and on cores."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, CancelledError
from pathlib import Path
from random import Random

import pytest

from bnbench.engine.executors import LocalPool
from bnbench.placement import plan_workers
from bnbench.registry import BadInput
from tests.test_executors import announce_and_sleep, is_alive, outcome, pid_in, where


def hold_devices(folder: str, name: str, seconds: float) -> str:
    """Write down when a task begins and ends, and on which GPUs; an appended line is never torn."""
    gpus = os.environ["CUDA_VISIBLE_DEVICES"]
    log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{name} begins {gpus}\n".encode())
    time.sleep(seconds)
    os.write(log, f"{name} ends {gpus}\n".encode())
    os.close(log)
    return gpus


def replay(folder: Path) -> tuple[list[str], dict[str, list[str]], int]:
    """The names in the order of their beginning, each one's GPUs, and the most tasks a GPU had at once."""
    order: list[str] = []
    gpus: dict[str, list[str]] = {}
    load: Counter[str] = Counter()
    most = 0
    for line in (folder / "log").read_text().splitlines():
        name, event, devices = line.split(" ")
        gpus[name] = devices.split(",")
        load.update(dict.fromkeys(gpus[name], 1 if event == "begins" else -1))
        most = max(most, *load.values())
        order += [name] if event == "begins" else []
    assert not any(load.values())
    return order, gpus, most


@pytest.mark.parametrize("per_gpu", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_no_gpu_is_ever_given_to_more_tasks_than_it_may_have(tmp_path: Path, per_gpu: int, seed: int) -> None:
    chance = Random(seed)
    inherited = ("4", "GPU-x", "7", "MIG-y")
    wanted = [chance.choice((1, 1, 1, 2, 3)) for _ in range(24)]
    with LocalPool(plan_workers(inherited, per_gpu=per_gpu)) as pool:
        assert (pool.width, pool.gpus) == (4 * per_gpu, 3)
        tasks = [
            pool.submit(hold_devices, str(tmp_path), str(name), chance.uniform(0, 0.04), devices=devices)
            for name, devices in enumerate(wanted)
        ]
        answers = [task.result() for task in tasks]
    order, gpus, most = replay(tmp_path)
    assert sorted(map(int, order)) == list(range(24))
    assert most <= per_gpu
    for name, devices in enumerate(wanted):
        assert answers[name] == ",".join(gpus[str(name)])
        assert len(set(gpus[str(name)])) == devices
        assert set(gpus[str(name)]) <= set(inherited)
        # CUDA shows a process one part of a card at most.
        assert devices == 1 or "MIG-y" not in gpus[str(name)]


def test_tasks_begin_in_their_order_so_a_wide_one_waits_for_those_before_it_only(tmp_path: Path) -> None:
    with LocalPool(plan_workers(("0", "1"))) as pool:
        folder = str(tmp_path)
        tasks = [pool.submit(hold_devices, folder, "long", 0.4)]
        tasks += [pool.submit(hold_devices, folder, "wide", 0.1, devices=2)]
        tasks += [pool.submit(hold_devices, folder, f"behind-{n}", 0.0) for n in range(6)]
        for task in tasks:
            task.result()
    order, gpus, _ = replay(tmp_path)
    # GPU 1 stays idle beside the long task, or the tasks behind could keep the wide one waiting for ever.
    assert order[:2] == ["long", "wide"]
    assert sorted(gpus["wide"]) == ["0", "1"]


def test_a_wide_task_that_waits_can_be_cancelled(tmp_path: Path) -> None:
    with LocalPool(plan_workers(("0", "1"))) as pool:
        first = pool.submit(hold_devices, str(tmp_path), "first", 0.3)
        wide = pool.submit(hold_devices, str(tmp_path), "wide", 0.0, devices=2)
        behind = pool.submit(hold_devices, str(tmp_path), "behind", 0.0)
        assert wide.cancel()
        assert {first.result(), behind.result()} <= {"0", "1"}
    assert replay(tmp_path)[0] == ["first", "behind"]


def test_a_wide_task_gets_a_process_of_its_own_that_ends_with_it() -> None:
    with LocalPool(plan_workers(("0", "1"))) as pool:
        alone = {int(task.result()[1]) for task in [pool.submit(where) for _ in range(4)]}
        wide = [int(pool.submit(where, devices=2).result()[1]) for _ in range(2)]
        assert len(set(wide)) == 2 and not alone & set(wide)
        assert pool.submit(where).result()[0] == "cuda"  # the place of the second wide task is free again
        # Nobody idle holds memory of devices that are another's, and nobody stays when the work is done.
        assert not any(map(is_alive, [*alone, *wide]))


def test_the_death_of_a_wide_worker_fails_its_task_and_frees_its_devices(tmp_path: Path) -> None:
    with LocalPool(plan_workers(("0", "1"))) as pool:
        doomed = pool.submit(announce_and_sleep, str(tmp_path / "doomed"), devices=2)
        others = [pool.submit(where) for _ in range(2)]
        os.kill(pid_in(tmp_path / "doomed"), signal.SIGKILL)
        with pytest.raises(BrokenExecutor, match="died in the middle"):
            doomed.result()
        assert [task.result()[0] for task in others] == ["cuda"] * 2


def test_stopping_ends_a_wide_worker_and_those_that_wait(tmp_path: Path) -> None:
    pool = LocalPool(plan_workers(("0", "1")), grace=1.0)
    running = pool.submit(announce_and_sleep, str(tmp_path / "running"), devices=2)
    waiting = pool.submit(where, devices=2)
    pid = pid_in(tmp_path / "running")
    pool.shutdown()
    assert not is_alive(pid)
    assert issubclass(outcome(running), BrokenExecutor)
    assert issubclass(outcome(waiting), CancelledError)


def test_a_task_for_more_gpus_than_there_are_is_refused_at_once() -> None:
    with LocalPool(plan_workers(("0", "1"), per_gpu=4)) as pool:
        with pytest.raises(BadInput, match="3 GPUs"):
            pool.submit(where, devices=3)
        assert pool.submit(where, devices=2).result()[0] == "cuda"
    with LocalPool(plan_workers(("MIG-a", "MIG-b"))) as pool, pytest.raises(BadInput, match="2 GPUs"):
        pool.submit(where, devices=2)


def test_on_processors_a_wide_task_takes_what_there_is(tmp_path: Path) -> None:
    with LocalPool(plan_workers((), 2)) as pool:
        assert pool.gpus == 0
        wide = pool.submit(announce_and_sleep, str(tmp_path / "wide"), 0.3, devices=8)
        behind = pool.submit(where)
        pid_in(tmp_path / "wide")
        assert not behind.running()
        assert wide.result() == "awake"
        assert behind.result()[0] == "cpu"
