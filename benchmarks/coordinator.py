"""Measure what a trial costs the coordinator and publishing, with trials that only sleep.

    python benchmarks/coordinator.py              the table of docs/scale-out.md: 1, 2, 4, 8 and 16 workers
    python benchmarks/coordinator.py 4 64         other numbers of workers

It takes minutes, and so is no part of `make bench`.

A whole `bnbench run` of a small study is timed at two sizes, and what is printed is the slope: the cost of
one more trial, without what a run costs anyhow (imports, the report). Each worker sleeps and answers with the
result of a real training. "CPU" is the processor time of the coordinator's process, "wall" how much longer a
trial took than its sleep divided by the number of workers. Other work on the machine spoils the wall times.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

SLEEP = 0.1
REPLICATES = (5, 45)

STUDY = """
from functools import partial
from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference

DESIGN = Design(
    base=Trial(data="digits", model_options={{"depth": 2, "width": 32}}, steps=60),
    cells=(Cell("digits"),),
    arms=(Arm("none", norm="none"), Arm("batch", norm="batch")),
    lr=(0.03, 0.1, 0.3),
    replicates={replicates},
    curve_points=8,
)
STUDY = Study(
    name="sleeping",
    question="What does a trial cost beside its training?",
    baseline="none",
    hypotheses=(
        Hypothesis(
            name="S.a",
            claim="C1",
            sentence="Sleep is sound.",
            estimand=partial(accuracy_difference, better="batch", other="none"),
            delta=1.0,
            better=("batch",),
            other=("none",),
            unit="pp",
        ),
    ),
    quick=DESIGN,
    full=DESIGN,
)
"""


def sleep(results: list[Any]) -> list[Any]:
    """What a worker does in place of a training."""
    time.sleep(SLEEP)
    return results


def run_once(workers: int, replicates: int, published: bool) -> dict[str, float]:
    """Run the study with workers that sleep; its trials, seconds and the coordinator's processor seconds."""
    from bnbench.cli import run as command
    from bnbench.data import default_folder
    from bnbench.engine.executors import LocalPool
    from bnbench.engine.train import Place, train
    from bnbench.placement import plan_workers
    from bnbench.study.trial import trial_from

    trained: dict[str, Any] = {}
    trials = 0

    class Sleepers(LocalPool):
        def submit(  # type: ignore[override]
            self,
            fn: Callable[..., Any],
            /,
            values: Sequence[Mapping[str, Any]],
            data: str,
            runs: str,
            devices: int = 1,
        ) -> Future[Any]:
            nonlocal trials
            trials += 1
            (trial,) = map(trial_from, values)
            if trial.score_on not in trained:
                trained[trial.score_on] = train(trial, Place(Path(data), Path(runs)))
            return super().submit(sleep, [trained[trial.score_on]])

    with tempfile.TemporaryDirectory() as scratch:
        study = Path(scratch) / "sleeping.py"
        study.write_text(STUDY.format(replicates=replicates))
        command._open_pool = lambda request: Sleepers(plan_workers((), workers))
        request = command.Request(
            words=(str(study),),
            preset="quick",
            gpus="none",
            workers=workers,
            per_gpu=1,
            budget=None,
            fleet="off",
            runs=Path(scratch) / "runs",
            data=default_folder(),
            offline=not published,
            quiet=True,
        )
        began = time.perf_counter(), time.process_time()
        command.run(request)
        return {
            "trials": trials,
            "wall": time.perf_counter() - began[0],
            "cpu": time.process_time() - began[1],
        }


def measure(workers: int, published: bool) -> tuple[float, float]:
    """Milliseconds of processor and of waiting that one more trial costs."""
    small, large = (
        json.loads(
            subprocess.run(
                [sys.executable, __file__, "once", str(workers), str(replicates), str(int(published))],
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            ).stdout.splitlines()[-1]
        )
        for replicates in REPLICATES
    )
    more = large["trials"] - small["trials"]
    cpu, wall = ((large[name] - small[name]) / more for name in ("cpu", "wall"))
    return 1000 * cpu, 1000 * (wall - SLEEP / workers)


def main(counts: list[int]) -> None:
    """Print the table."""
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in ("bnbench", "torch", "mlflow", "optuna"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}\n")
    print("| workers | CPU, offline | CPU, published | wall, offline | wall, published |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for workers in counts:
        offline, published = measure(workers, False), measure(workers, True)
        cells = (offline[0], published[0], offline[1], published[1])
        print(f"| {workers} | " + " | ".join(f"{value:.1f} ms" for value in cells) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["once"]:
        print(json.dumps(run_once(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")))
    else:
        main([int(word) for word in sys.argv[1:]] or [1, 2, 4, 8, 16])
