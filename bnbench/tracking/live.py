"""What a long training tells while it runs: a worker writes lines to a file, the coordinator reads them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bnbench.study.programs import Wanted, turns
from bnbench.study.table import Role
from bnbench.study.trial import Trial


@dataclass(frozen=True)
class Place:
    """Where in a study the result of a row will stand; `number` is its turn among those of its role."""

    study_hash: str
    cell: str
    arm: str
    replicate: int
    role: Role
    trial: Trial
    number: int = 0


def places(study_hash: str, wanted: Iterable[Wanted]) -> list[Place]:
    """The places of the rows of one request, which is whole."""
    return [
        Place(study_hash, row.cell, row.arm, row.replicate, row.role, row.trial, number)
        for row, number in turns(wanted)
    ]


@dataclass(frozen=True)
class Live:
    """One attempt at a training so far: when it started (seconds since 1970), and its points.

    A point holds `step`, `time` (seconds since 1970) and metrics by name.
    """

    started: float
    points: tuple[Mapping[str, float], ...]


class LiveLog:
    """Appends the points of one training to `runs/live/<key>.jsonl`, once it has run for `after` seconds.

    `started` is the time that the result's provenance will name, which is how the two are joined. What an
    earlier attempt left is removed at once. A disk that is full does not stop the training.
    """

    def __init__(
        self,
        runs: Path,
        key: str,
        started: float,
        *,
        after: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = live_path(runs, key)
        self._start = started + after
        self._clock = clock
        self._waiting = [json.dumps({"started": started})]
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one optimizer step."""
        now = self._clock()
        self._waiting.append(json.dumps({"step": step, "time": now, **metrics}))
        if now < self._start:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write("".join(f"{line}\n" for line in self._waiting))
            self._waiting.clear()


def live_path(runs: Path, key: str) -> Path:
    """The file of a row's points."""
    return runs / "live" / f"{key}.jsonl"


def read_live(path: Path) -> Live | None:
    """What a training has told so far, but for a line that is half written; None where there is nothing."""
    try:
        lines = path.read_text().split("\n")[:-1]
        first, *rest = (json.loads(line) for line in lines)
        return Live(float(first["started"]), tuple(rest))
    except (OSError, ValueError, KeyError, TypeError):
        return None
