"""`bnbench probe` and `bnbench probes`: what the probes see in one network, and which probes there are."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as TextTable

from bnbench.cli.recorded import train_once
from bnbench.lit import own_model_class
from bnbench.probes import PROBES, ProbeEntry, Trace
from bnbench.registry import BadInput, nearest
from bnbench.study.table import Result
from bnbench.study.trial import Trial

Note = Callable[[str], None]

#: What a probe that refuses a network or a sample says first.
_REFUSAL = re.compile(r"probe '(?P<name>[^']+)'")


def print_probing(
    trial: Trial,
    names: Sequence[str],
    options: Mapping[str, Any],
    gpus: str,
    data: Path,
    *,
    layers: bool = False,
    as_json: bool = False,
) -> int:
    """Train a row with probes before its first step and after its last, and print what they read.

    Without names it is all probes. `options` are those of each probe by its name. Probes with neither are
    left out with a note where they refuse this network. Returns 1 where the training itself failed. Raises
    BadInput for names and options that cannot be, and where another probe refuses.
    """
    console = Console(stderr=as_json, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140

    def note(text: str) -> None:
        console.print(f"note: {text}", highlight=False, markup=False)

    asked = _asked(names, options, trial.steps)
    row, result = _train(trial, asked, [*names, *options], gpus, data, note)
    has_norm = takes_norm(row.model)
    if not has_norm:
        note(f"{row.model} takes neither `norm_layer` nor `slot`, so --norm changes nothing in it")
    if result.status == "diverged":
        note(f"the training diverged: {result.brief}")
    if as_json:
        said = {"trial": row.as_dict(), "status": result.status, "reason": result.reason}
        print(json.dumps({**said, "traces": result.plain_traces()}, indent=1, ensure_ascii=False))
    elif result.status != "failed":
        what = f"{row.model}, norm {row.norm}" if has_norm else row.model
        how = f"{row.steps} steps of {row.batch_size} samples at lr {row.lr:g}, seed {row.seed}"
        console.print(f"{what}, on {row.data}: {how}", highlight=False, markup=False)
        heads = ["at initialization", f"after {row.steps} steps"]
        console.print(_table(["probe", "quantity", *heads], _value_lines(result.traces, row.steps)))
        if layers:
            lines = _series_lines(result.traces, row.steps)
            console.print(_table(["probe", "quantity", "along", "", *heads], lines))
    if result.status == "failed":
        print(result.reason.strip(), file=sys.stderr)
        return 1
    return 0


def takes_norm(model: str) -> bool:
    """Whether a model is given its norm: one of one's own has a parameter for it, or has its own norms."""
    return ":" not in model or bool({"norm_layer", "slot"} & own_model_class(model)[1].keys())


def _asked(names: Sequence[str], options: Mapping[str, Any], steps: int) -> dict[str, dict[str, Any]]:
    """The probes with their options, each to read at initialization and after all steps."""
    chosen = list(names or PROBES)
    for name, own in options.items():
        if name not in chosen:
            raise BadInput(f"--probe-options: no probe {name!r} is asked for{nearest(name, chosen)}")
        if not isinstance(own, Mapping) or own.keys() & {"every", "steps"}:
            raise BadInput(
                f"--probe-options: give those of {name!r} as a JSON object, without `every` and `steps`:"
                " the readings are at initialization and after --steps"
            )
    return {PROBES[name].name: {**options.get(name, {}), "steps": [0, steps]} for name in chosen}


def _train(
    trial: Trial, probes: Mapping[str, Any], named: Sequence[str], gpus: str, data: Path, note: Note
) -> tuple[Trial, Result]:
    """The row and its result; of probes that nobody named, those that refuse are left out one by one."""
    left = dict(probes)
    while True:
        row = trial.replace(probes=left)
        try:
            result = train_once(row, gpus, data)
            why = _refused_in(result)
        except BadInput as error:
            why = str(error)
        if not why:
            return row, result
        refusing = _REFUSAL.match(why)
        name = refusing["name"] if refusing is not None else ""
        if name in named or left.pop(name, None) is None or not left:
            raise BadInput(why)
        note(f"left out: {why}")


def _refused_in(result: Result) -> str:
    """What was wrong with the input of a training that failed for that; else nothing."""
    kind, _, why = result.brief.partition(": ")
    return why if result.status == "failed" and kind.split(".")[-1] == BadInput.__name__ else ""


def _value_lines(traces: Mapping[str, Trace], steps: int) -> Iterator[list[str]]:
    for probe, trace in traces.items():
        for name, numbers in trace.values.items():
            at = dict(zip(trace.steps, numbers, strict=True))
            yield [probe, name, *(_number(at.get(step)) for step in (0, steps))]


def _series_lines(traces: Mapping[str, Trace], steps: int) -> Iterator[list[str]]:
    for probe, trace in traces.items():
        for name, rows in trace.series.items():
            at = dict(zip(trace.steps, rows, strict=True))
            for place, label in enumerate(trace.index):
                read = (at[step][place] if step in at else None for step in (0, steps))
                yield [probe, name, trace.axis, str(label), *map(_number, read)]


def _number(value: float | None) -> str:
    """Four digits; a dash for what could not be had."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _table(heads: Sequence[str], lines: Iterator[list[str]]) -> TextTable:
    table = TextTable(box=None, pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place >= len(heads) - 2 else "left")
    before = ["", ""]
    for line in lines:
        # A name that stands in the line above is not repeated.
        kept = ["" if line[: place + 1] == before[: place + 1] else line[place] for place in range(2)]
        table.add_row(*kept, *line[2:])
        before = line[:2]
    return table


def print_probes(as_json: bool) -> None:
    """List the probes of the registry: what each measures, its options and its paper."""
    rows = [
        {
            "name": name,
            "about": about(entry),
            "paper": entry.paper,
            "options": dict(entry.options),
            "every": entry.probe().every,
        }
        for name, entry in PROBES.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        options = ", ".join(f"{name}={value!r}" for name, value in row["options"].items())
        said = row["about"] + (f" ({options})" if options else "")
        print(f"{row['name']:<18} every {row['every']:>5} steps  {row['paper']:<16}  {said}".rstrip())


def about(entry: ProbeEntry) -> str:
    """What a probe measures: the first sentence of its docstring."""
    first = (inspect.getdoc(entry.probe) or "").split("\n", 1)[0]
    return re.sub(r"[;,.]? *(see )?:func:.*", "", first).rstrip(".")
