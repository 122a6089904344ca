"""Contenders take turns: in each round every one runs once, so that what slows the machine slows them all."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: The fewest rounds that make a median.
ROUNDS = 5


@dataclass(frozen=True)
class Spent:
    """Seconds on the wall and of the processor, for one unit of work (a step, a training, a call)."""

    wall: float
    processor: float

    def __mul__(self, factor: float) -> Spent:
        return Spent(self.wall * factor, self.processor * factor)

    def __truediv__(self, count: float) -> Spent:
        return self * (1 / count)

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.processor + other.processor)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.processor - other.processor)


Turns = dict[str, list[Spent]]


def now() -> Spent:
    """Both clocks; the difference of two readings is what lies between them."""
    return Spent(time.perf_counter(), time.process_time())


def timed(work: Callable[[], Any], count: int = 1) -> Spent:
    """What one of `count` calls spends."""
    began = now()
    for _ in range(count):
        work()
    return (now() - began) / count


def take_turns(contenders: Mapping[str, Callable[[], Spent]], rounds: int = ROUNDS) -> Turns:
    """What every contender spends in every round; each round begins with another one."""
    names = list(contenders)
    turns: Turns = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(contenders[name]())
    return turns


def speedups(turns: Turns, name: str, than: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How many times as fast as another contender one is, in each round: by the wall, by the processor."""
    pairs = list(zip(turns[than], turns[name], strict=True))
    return tuple(b.wall / a.wall for b, a in pairs), tuple(b.processor / a.processor for b, a in pairs)


def as_times(turns: Turns) -> dict[str, list[dict[str, float]]]:
    """All that was measured, as plain values."""
    return {name: [asdict(spent) for spent in spents] for name, spents in turns.items()}


def run_program(command: Sequence[str | Path], cores: Collection[int] = ()) -> tuple[Spent, str]:
    """What a program spends that runs to its end on these processor cores alone, and what it prints.

    Its processor time is with that of the processes that it has waited for; every process has one thread.
    Raises RuntimeError, with its last lines, where it fails.
    """

    def confine() -> None:
        if cores:
            os.sched_setaffinity(0, cores)

    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    # Not a pipe, which a process that outlives the program would keep open.
    with tempfile.TemporaryFile("w+") as printed:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        code = subprocess.run(
            words,
            env={**os.environ, **one_thread},
            stdout=printed,
            stderr=subprocess.STDOUT,
            preexec_fn=confine,
        ).returncode
        wall = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        printed.seek(0)
        said = printed.read()
    if code:
        raise RuntimeError(f"{' '.join(words)} ended with exit code {code}:\n{said[-2000:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(wall, processor), said


def usable_cores() -> list[int]:
    """The processor cores that this process may run on; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
