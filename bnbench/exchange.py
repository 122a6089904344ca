"""Rows in a file: a whole record as Parquet, to take from one machine to another."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bnbench.registry import BadInput
from bnbench.study.table import Result, read_traces
from bnbench.study.trial import ROW_VERSION, Trial, trial_from

_COLUMNS = ("key", "row_version", "status", "reason", "trial", "curve", "provenance")


def write_rows(path: Path, rows: Iterable[tuple[Trial, Result]]) -> int:
    """Write rows to a Parquet file, one column a metric; returns their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines: list[dict[str, Any]] = []
    for trial, result in rows:
        line = {
            "key": trial.key,
            "row_version": ROW_VERSION,
            "status": result.status,
            "reason": result.reason,
            "trial": json.dumps(trial.changed()),
            "curve": json.dumps({name: list(series) for name, series in result.curve.items()}),
            "provenance": json.dumps(dict(result.provenance)),
            "traces": json.dumps(result.plain_traces()),
        }
        lines.append(line | {f"metric/{name}": float(value) for name, value in result.metrics.items()})
    names = list(dict.fromkeys([*_COLUMNS, *(name for line in lines for name in line)]))
    table = pa.table({name: pa.array([line.get(name) for line in lines]) for name in names})
    half = path.with_name(f".{path.name}.part")
    try:
        pq.write_table(table, half)
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        said = str(error).splitlines()[0]
        raise BadInput(f"cannot write {path}: {said}; name a file in a folder that can be written") from None
    return len(lines)


def read_rows(path: Path) -> list[tuple[Trial, Result]]:
    """Read the rows of such a file.

    Raises BadInput where it is none, was written for other row rules, or a row is not what its key says.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "give a file of `bnbench export`"
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"cannot read {path}: {str(error).splitlines()[0]}; {remedy}") from None
    if missing := set(_COLUMNS) - set(table.column_names):
        raise BadInput(f"{path} lacks the columns {', '.join(sorted(missing))}; {remedy}")
    rows = []
    for line in table.to_pylist():
        if line["row_version"] != ROW_VERSION:
            raise BadInput(
                f"{path} has rows of version {line['row_version']}, and this bnbench makes {ROW_VERSION}:"
                " their numbers cannot be compared; export again with this version"
            )
        where = f"{path}, row {line['key']}"
        try:
            trial, result = trial_from(json.loads(line["trial"]), where), _result(line)
        except BadInput:
            raise
        except (ValueError, TypeError, AttributeError, KeyError):
            raise BadInput(f"{where} cannot be understood: the file was changed; {remedy}") from None
        if trial.key != line["key"]:
            raise BadInput(f"{where}: its content does not give its key: the file was changed; {remedy}")
        rows.append((trial, result))
    return rows


def _result(line: dict[str, Any]) -> Result:
    """The result of a line. Raises ValueError, TypeError, AttributeError or KeyError where it is none."""
    if line["status"] not in ("done", "diverged", "failed"):
        raise ValueError(line["status"])
    metrics = {
        name.removeprefix("metric/"): float(value)
        for name, value in line.items()
        if name.startswith("metric/") and value is not None
    }
    curve = {name: tuple(series) for name, series in json.loads(line["curve"]).items()}
    return Result(
        line["status"],
        metrics,
        curve,
        str(line["reason"]),
        dict(json.loads(line["provenance"])),
        # Files from before there were probes have no such column.
        traces=read_traces(json.loads(line.get("traces", "{}"))),
    )
