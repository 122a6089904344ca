"""What a probe has measured: single readings, and the trace of all readings of a run, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Label = str | float


@dataclass(frozen=True)
class Reading:
    """What a probe measured at one moment.

    `values` are single numbers by name. `series` hold one number for each label of `index`, which says along
    what (`axis`): the names of layers, the sizes of a step.
    """

    values: Mapping[str, float]
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    axis: str = ""
    index: tuple[Label, ...] = ()

    def __post_init__(self) -> None:
        for name, numbers in self.series.items():
            if len(numbers) != len(self.index):
                raise ValueError(f"{name} has {len(numbers)} numbers for {len(self.index)} labels")


@dataclass(frozen=True)
class Trace:
    """All readings of one probe in one run, at optimizer steps `steps`.

    `values[name]` has one number a step, `series[name]` one tuple a step, along `axis` as in a reading.
    """

    axis: str = ""
    index: tuple[Label, ...] = ()
    steps: tuple[int, ...] = ()
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    series: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    def at(self, step: int) -> Reading:
        """The reading of one step. Raises LookupError where there is none."""
        if step not in self.steps:
            raise LookupError(f"no reading at step {step}; there are readings at {self.steps}")
        place = self.steps.index(step)
        return Reading(
            {name: numbers[place] for name, numbers in self.values.items()},
            {name: rows[place] for name, rows in self.series.items()},
            self.axis,
            self.index,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values for JSON, where a number that is not finite is None."""
        return {
            "axis": self.axis,
            "index": list(self.index),
            "steps": list(self.steps),
            "values": {name: _plain(numbers) for name, numbers in self.values.items()},
            "series": {name: [_plain(row) for row in rows] for name, rows in self.series.items()},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Trace:
        """The trace that :meth:`to_json` wrote; None is NaN again."""
        return cls(
            found["axis"],
            tuple(found["index"]),
            tuple(found["steps"]),
            {name: _numbers(row) for name, row in found["values"].items()},
            {name: tuple(map(_numbers, rows)) for name, rows in found["series"].items()},
        )


def trace_of(readings: Mapping[int, Reading]) -> Trace:
    """The readings of a run, by optimizer step, as one trace.

    A value that some reading lacks is NaN there. Raises ValueError where the readings differ in their index.
    """
    steps = tuple(sorted(readings))
    ordered = [readings[step] for step in steps]
    indices = {(reading.axis, reading.index) for reading in ordered if reading.series}
    if len(indices) > 1:
        raise ValueError("the readings of a run have different indices")
    axis, index = next(iter(indices), ("", ()))
    nothing = (math.nan,) * len(index)
    values = list(dict.fromkeys(name for reading in ordered for name in reading.values))
    series = list(dict.fromkeys(name for reading in ordered for name in reading.series))
    return Trace(
        axis,
        index,
        steps,
        {name: tuple(r.values.get(name, math.nan) for r in ordered) for name in values},
        {name: tuple(r.series.get(name, nothing) for r in ordered) for name in series},
    )


def _plain(numbers: Sequence[float]) -> list[float | None]:
    return [float(number) if math.isfinite(number) else None for number in numbers]


def _numbers(found: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if number is None else float(number) for number in found)
