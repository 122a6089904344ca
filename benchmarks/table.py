"""A line of the table of benchmarks, the table in a terminal, and the file with all times."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

#: Above this load of a machine at the start, its times say little.
IDLE = 1.0

PACKAGES = ("bnbench", "torch", "lightning", "torchmetrics", "mlflow", "optuna")


@dataclass(frozen=True)
class Line:
    """What was measured under one name: a number a round, and the goal, if there is one.

    `values` are ratios (`unit` "x", of times on the wall), shares of the time ("%", a half is 50) or seconds
    ("s"); `by_processor` are the same by processor time. The goal is a median of `least` or more, or of
    `most` or less.
    """

    name: str
    values: tuple[float, ...]
    by_processor: tuple[float, ...] = ()
    least: float | None = None
    most: float | None = None
    unit: str = "x"
    times: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def goal(self) -> str:
        """The goal in words."""
        if self.least is not None:
            return f"at least {self.least:g} {self.unit}"
        return "" if self.most is None else f"at most {self.most:g} {self.unit}"

    @property
    def reached(self) -> bool | None:
        """Whether the median is as good as the goal; None where there is none."""
        if self.least is not None:
            return self.median >= self.least
        return None if self.most is None else self.median <= self.most

    def to_json(self) -> dict[str, Any]:
        """The line and its times as plain values."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "lowest": min(self.values),
            "highest": max(self.values),
            "rounds": len(self.values),
            "goal": self.goal,
            "reached": self.reached,
            "values": list(self.values),
            "by_processor": list(self.by_processor),
            "times": dict(self.times),
        }


def describe_machine() -> dict[str, Any]:
    """The processor, its cores, the GPU if there is one, and how busy the machine is."""
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def _processor_name() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(lines: Sequence[Line], machine: Mapping[str, Any], console: Console) -> None:
    """Print the machine, a warning where it is busy, and a line a measurement."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    where = f"{machine['processor']}, {machine['cores']} cores" + (
        f", {machine['gpu']}" if machine["gpu"] else ""
    )
    console.print(f"{where}, Python {machine['python']}, {versions}", highlight=False)
    if machine["load"] > IDLE:
        console.print(
            f"[yellow]The machine was busy (a load of {machine['load']:.1f} at the start): measure again on"
            " an idle one before you conclude anything.[/]",
            highlight=False,
        )
    table = Table(box=None, pad_edge=False)
    for title in ("measured", "median", "lowest", "highest", "by processor", "rounds", "goal", "reached"):
        table.add_column(title, justify="left" if title in ("measured", "goal", "reached") else "right")
    words = {None: "", True: "yes", False: "no"}
    for line in lines:
        numbers = [line.median, min(line.values), max(line.values)]
        if line.by_processor:
            numbers.append(statistics.median(line.by_processor))
        shown = [f"{number:.3g} {line.unit}" for number in numbers]
        blanks = [""] * (4 - len(shown))
        rounds = str(len(line.values))
        table.add_row(line.name, *shown, *blanks, rounds, line.goal, words[line.reached])
    console.print(table)


def write_json(path: Path, lines: Sequence[Line], machine: Mapping[str, Any]) -> None:
    """Write the machine, the versions and every line with all its times."""
    versions = {name: version(name) for name in PACKAGES}
    found = {"machine": dict(machine), "versions": versions, "lines": [line.to_json() for line in lines]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
