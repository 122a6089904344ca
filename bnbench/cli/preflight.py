"""`bnbench doctor --smoke`, and the same as the first step of a run on GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bnbench import doctor
from bnbench.cli.progress import print_note
from bnbench.engine.cost import shape_of
from bnbench.engine.preflight import Preflight, look, positions
from bnbench.engine.suite import Job
from bnbench.placement import choose_gpus
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study.trial import Trial

if TYPE_CHECKING:
    from bnbench.cli.run import Request


def print_preflight(request: Request) -> int:
    """Print each finding when it is there, and what each shape costs; the exit code is 1 where a fault is."""
    from bnbench.cli.run import jobs_of

    try:
        choose_gpus(request.gpus, os.environ)
        gpus = request.gpus
    except BadInput:
        gpus = "none"  # which is a finding, and the studies are those of a machine without GPUs
    rows = [trial for job in jobs_of(dataclasses.replace(request, gpus=gpus)) for trial in job.rows]
    flight = look(
        rows,
        request.runs,
        request.data,
        request.gpus,
        environ=os.environ,
        uri=request.tracking_uri,
        told=lambda finding: print(finding.line(), flush=True),
    )
    if flight.shapes:
        print("\n" + "\n".join(shape_lines(flight)))
    return 1 if any(finding.level == "fault" for finding in (*flight.findings, *flight.left_out)) else 0


def on_fit_gpus(request: Request, jobs: Sequence[Job], console: Console) -> Request:
    """The same request on those GPUs that compute right, after all else was found to be in order.

    Shapes that have been trained on a GPU already are not tried. Raises BadInput with all faults in one line
    where the run could not end well.
    """
    console.print("First a look at this machine, as by `bnbench doctor --smoke`.", highlight=False)
    flight = look(
        [trial for job in jobs for trial in job.rows],
        request.runs,
        request.data,
        request.gpus,
        environ=os.environ,
        uri=request.tracking_uri,
        offline=request.offline,
        known=_recorded_shapes(request.runs / "bnbench.db"),
    )
    faults = flight.findings if flight.gpus else (*flight.left_out, *flight.findings)
    notes = [str(finding) for finding in doctor.refuse_unfit(faults)]
    for line in [*(f"left out: {finding.text}" for finding in flight.left_out), *notes]:
        print_note(console, line)
    most = len(flight.gpus) * request.per_gpu
    workers = None if request.workers is None else min(request.workers, most)
    return dataclasses.replace(request, gpus=positions(flight.gpus, os.environ), workers=workers)


def _recorded_shapes(path: Path) -> set[str]:
    if not path.exists():
        return set()
    with contextlib.closing(Record(path)) as record:
        return {
            shape_of(trial)
            for trial, result in record.rows()
            # What trained on a processor names its kind.
            if result.status == "done" and result.provenance.get("device") != platform.machine()
        }


def shape_lines(flight: Preflight) -> list[str]:
    """What a step of each shape takes, as a table: the fields in which shapes differ, time and memory."""
    rows = [Trial(**json.loads(shape_of(trial))).as_dict() for trial, _ in flight.shapes]
    texts = [{name: _text(value) for name, value in row.items()} for row in rows]
    columns = [
        name
        for name in texts[0]
        if name in ("model", "norm", "batch_size") or len({row[name] for row in texts}) > 1
    ]
    table = [[*columns, "ms a step", "peak MiB"]]
    for row, (_, result) in zip(texts, flight.shapes, strict=True):
        measured = [result.metrics["time/step_ms"], result.metrics["memory/peak_mib"]]
        table.append([*(row[name] for name in columns), f"{measured[0]:.2f}", f"{measured[1]:.0f}"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number >= len(columns) else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={option}" for name, option in value.items()) or "-"
    return str(value)
