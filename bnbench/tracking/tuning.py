"""The runs of what chooses: a grid of learning rates, a search with its points below. Pure functions."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bnbench.study.programs import choose, setting
from bnbench.study.space import Space, point_of
from bnbench.study.table import Entry
from bnbench.study.trial import Trial
from bnbench.tracking.draft import (
    CURVES,
    LONGEST_TAG,
    Definition,
    Draft,
    Point,
    finite,
    place_name,
    place_tags,
    search_title,
    span,
    trial_params,
)

#: The table of the trainings of a grid or a search; the tag makes MLflow's page show it as one.
TABLE = "trainings.json"
SHOW_TABLE = {"mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}])}


def grid_draft(definition: Definition, entries: Sequence[Entry], chosen: Entry | None) -> Draft:
    """The run of a grid, tuned or swept: metrics over the grid, the step being the place in it."""
    start, end = span(*entries)
    grid = sorted(entries, key=lambda e: (e.trial.lr, e.trial.key))
    rates = sorted({*definition.values["lr"], *(e.trial.lr for e in grid)})
    points, rows = [], []
    for entry in grid:
        result, place, when = entry.result, rates.index(entry.trial.lr), span(entry)[1]
        points.append(Point("lr", entry.trial.lr, when, place))
        points += [Point(key, result.metrics[key], when, place) for key in CURVES if key in result.metrics]
        rows.append(table_row(entry, lr=entry.trial.lr))
    note = (
        f"{len(grid)} learning rates, {grid[0].trial.lr:g} to {grid[-1].trial.lr:g}; step = place in the grid"
        f"{_casualties(grid)}"
    )
    params = trial_params(grid[0].trial, leave_out=("lr",))
    if chosen is not None:
        params["lr"] = str(chosen.trial.lr)
        note += f"; chosen: {chosen.trial.lr:g}"
    tags = {
        **place_tags(definition, grid[0], "grid"),
        "bnbench.status": "failed" if any(e.result.status == "failed" for e in grid) else "done",
        "mlflow.note.content": note,
        **SHOW_TABLE,
    }
    name = place_name(definition, grid[0])
    return Draft(name, tags, start, end, params, finite(points), {TABLE: as_table(rows)})


def search_draft(definition: Definition, entries: Sequence[Entry]) -> Draft:
    """The run of one search, or of the comparison of an arm's best points: metrics over the trials in order.

    A point that was tried on several replicates counts with its mean; one of which a training failed has no
    score. The parameters are those of the best point.
    """
    first, (start, end) = entries[0], span(*entries)
    space = definition.spaces[first.cell, first.arm]
    tries: dict[Trial, list[Entry]] = {}
    for entry in entries:
        tries.setdefault(setting(entry.trial), []).append(entry)
    points, rows, best = [], [], -math.inf
    for number, (chosen, found) in enumerate(tries.items()):
        point = point_of(space, chosen)
        rows += [table_row(e, trial=number, replicate=e.replicate, **point) for e in found]
        if any(e.result.status == "failed" for e in found):
            continue
        when = span(*found)[1]
        means = {key: statistics.fmean(e[key] for e in found) for key in ("val/acc", "val/loss")}
        best = max(best, means["val/acc"])
        points += [Point(key, mean, when, number) for key, mean in (*means.items(), ("val/acc_best", best))]
    points.append(Point("trials", len(tries), end, len(tries)))
    chosen_row = choose(entries)
    tags = {
        **place_tags(definition, first, "search"),
        "bnbench.status": "failed" if chosen_row is None else "done",
        "mlflow.note.content": _note(space, entries, list(tries), chosen_row)[:LONGEST_TAG],
        **SHOW_TABLE,
    }
    params = trial_params(chosen_row or first.trial, leave_out=("seed", "data_seed"))
    name = search_title(first.cell, first.arm, first.role, first.replicate)
    return Draft(name, tags, start, end, params, finite(points), {TABLE: as_table(rows)})


def _note(space: Space, entries: Sequence[Entry], tries: Sequence[Trial], best: Trial | None) -> str:
    """What was tried and what was best: `40 trials; 1 diverged; best: t17 (lr 0.3, dropout none)`."""
    note = f"{len(tries)} trials" if len(tries) == len(entries) else f"{len(tries)} points on the same data"
    note += _casualties(entries)
    if best is not None:
        labels = ", ".join(f"{k} {v}" for k, v in point_of(space, best).items())
        note += f"; best: t{tries.index(best)} ({labels})"
    return note


def _casualties(entries: Sequence[Entry]) -> str:
    """How many trainings diverged and failed: `; 2 diverged; 1 failed`, or nothing."""
    counts = Counter(entry.result.status for entry in entries)
    return "".join(f"; {counts[status]} {status}" for status in ("diverged", "failed") if counts[status])


def table_row(entry: Entry, **first: Any) -> dict[str, Any]:
    """The line of a training in that table: what comes first, its result, what its row changes, its key."""
    result, changed = entry.result, entry.trial.changed()
    row = {**first, "status": result.status, **result.metrics, "reason": result.reason}
    return {**row, **{k: _cell(v) for k, v in changed.items()}, "key": entry.trial.key}


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines as the JSON that MLflow shows as a table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    data = [[_cell(row.get(name)) for name in columns] for row in rows]
    return json.dumps({"columns": columns, "data": data})


def _cell(value: Any) -> Any:
    """A value as a table of plain JSON can hold it."""
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
