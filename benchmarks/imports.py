"""How long bnbench takes to start: fresh processes that import it, and one that prints its help.

`import bnbench` alone loads nothing before it is used, so what counts is the import of something in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.rounds import ROUNDS, Spent, as_times, run_program, speedups, take_turns
from benchmarks.table import Line

TORCH, BNBENCH, NORM = "import torch", "import bnbench", "from bnbench import build_norm"
HELP = "bnbench --help"


def run_python(words: list[str]) -> Spent:
    """What a fresh process spends."""
    spent, _ = run_program([sys.executable, *words])
    return spent


def measure(rounds: int = ROUNDS) -> Iterator[Line]:
    """The imports against torch's, and the seconds of the help."""
    commands = {name: ["-c", name] for name in (TORCH, BNBENCH, NORM)}
    commands[HELP] = ["-m", "bnbench.cli", "--help"]
    programs = {name: partial(run_python, words) for name, words in commands.items()}
    for program in programs.values():
        program()  # The first one reads the files from the disk.
    turns = take_turns(programs, rounds)
    for name in (BNBENCH, NORM):
        wall, processor = speedups(turns, TORCH, than=name)
        yield Line(f"{name}, time to {TORCH}'s", wall, processor, most=1.05, times=as_times(turns))
    wall, processor = tuple(s.wall for s in turns[HELP]), tuple(s.processor for s in turns[HELP])
    yield Line(HELP, wall, processor, most=0.5, unit="s")
