"""The rows that wait for a worker: which of them the next free one gets, one or a fleet."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from bnbench.engine.fleet import FLEET_SIZE, fleet_shape
from bnbench.study.trial import Trial


@dataclass(frozen=True)
class Origin:
    """Where a row comes from: its program's number, the first number of that cell, the program's request."""

    cell: int
    program: int
    request: int


_Row = tuple[Origin, Trial]


class Waiting:
    """Rows that wait, in the order of their programs.

    A row of the back end "single" is a task of its own; others of one fleet shape wait for each other. What
    comes first: cells in their order; of a cell, single rows and full fleets in the order of its programs;
    then what fills no fleet, that of programs which have asked least often first, since what these ask for
    next may fill others.
    """

    def __init__(self) -> None:
        self._single: list[_Row] = []
        self._fleets: dict[str, list[_Row]] = {}
        self._again: list[Trial] = []

    def __bool__(self) -> bool:
        return bool(self._single or self._fleets or self._again)

    def add(self, origin: Origin, trial: Trial) -> None:
        """Let a row wait behind those of the same program and of earlier ones."""
        single = trial.backend == "single"
        rows = self._single if single else self._fleets.setdefault(fleet_shape(trial), [])
        insort(rows, (origin, trial), key=lambda row: row[0].program)

    def add_again(self, trials: Iterable[Trial]) -> None:
        """Let rows whose worker died wait before all others, each for a fleet of its own."""
        self._again += trials

    def take(self, idle: int) -> list[Trial]:
        """The rows of the next task, where so many workers are idle; none where none waits.

        Rows of one shape that are too many for a fleet, or that leave workers idle, are cut in nearly equal
        fleets. (A compiled fleet is not faster for being small.)
        """
        if self._again:
            return [self._again.pop(0)]
        heads = {shape: _rank(rows) for shape, rows in self._fleets.items()}
        shape = min(heads, key=heads.__getitem__, default="")
        if self._single and (not shape or _rank(self._single[:1]) < heads[shape]):
            return [self._single.pop(0)[1]]
        if not shape:
            return []
        rows = self._fleets[shape]
        parts = math.ceil(len(rows) / FLEET_SIZE)
        if rows[0][1].backend == "eager":
            all_rows = sum(map(len, self._fleets.values()))
            parts = max(parts, min(len(rows), len(rows) * (idle - len(self._single)) // all_rows))
        count = math.ceil(len(rows) / parts)
        self._fleets[shape] = rows[count:]
        if not self._fleets[shape]:
            del self._fleets[shape]
        return [trial for _, trial in rows[:count]]


def _rank(rows: list[_Row]) -> tuple[int, bool, int, int]:
    """The order of tasks: the lower, the sooner."""
    origin, trial = rows[0]
    small = trial.backend != "single" and len(rows) < FLEET_SIZE
    return origin.cell, small, origin.request, origin.program
