"""Which runs a study has in MLflow, and when one of them has to be sent again. Pure functions.

Experiment `bnbench/<study>/<preset>`: a run an arm of a cell (what people compare), below it a run a
confirmed training or a swept grid, and one `verdict` run a definition. What chooses is in
`bnbench/<study>/<preset>/tuning`, because it would bury the rest: a run a grid of learning rates, and a run a
search of a space, below which every trial is a run. A step time that was measured alone is a metric of the
arm, since its row has nothing else to tell.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bnbench.study.programs import choose
from bnbench.study.table import Entry, Role, Table
from bnbench.tracking.draft import Definition, Draft, arm_draft, is_grid, is_point, training_draft
from bnbench.tracking.live import Place
from bnbench.tracking.tuning import grid_draft, search_draft
from bnbench.tracking.verdict import verdict_draft


@dataclass(frozen=True)
class Item:
    """A run that belongs in MLflow: its lasting name, what its content depends on, how to make it.

    `attempt` tells one training from a repetition of it, which is another run, as is a search whose best
    point is another one; None where the run only sums up and is brought up to date.
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

    `unfinished` includes grids and searches that are not complete.
    """
    arms: dict[tuple[str, str], list[Entry]] = {}
    grids: dict[str, list[Entry]] = {}
    searches: dict[str, list[Entry]] = {}
    timed: dict[tuple[str, str], list[Entry]] = {}
    for entry in table.entries:
        if entry.role == "timing":
            timed.setdefault((entry.cell, entry.arm), []).append(entry)
        elif entry.role not in ("tune", "shortlist"):
            arms.setdefault((entry.cell, entry.arm), []).append(entry)
        if is_grid(definition, entry):
            grids.setdefault(item_name(definition, entry), []).append(entry)
        if is_point(definition, entry):
            searches.setdefault(search_name(definition, entry), []).append(entry)
    for (cell, arm), entries in arms.items():
        decided = _decided(definition, verdicts, cell, arm)
        alone = timed.get((cell, arm), [])
        mark = _digest([decided, *map(_attempt, [*entries, *alone])])
        draft = partial(arm_draft, definition, entries, decided, alone)
        yield Item(arm_name(definition, cell, arm), mark, definition.experiment, None, None, draft)
        for entry in entries:
            if not is_grid(definition, entry):
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
    for name, entries in searches.items():
        if unfinished or _is_complete(definition, table, entries):
            yield from _search_items(definition, name, entries)
    if verdicts or artifacts:
        mark = _digest(verdicts)
        if artifacts:
            mark += f"+{_digest(map(_file_digest, artifacts))}"
        draft = partial(verdict_draft, definition, table, verdicts, artifacts)
        yield Item(f"{definition.study_hash}/verdict", mark, definition.experiment, None, None, draft)


def _search_items(definition: Definition, name: str, entries: Sequence[Entry]) -> Iterator[Item]:
    """The run of a search, and those of its trials, which carry its mark: with it they are made anew."""
    best = choose(entries)
    mark = _digest(map(_attempt, entries))
    draft = partial(search_draft, definition, entries)
    yield Item(name, mark, definition.tuning, None, best.key if best else None, draft)
    numbers: Counter[int] = Counter()
    for entry in entries:
        number = numbers[entry.replicate]
        numbers[entry.replicate] += 1
        yield Item(
            item_name(definition, entry),
            f"{_attempt(entry)} {mark}",
            *item_home(definition, entry),
            repr(entry.result.provenance.get("started")),
            partial(training_draft, definition, entry, number),
        )


def _is_complete(definition: Definition, table: Table, entries: Sequence[Entry]) -> bool:
    """Whether a search has all its trials, or something that comes after it has been trained."""
    first = entries[0]
    if first.role == "tune" and len(entries) >= definition.values["trials"][first.cell]:
        return True
    once = definition.values["tuning"] == "once"
    later: list[Role] = ["own"] if first.role == "shortlist" else ["own", "shortlist"]
    after = table.of(cell=first.cell, arm=first.arm, roles=later)
    return any(once or e.replicate == first.replicate for e in after)


def arm_name(definition: Definition, cell: str, arm: str) -> str:
    """The lasting name of the run of an arm in a cell."""
    return f"{definition.study_hash}/arm/{cell}/{arm}"


def item_name(definition: Definition, place: Place | Entry) -> str:
    """The lasting name of the run of a training that has its own, or of the grid that another one is in."""
    name = f"{definition.study_hash}/{place.role}/{place.cell}/{place.arm}/s{place.replicate}"
    return name if is_grid(definition, place) else f"{name}/{place.trial.key}"


def search_name(definition: Definition, place: Place | Entry) -> str:
    """The lasting name of the run of a search, or of an arm's shortlist; its trials' begin with it."""
    name = f"{definition.study_hash}/{place.role}/{place.cell}/{place.arm}"
    return name if place.role == "shortlist" else f"{name}/s{place.replicate}"


def item_home(definition: Definition, place: Place | Entry) -> tuple[str, str | None]:
    """The experiment of that run, and the lasting name of its parent."""
    if is_point(definition, place):
        return definition.tuning, search_name(definition, place)
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
