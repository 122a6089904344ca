"""`bnbench run` in this process, as the command line calls it, and where its processor time went.

python -m benchmarks.conducted times.json run study.py --preset quick …
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def processor_seconds(pid: int) -> float:
    """The processor time of a process so far, where /proc has it; else 0."""
    place = Path(f"/proc/{pid}/stat")
    if not place.exists():
        return 0.0
    # The name of the program, in parentheses, may hold blanks.
    fields = place.read_text().rpartition(")")[2].split()
    user, system = int(fields[11]), int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def child_processes() -> list[int]:
    """The processes that this one has started and that run, where /proc tells."""
    place = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(word) for word in place.read_text().split()] if place.exists() else []


class Phases:
    """The processor seconds of the calls that are watched, by phase; each second belongs to one of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose processor time is counted."""

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            before = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.add(phase, time.process_time() - before)

        return watched

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def main(path: Path, words: list[str]) -> None:
    """Run the command, and write the processor seconds of its phases and of its workers.

    "conducting" is the loop that asks, records and publishes; "publishing" what is left to publish after it;
    "report" the page; "server" the process that workers are forked from, which loads torch; "start"
    everything else, which is loading libraries and making the stores.
    """
    from bnbench.cli import main as bnbench_main
    from bnbench.cli import run as command
    from bnbench.engine.executors import LocalPool
    from bnbench.tracking import Publisher

    phases = Phases()
    shutdown = LocalPool.shutdown

    def count_and_shut_down(pool: LocalPool, *arguments: Any, **options: Any) -> None:
        # The second call, at the exit, finds no worker.
        phases.add("workers", sum(map(processor_seconds, pool.worker_pids())))
        phases.add(
            "server", sum(map(processor_seconds, child_processes())) - phases.seconds.get("server", 0.0)
        )
        shutdown(pool, *arguments, **options)

    command.run_jobs = phases.watch("conducting", command.run_jobs)
    command.write_report = phases.watch("report", command.write_report)
    Publisher.close = phases.watch("publishing", Publisher.close)  # type: ignore[method-assign]
    LocalPool.shutdown = count_and_shut_down  # type: ignore[method-assign]
    sys.argv = ["bnbench", *words]
    try:
        bnbench_main()
    finally:
        parts = phases.seconds
        known = sum(parts.get(name, 0.0) for name in ("conducting", "report", "publishing"))
        parts["start"] = time.process_time() - known
        path.write_text(json.dumps(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
