"""What convert_norm, revert and fold_norm report: what they changed, what they left and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Left:
    """A layer that was left as it is, and why."""

    path: str
    layer: str
    reason: str

    def __str__(self) -> str:
        return f"left {self.path} ({self.layer}): {self.reason}"


@dataclass(frozen=True)
class Change:
    """One layer that was swapped.

    kept, new, dropped: parameters and buffers that it took over, that start afresh, and that it has not.
    difference: the greatest difference between the evaluations of the two layers on a random input, in units
    of the greatest output; None where they are different functions by definition.
    kind: the class of the old layer.
    """

    path: str
    before: str
    after: str
    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    difference: float | None
    kind: type[nn.Module] = field(repr=False)


@dataclass(frozen=True)
class Conversion:
    """The converted model, and what was changed in it and what left; as text it is a table."""

    model: nn.Module = field(repr=False)
    changed: tuple[Change, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...]

    @property
    def max_difference(self) -> float | None:
        """The greatest difference among the layers whose evaluation had to stay; None where none had to."""
        return max((c.difference for c in self.changed if c.difference is not None), default=None)

    def __str__(self) -> str:
        rows = [("layer", "from", "to", "kept", "new", "difference")]
        for change in self.changed:
            state = (" ".join(change.kept) or "-", " ".join(change.new) or "-")
            difference = "other function" if change.difference is None else f"{change.difference:.1e}"
            rows.append((change.path, change.before, change.after, *state, difference))
        return _table(rows, f"{len(self.changed)} changed, {len(self.left)} left", self.left, self.notes)


@dataclass(frozen=True)
class Fold:
    """A norm that was folded into the linear map before it, and both paths.

    difference: that of their evaluations on a random input, in units of the greatest output.
    """

    map: str
    norm: str
    difference: float


@dataclass(frozen=True)
class Folding:
    """The folded model, and what was folded in it and what left; as text it is a table.

    found_by: how it was told which map feeds which norm: "tracing" or "order in Sequential".
    difference: that of the model's outputs for the example, in units of the greatest; None without one.
    """

    model: nn.Module = field(repr=False)
    folded: tuple[Fold, ...]
    left: tuple[Left, ...]
    found_by: str
    difference: float | None

    def __str__(self) -> str:
        rows = [("norm", "folded into", "difference")]
        rows += [(fold.norm, fold.map, f"{fold.difference:.1e}") for fold in self.folded]
        notes = [f"pairs found by {self.found_by}"]
        if self.difference is not None:
            notes.append(f"the outputs for the example differ by {self.difference:.1e} of the greatest")
        return _table(rows, f"{len(self.folded)} folded, {len(self.left)} left", self.left, tuple(notes))


def _table(
    rows: Sequence[tuple[str, ...]], total: str, left: tuple[Left, ...], notes: tuple[str, ...]
) -> str:
    """Rows under a head in aligned columns, the total, and a line for each thing left and each note."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] if len(rows) > 1 else []
    return "\n".join([*lines, total, *map(str, left), *(f"note: {note}" for note in notes)])
