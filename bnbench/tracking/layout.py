"""Which runs a study has in MLflow, and when one of them has to be sent again. Pure functions.

Experiment `bnbench/<study>/<preset>`: a run an arm of a cell (what people compare), below it a run a
confirmed training or a swept grid, and one `verdict` run a definition. The searches for learning rates are
in `bnbench/<study>/<preset>/tuning`, a run each, because they would bury the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bnbench.study.table import Entry, Table
from bnbench.tracking.draft import (
    Definition,
    Draft,
    arm_draft,
    grid_draft,
    is_grid,
    training_draft,
)
from bnbench.tracking.live import Place
from bnbench.tracking.verdict import verdict_draft


@dataclass(frozen=True)
class Item:
    """A run that belongs in MLflow: its lasting name, what its content depends on, how to make it.

    `attempt` tells one training from a repetition of it, which is another run; None where the run only
    sums up and is brought up to date.
    """

    name: str
    mark: str
    experiment: str
    parent: str | None
    attempt: str | None
    draft: Callable[[], Draft]


def items(
    definition: Definition,
    table: Table,
    verdicts: Sequence[Mapping[str, Any]],
    artifacts: Sequence[Path] = (),
    *,
    unfinished: bool = True,
) -> Iterator[Item]:
    """All runs of one definition, parents before children.

    `unfinished` includes searches whose grid is not complete.
    """
    arms: dict[tuple[str, str], list[Entry]] = {}
    grids: dict[str, list[Entry]] = {}
    for entry in table.entries:
        if entry.role != "tune":
            arms.setdefault((entry.cell, entry.arm), []).append(entry)
        if is_grid(entry):
            grids.setdefault(item_name(definition, entry), []).append(entry)
    for (cell, arm), entries in arms.items():
        decided = _decided(definition, verdicts, cell, arm)
        mark = _digest([decided, *map(_attempt, entries)])
        draft = partial(arm_draft, definition, entries, decided)
        yield Item(arm_name(definition, cell, arm), mark, definition.experiment, None, None, draft)
        for entry in entries:
            if not is_grid(entry):
                yield Item(
                    item_name(definition, entry),
                    _attempt(entry),
                    *item_home(definition, entry),
                    repr(entry.result.provenance.get("started")),
                    partial(training_draft, definition, entry),
                )
    for name, entries in grids.items():
        if not unfinished and len(entries) < len(definition.values["lr"]):
            continue
        first = entries[0]
        own = [
            e
            for e in arms.get((first.cell, first.arm), [])
            if e.role == "own" and e.replicate == first.replicate
        ]
        chosen = own[0] if own else None
        mark = _digest([chosen and chosen.trial.key, *map(_attempt, entries)])
        draft = partial(grid_draft, definition, entries, chosen)
        yield Item(name, mark, *item_home(definition, first), None, draft)
    if verdicts or artifacts:
        mark = _digest(verdicts)
        if artifacts:
            mark += f"+{_digest(map(_file_digest, artifacts))}"
        draft = partial(verdict_draft, definition, table, verdicts, artifacts)
        yield Item(f"{definition.study_hash}/verdict", mark, definition.experiment, None, None, draft)


def arm_name(definition: Definition, cell: str, arm: str) -> str:
    """The lasting name of the run of an arm in a cell."""
    return f"{definition.study_hash}/arm/{cell}/{arm}"


def item_name(definition: Definition, place: Place | Entry) -> str:
    """The lasting name of the run of a confirmed training, or of the grid that another one is in."""
    name = f"{definition.study_hash}/{place.role}/{place.cell}/{place.arm}/s{place.replicate}"
    return name if is_grid(place) else f"{name}/{place.trial.key}"


def item_home(definition: Definition, place: Place | Entry) -> tuple[str, str | None]:
    """The experiment of that run, and the lasting name of its parent."""
    if place.role == "tune":
        return definition.tuning, None
    return definition.experiment, arm_name(definition, place.cell, place.arm)


def _decided(definition: Definition, verdicts: Sequence[Mapping[str, Any]], cell: str, arm: str) -> str:
    """The decisions in a cell on the hypotheses that say that this arm is better."""
    hypotheses = definition.values["hypotheses"]
    return "; ".join(
        f"{v['hypothesis']}: {v['decision']}"
        for v in verdicts
        if v.get("cell") == cell and arm in hypotheses.get(v.get("hypothesis"), {}).get("better", ())
    )


def _attempt(entry: Entry) -> str:
    return f"{entry.trial.key} {entry.result.status} {entry.result.provenance.get('started')!r}"


def _digest(parts: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return _digest([[str(file.relative_to(path.parent)) for file in files], contents])
