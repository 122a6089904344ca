"""How many more trainings two workers do than one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, wait
from functools import partial
from pathlib import Path

from benchmarks.rounds import ROUNDS, Spent, as_times, now, speedups, take_turns
from benchmarks.table import Line
from bnbench.data import default_folder, fetch
from bnbench.engine.conduct import train_rows
from bnbench.engine.executors import LocalPool
from bnbench.placement import plan_workers
from bnbench.study.trial import Trial

ROW = Trial(data="digits", model="mlp", steps=600)
COUNTS = (1, 2)


def train_all(pool: Executor, trainings: int, row: Trial, data: Path, runs: Path) -> Spent:
    """What a training spends on the average where a pool does so many of them."""
    began = now()
    rows = [row.replace(seed=seed) for seed in range(trainings)]
    futures = [pool.submit(train_rows, [each.as_dict()], str(data), str(runs)) for each in rows]
    wait(futures)
    for future in futures:
        (result,) = future.result()
        if result.status != "done":
            raise RuntimeError(f"a training ended as {result.status}: {result.reason}")
    return (now() - began) / trainings


def measure(
    row: Trial = ROW, trainings: int = 8, rounds: int = ROUNDS, data: Path | None = None
) -> Iterator[Line]:
    """One against two workers of the pool of `bnbench run`, which are warm."""
    data = data or default_folder()
    fetch(row.data, data, **row.data_options)
    pools = {count: LocalPool(plan_workers((), count)) for count in COUNTS}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        try:
            contenders = {}
            for count, pool in pools.items():
                train_all(pool, count, row, data, runs)
                contenders[str(count)] = partial(train_all, pool, trainings, row, data, runs)
            turns = take_turns(contenders, rounds)
        finally:
            for pool in pools.values():
                pool.shutdown()
    wall, _ = speedups(turns, "2", than="1")
    yield Line("two workers, trainings to one's", wall, least=1.8, times=as_times(turns))
