"""What a study asks and claims: hypotheses with their estimands, claims, and the study itself."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bnbench.registry import BadInput, nearest
from bnbench.study import checks
from bnbench.study.design import Cell, Design, define_searches, smallest_design
from bnbench.study.table import Replicate
from bnbench.study.trial import ROW_VERSION, shown

#: Raised when the analysis code changes what a verdict is.
ANALYSIS_VERSION = 1

_ALLOWS = ("both", "support", "refute", "neither")
_KINDS = ("greater", "equivalent")
_PROGRAMS = ("search", "sweep")


@dataclass(frozen=True)
class Estimate:
    """One number a replicate, with what a censored observation still allows it to show.

    `allows` is "both" for a value that was observed, "support" or "refute" where the true value lies at
    least as far in that direction, "neither" where both members of the pair are censored.
    """

    value: float
    allows: Literal["both", "support", "refute", "neither"] = "both"

    def __post_init__(self) -> None:
        checks.check_choice("what an estimate allows", self.allows, _ALLOWS)


Estimand = Callable[[Replicate], float | Estimate]


@dataclass(frozen=True)
class Hypothesis:
    """A sentence that data can refute.

    `estimand` gives one number a replicate, signed in the claim's direction; `delta` is the smallest effect
    that matters, in the estimand's unit, or the name of a cell's constant that holds it. `better` and
    `other` name the arms that are read. Gates on tuning look at both, the gate on divergence at `better`, and
    the one on training accuracy at `other`, if there is any: where it counts, `other` names the arms without
    noise or penalty, and `better` all the rest. `cells` restricts the hypothesis to some cells; `half_width`
    is the expected half-width of the simultaneous interval, from a pilot that was tuned in the same way.
    `against` marks a sentence that contradicts its claim: where it is SUPPORTED, that speaks against the
    claim, and the other way round.
    """

    name: str
    claim: str
    sentence: str
    estimand: Estimand
    delta: float | str
    better: tuple[str, ...]
    other: tuple[str, ...] = ()
    kind: Literal["greater", "equivalent"] = "greater"
    primary: bool = True
    unit: str = ""
    cells: tuple[str, ...] | None = None
    half_width: Mapping[str, float] = field(default_factory=dict)
    against: bool = False

    def __post_init__(self) -> None:
        checks.check_name("hypothesis", self.name)
        where = f"hypothesis {self.name!r}:"
        checks.check_text(f"{where} claim", self.claim)
        checks.check_text(f"{where} sentence", self.sentence)
        checks.check_choice(f"{where} kind", self.kind, _KINDS)
        if not isinstance(self.delta, str):
            object.__setattr__(self, "delta", checks.number(f"{where} delta", self.delta, above=0))
        if not isinstance(self.unit, str):
            raise BadInput(f"{where} unit must be a text, not {shown(self.unit)}")
        for name in ("primary", "against"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{where} {name} must be True or False, not {shown(getattr(self, name))}")
        object.__setattr__(self, "better", checks.several(f"{where} better", self.better, str, least=1))
        object.__setattr__(self, "other", checks.several(f"{where} other", self.other, str))
        if self.cells is not None:
            object.__setattr__(self, "cells", checks.several(f"{where} cells", self.cells, str, least=1))
        object.__setattr__(
            self, "half_width", checks.numbers(f"{where} half_width", self.half_width, above=0)
        )
        if not callable(self.estimand):
            raise BadInput(f"{where} estimand must be a function of a replicate, not {shown(self.estimand)}")
        try:
            json.dumps(_source(self.estimand), allow_nan=False)
        except (OSError, TypeError, ValueError):
            raise BadInput(
                f"{where} estimand must be a function whose source can be read, or functools.partial of one"
                f" with plain values bound, not {shown(self.estimand)}"
            ) from None

    def delta_in(self, cell: Cell) -> float:
        """The smallest effect that matters in this cell."""
        return self.delta if not isinstance(self.delta, str) else cell.constants[self.delta]


@dataclass(frozen=True)
class Claim:
    """A sentence of the tutorials, by its number, and what the literature has measured about it."""

    id: str
    sentence: str
    literature: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.check_text("claim id", self.id)
        if not isinstance(self.sentence, str):
            raise BadInput(f"claim {self.id!r}: sentence must be a text, not {shown(self.sentence)}")
        object.__setattr__(
            self, "literature", checks.several(f"claim {self.id!r}: literature", self.literature, str)
        )


@dataclass(frozen=True)
class Study:
    """A question, its hypotheses and how it is answered.

    `program` "search" tunes the learning rate of every arm on validation data and confirms the choice on
    test data; "sweep" trains the whole grid and reads validation data only. `baseline` names the arm whose
    best learning rate is the common one. A `ranked` study compares many arms of which it claims little: its
    report ranks them in every cell, each against the baseline. `tried` is the design that the preset smoke
    makes as small as still trains; `full` where it is None.
    """

    name: str
    question: str
    hypotheses: tuple[Hypothesis, ...]
    quick: Design
    full: Design
    baseline: str
    program: Literal["search", "sweep"] = "search"
    ranked: bool = False
    tried: Design | None = None

    def __post_init__(self) -> None:
        checks.check_name("study", self.name)
        where = f"study {self.name!r}:"
        checks.check_text(f"{where} question", self.question)
        checks.check_choice(f"{where} program", self.program, _PROGRAMS)
        object.__setattr__(
            self, "hypotheses", checks.several(f"{where} hypotheses", self.hypotheses, Hypothesis)
        )
        checks.check_unique(f"{where} hypothesis", [h.name for h in self.hypotheses])
        if not isinstance(self.ranked, bool) or (self.ranked and self.program != "search"):
            raise BadInput(f"{where} ranked must be True or False, and False in a sweep, which has no tests")
        for name in ("quick", "full", *(["tried"] if self.tried is not None else [])):
            if not isinstance(getattr(self, name), Design):
                raise BadInput(f"{where} {name} must be a Design, not {shown(getattr(self, name))}")
            self._check_reading(f"{where} {name} reads", getattr(self, name))
        cells = list(dict.fromkeys(cell.name for design in (self.quick, self.full) for cell in design.cells))
        for h in self.hypotheses:
            for cell in [*(h.cells or ()), *h.half_width]:
                checks.check_known(f"{where} hypothesis {h.name!r} names a cell", cell, cells)

    def _check_reading(self, where: str, design: Design) -> None:
        """Raise BadInput where an arm or a constant is read that a design has not."""
        arms = {cell.name: [arm.name for arm in design.arms_in(cell.name)] for cell in design.cells}
        for cell in design.cells:
            read = f"{where} as its baseline in cell {cell.name!r} an arm"
            checks.check_known(read, self.baseline, arms[cell.name])
        for h in self.hypotheses:
            for cell in _cells(h, design):
                for arm in (*h.better, *h.other):
                    read = f"{where} in hypothesis {h.name!r} and cell {cell.name!r} an arm"
                    checks.check_known(read, arm, arms[cell.name])
                if isinstance(h.delta, str):
                    read = f"{where} in hypothesis {h.name!r} and cell {cell.name!r} a constant"
                    checks.check_known(read, h.delta, list(cell.constants))
                    checks.number(f"{where} delta in {cell.name!r}, which", h.delta_in(cell), above=0)

    def design(self, preset: str) -> Design:
        """The design of a preset: `quick`, `full`, or `smoke` (every shape of what is tried, two steps)."""
        if preset == "smoke":
            return self._smallest
        if preset not in ("quick", "full"):
            raise BadInput(f"no preset named {preset!r}{nearest(preset, ('quick', 'full', 'smoke'))}")
        return self.quick if preset == "quick" else self.full

    @functools.cached_property
    def _smallest(self) -> Design:
        """Made once: to find the smallest batch of every row, many are tried."""
        return smallest_design(self.full if self.tried is None else self.tried)

    def cells_of(self, hypothesis: Hypothesis, preset: str) -> tuple[Cell, ...]:
        """The cells of a preset that a hypothesis speaks of."""
        return _cells(hypothesis, self.design(preset))

    def definition(self, preset: str) -> dict[str, Any]:
        """The expanded declaration as plain values: what is registered before the first trial."""
        design = self.design(preset)
        return {
            "name": self.name,
            "preset": preset,
            "question": self.question,
            "program": self.program,
            "baseline": self.baseline,
            "analysis_version": ANALYSIS_VERSION,
            "row_version": ROW_VERSION,
            "lr": list(design.lr),
            "replicates": design.replicates,
            "tuning": design.tuning,
            "curve_points": design.curve_points,
            **({"timing_steps": design.timing_steps} if design.timing_steps else {}),
            **({"timed": design.timed} if design.timed is not None else {}),
            **({} if design.common else {"common": False}),
            **({"ranked": True} if self.ranked else {}),
            **({"probes": dict(design.probes), "probed": design.probed} if design.probes else {}),
            **define_searches(design),
            "cells": {
                cell.name: {
                    "constants": dict(cell.constants),
                    **_own_replicates(design, cell),
                    "arms": {
                        arm.name: design.trial(cell, arm, 0).changed() for arm in design.arms_in(cell.name)
                    },
                }
                for cell in design.cells
            },
            "hypotheses": {
                h.name: {
                    "claim": h.claim,
                    "sentence": h.sentence,
                    # JSON has no tuples, in which doses and groups of arms are bound.
                    "estimand": json.loads(json.dumps(_source(h.estimand))),
                    "delta": h.delta,
                    "kind": h.kind,
                    "primary": h.primary,
                    "better": list(h.better),
                    "other": list(h.other),
                    "cells": [cell.name for cell in _cells(h, design)],
                    "half_width": dict(h.half_width),
                    **({"against": True} if h.against else {}),
                }
                for h in self.hypotheses
            },
        }

    def hash(self, preset: str) -> str:
        """12 hexadecimal digits of SHA-256 over the definition: the study's identity."""
        text = json.dumps(self.definition(preset), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _own_replicates(design: Design, cell: Cell) -> dict[str, int]:
    """What a definition says of a cell with another number of replicates than its design."""
    own = design.replicates_in(cell.name)
    return {} if own == design.replicates else {"replicates": own}


def _cells(hypothesis: Hypothesis, design: Design) -> tuple[Cell, ...]:
    return tuple(c for c in design.cells if hypothesis.cells is None or c.name in hypothesis.cells)


def _source(estimand: Any) -> list[Any]:
    """The source text of an estimand and the arguments that are bound to it."""
    if isinstance(estimand, functools.partial):
        return [*_source(estimand.func), list(estimand.args), dict(estimand.keywords)]
    return [inspect.getsource(estimand)]
