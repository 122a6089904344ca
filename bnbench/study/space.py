"""Search spaces: what a tuned arm may change in its row, one named dimension each."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnbench.registry import BadInput
from bnbench.study import checks
from bnbench.study.trial import Trial, check_fields, shown

#: A value by the name of each dimension: a Choice's label, or a Range's number.
Point = Mapping[str, Any]


@dataclass(frozen=True, init=False)
class Choice:
    """One of several changes to the row.

    `levels` are labels with the changes that each makes, `Choice("batch size", {"16": {"batch_size": 16,
    "steps": 400}, ...})`, or the values of one field, `Choice("schedule", ("constant", "cosine"))`. Every
    level names the same fields. Options, such as `norm_options`, are added to those of the arm.
    """

    name: str
    levels: Mapping[str, Mapping[str, Any]]

    def __init__(self, name: str, levels: Mapping[str, Mapping[str, Any]] | Sequence[Any]) -> None:
        checks.check_name("dimension", name)
        where = f"dimension {name!r}"
        if not isinstance(levels, Mapping):
            values = checks.several(f"{where}: levels", levels, object, least=1)
            levels = {str(value): {name: value} for value in values}
        for label, changes in levels.items():
            if not isinstance(label, str) or not isinstance(changes, Mapping) or not changes:
                raise BadInput(
                    f"{where}: a level is a label with changes to the row, not {shown({label: changes})}"
                )
            checks.check_changes(f"{where}, level {label!r}", changes)
        if len({tuple(sorted(changes)) for changes in levels.values()}) != 1:
            raise BadInput(f"{where}: every level must change the same fields of the row")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "levels", {label: dict(changes) for label, changes in levels.items()})

    def kept(self, value: str) -> str:
        """The label itself."""
        return value

    def changes(self, value: str) -> dict[str, Any]:
        """The changes of a label."""
        return dict(self.levels[value])

    def value_in(self, trial: Trial) -> str:
        """The label whose changes a row has. Raises LookupError where there is none."""
        for label, changes in self.levels.items():
            if all(_includes(getattr(trial, name), value) for name, value in changes.items()):
                return label
        raise LookupError(f"row {trial.key} has no level of {self.name!r}")

    def stand_in(self, number: int) -> str:
        """One of the labels, each in its turn."""
        return list(self.levels)[number % len(self.levels)]


@dataclass(frozen=True)
class Range:
    """A number of a field between two bounds, drawn on a logarithmic scale and kept to three digits."""

    name: str
    low: float
    high: float

    def __post_init__(self) -> None:
        check_fields([self.name], "a dimension")
        where = f"dimension {self.name!r}"
        for bound in ("low", "high"):
            value = checks.number(f"{where}: {bound}", getattr(self, bound), above=0)
            object.__setattr__(self, bound, value)
            if not isinstance(Trial().as_dict()[self.name], float):
                raise BadInput(f"{where} is no number with a fraction; give its values as a Choice")
            Trial().replace(**{self.name: value})
        if self.low >= self.high:
            raise BadInput(f"{where}: low ({self.low:g}) must be below high ({self.high:g})")

    def kept(self, value: float) -> float:
        """The number as the row has it: three digits, within the bounds."""
        return min(max(float(f"{value:.3g}"), self.low), self.high)

    def changes(self, value: float) -> dict[str, Any]:
        """The field with this value."""
        return {self.name: self.kept(value)}

    def value_in(self, trial: Trial) -> float:
        """The row's value."""
        value: float = getattr(trial, self.name)
        return value

    def stand_in(self, number: int) -> float:
        """A value near the middle, another one for each number."""
        return math.sqrt(self.low * self.high) * (1 + number / 100)


Dimension = Choice | Range
Space = tuple[Dimension, ...]

#: Draws `count` new points, given the earlier ones with what each scored (None: failed) and a seed. It may
#: give fewer where the space has no other points left. `is_new` says whether a point gives a new row.
Sampler = Callable[
    [Space, Sequence[tuple[Point, float | None]], int, tuple[Hashable, ...], Callable[[Point], bool]],
    list[Point],
]


def check_space(where: str, space: Any) -> Space:
    """A tuple of dimensions with different names that set different fields."""
    dimensions: list[Dimension] = []
    for dimension in checks.several(where, space, object):
        if not isinstance(dimension, Choice | Range):
            raise BadInput(f"{where} must hold Choice and Range only, not {shown(dimension)}")
        dimensions.append(dimension)
    seen: dict[str, str] = {}
    for dimension in dimensions:
        for name in fields_of(dimension):
            if name in seen and not name.endswith("_options"):
                raise BadInput(f"{where}: {seen[name]!r} and {dimension.name!r} both set {name!r}")
            seen[name] = dimension.name
    checks.check_unique(f"{where}: dimension", [dimension.name for dimension in dimensions])
    return tuple(dimensions)


def fields_of(dimension: Dimension) -> list[str]:
    """The fields of the row that a dimension sets."""
    if isinstance(dimension, Range):
        return [dimension.name]
    return list(next(iter(dimension.levels.values())))


def changes_of(space: Space, point: Point) -> dict[str, Any]:
    """The changes to the row that a point stands for; options of several dimensions come together."""
    merged: dict[str, Any] = {}
    for dimension in space:
        for name, value in dimension.changes(point[dimension.name]).items():
            is_options = isinstance(value, Mapping) and name in merged
            merged[name] = {**merged[name], **value} if is_options else value
    return merged


def point_of(space: Space, trial: Trial) -> dict[str, Any]:
    """The point that a row stands for. Raises LookupError where it is none of the space."""
    return {dimension.name: dimension.value_in(trial) for dimension in space}


def stand_in(space: Space, number: int) -> dict[str, Any]:
    """Some point of the space, another one for each number, which meets every level in its turn."""
    return {dimension.name: dimension.stand_in(number) for dimension in space}


def most_levels(space: Space) -> int:
    """So many stand-ins meet every level of every dimension."""
    return max((len(d.levels) if isinstance(d, Choice) else 1 for d in space), default=0)


def define(space: Space) -> dict[str, Any]:
    """A space as plain values."""
    return {
        d.name: dict(d.levels) if isinstance(d, Choice) else {"low": d.low, "high": d.high} for d in space
    }


def recall(values: Mapping[str, Mapping[str, Any]]) -> Space:
    """The space that :func:`define` has written down."""
    return tuple(
        Choice(name, levels) if isinstance(next(iter(levels.values())), Mapping) else Range(name, **levels)
        for name, levels in values.items()
    )


def _includes(value: Any, wanted: Any) -> bool:
    """Whether a field has a value, or its options have these among others."""
    if isinstance(wanted, Mapping) and isinstance(value, Mapping):
        return all(name in value and value[name] == part for name, part in wanted.items())
    return bool(value == wanted)
