"""Which of a cell's registered constants an estimand reads."""

from __future__ import annotations

import contextlib
from typing import Any

from bnbench.probes import Trace
from bnbench.study.design import Cell, Design
from bnbench.study.spec import Hypothesis, Study
from bnbench.study.table import Entry, Replicate, Result, Role

#: The constant that is an accuracy on the cell's data, reached by its model.
TARGET = "target"


def reads_target(study: Study, preset: str) -> bool:
    """Whether a hypothesis of a study counts to a target accuracy."""
    design = study.design(preset)
    return any(
        TARGET in constants_read(h, design, cell)
        for h in study.hypotheses
        for cell in study.cells_of(h, preset)
    )


def constants_read(hypothesis: Hypothesis, design: Design, cell: Cell) -> frozenset[str]:
    """The names of the constants that a hypothesis' estimand reads, found by trying it once."""
    constants = _Reads(0.5)
    roles: tuple[tuple[Role, tuple[float, ...]], ...] = (
        *((role, design.lr[:1]) for role in _CONFIRMED),
        ("tune", design.lr),
    )
    entries = [
        Entry(cell.name, arm.name, 0, role, design.trial(cell, arm, 0, lr=lr), _MADE_UP)
        for arm in design.arms_in(cell.name)
        for role, rates in roles
        for lr in rates
    ]
    with contextlib.suppress(LookupError, ValueError, ArithmeticError):
        hypothesis.estimand(Replicate(cell.name, 0, constants, tuple(entries)))
    return frozenset(constants.names)


class _Reads(dict[str, Any]):
    """Has the same value under every name, and keeps the names."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value, self.names = value, set[str]()

    def __missing__(self, name: str) -> Any:
        self.names.add(name)
        return self.value


class _Every(tuple[int, ...]):
    """Holds every number, all at one place."""

    def __contains__(self, number: object) -> bool:
        return True

    def index(self, *_: Any) -> int:
        return 0


_CONFIRMED: tuple[Role, ...] = ("own", "common", "timing")
# Every step has a reading here, so that an estimand goes on to what it reads after a probe.
_MADE_UP = Result(
    "done",
    metrics=_Reads(0.5),
    curve=_Reads((1.0, 2.0)),
    traces=_Reads(Trace(steps=_Every((0,)), values=_Reads((0.5,)))),
)
