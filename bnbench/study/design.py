"""What a study trains: arms, cells and the design of a preset."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bnbench.registry import BadInput
from bnbench.study import checks, smoke
from bnbench.study.space import Space, changes_of, check_space, define
from bnbench.study.trial import Trial, check_fields, shown

#: Where arms are tuned once for all replicates, this many replicates of their own choose.
TUNING_REPLICATES = 3

_TUNINGS = ("per_replicate", "once")


@dataclass(frozen=True, init=False)
class Arm:
    """What is compared inside a cell: a named change to the row, `Arm("group-8", norm="group", ...)`.

    An arm with a `space` is tuned by searching it; one without, over the design's grid of learning rates.
    A dimension may be given by cell: `space={"mlp": (...), "cnn": (...)}`. An arm is in every cell, or in
    those that `cells` names.
    """

    name: str
    changes: Mapping[str, Any]
    space: Space | Mapping[str, Space] = ()
    cells: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        *,
        space: Space | Mapping[str, Space] = (),
        cells: tuple[str, ...] = (),
        **changes: Any,
    ) -> None:
        checks.check_name("arm", name)
        checks.check_changes(f"arm {name!r}", changes, "space", "cells")
        where = f"arm {name!r}: space"
        if isinstance(space, Mapping):
            space = {cell: check_space(f"{where} in {cell!r}", found) for cell, found in space.items()}
        else:
            space = check_space(where, space)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "changes", changes)
        object.__setattr__(self, "space", space)
        object.__setattr__(self, "cells", checks.several(f"arm {name!r}: cells", cells, str))

    def space_in(self, cell: str) -> Space:
        """What is searched in a cell; empty where the arm is tuned over the grid of learning rates."""
        return self.space.get(cell, ()) if isinstance(self.space, Mapping) else self.space


@dataclass(frozen=True, init=False)
class Cell:
    """The unit of a verdict: model, data and factor levels as a named change to the row.

    `constants` are numbers registered with the cell that analysis reads, such as a target accuracy. A cell
    with `replicates` has so many, whatever its design says.
    """

    name: str
    changes: Mapping[str, Any]
    constants: Mapping[str, float]
    replicates: int | None

    def __init__(
        self,
        name: str,
        *,
        constants: Mapping[str, float] | None = None,
        replicates: int | None = None,
        **changes: Any,
    ) -> None:
        checks.check_name("cell", name)
        checks.check_changes(f"cell {name!r}", changes, "constants", "replicates")
        if replicates is not None:
            checks.check_whole(f"cell {name!r}: replicates", replicates, least=1)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "changes", changes)
        numbers = checks.numbers(f"cell {name!r}: constants", {} if constants is None else constants)
        object.__setattr__(self, "constants", numbers)
        object.__setattr__(self, "replicates", replicates)


@dataclass(frozen=True)
class Factor:
    """Levels of one field of the row: `Factor("batch_size", (2, 8, 32))`."""

    field: str
    levels: tuple[Any, ...]

    def __post_init__(self) -> None:
        check_fields([self.field], "a factor")
        levels = checks.several(f"factor {self.field!r}: levels", self.levels, object, least=1)
        for level in levels:
            checks.check_changes(f"factor {self.field!r}", {self.field: level})
        object.__setattr__(self, "levels", levels)


def cross(cells: tuple[Cell, ...], *factors: Factor) -> tuple[Cell, ...]:
    """Every cell at every combination of the factors' levels, named `mlp · B=64`."""
    combined = []
    for cell, *levels in itertools.product(cells, *(f.levels for f in factors)):
        pairs = list(zip((f.field for f in factors), levels, strict=True))
        name = " · ".join([cell.name, *(f"{key}={value}" for key, value in pairs)])
        changes = {**cell.changes, **dict(pairs)}
        combined.append(Cell(name, constants=cell.constants, replicates=cell.replicates, **changes))
    return tuple(combined)


@dataclass(frozen=True)
class Design:
    """What one preset of a study trains.

    `lr` is the grid that every arm without a space gets. `tuning` is "per_replicate" (each replicate chooses
    by its own validation score) or "once" (three tuning replicates of their own choose for all). An arm with
    a space gets `trials` points a search, drawn `batch` at a time; under "once" the search is repeated
    `searches` times, each on a tuning replicate of its own, and the best points of all are tried on every
    one. `trials` may be given by cell. `curve_points` is the number of evaluations on the way of a confirmed
    row, up to 26 a factor of 1.15 apart. Where `timing_steps` is not 0, every confirmed replicate of an arm,
    or the first `timed` ones, also trains for so many steps with nothing beside it, to measure the time and
    the memory of a step. Without `common`, no arm is confirmed at the baseline's learning rate.
    """

    base: Trial
    cells: tuple[Cell, ...]
    arms: tuple[Arm, ...]
    lr: tuple[float, ...]
    replicates: int = 10
    tuning: Literal["per_replicate", "once"] = "per_replicate"
    curve_points: int = 26
    trials: int | Mapping[str, int] = 0
    batch: int = 8
    searches: int = 3
    timing_steps: int = 0
    timed: int | None = None
    common: bool = True
    probes: Mapping[str, Any] = field(default_factory=dict)
    probed: int | None = None
    smoke: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.base, Trial):
            raise BadInput(f"base must be a Trial, not {shown(self.base)}")
        if self.base.probes:
            raise BadInput("base has probes; confirmed rows alone are probed, so give `probes` to the design")
        if self.base.score_on != "val":
            raise BadInput(
                "base reads test data; the design itself says which rows do, so leave score_on out"
            )
        object.__setattr__(self, "cells", checks.several("cells", self.cells, Cell, least=1))
        object.__setattr__(self, "arms", checks.several("arms", self.arms, Arm, least=1))
        for kind, names in (("cell", [c.name for c in self.cells]), ("arm", [a.name for a in self.arms])):
            checks.check_unique(kind, names)
        rates = tuple(
            checks.number("lr", lr, above=0) for lr in checks.several("lr", self.lr, object, least=1)
        )
        if list(rates) != sorted(set(rates)):
            raise BadInput(f"lr must be a rising grid of learning rates, not {shown(self.lr)}")
        object.__setattr__(self, "lr", rates)
        checks.check_choice("tuning", self.tuning, _TUNINGS)
        checks.check_whole("replicates", self.replicates, least=1)
        checks.check_whole("curve_points", self.curve_points, least=0)
        checks.check_whole("timing_steps", self.timing_steps, least=0)
        object.__setattr__(self, "probes", self.base.replace(probes=self.probes).probes)
        if self.probed is not None:
            checks.check_whole("probed, the replicates with probes,", self.probed, least=1)
        if self.timed is not None:
            checks.check_whole("timed, the replicates with a timed row,", self.timed, least=1)
        for name in ("common", "smoke"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name} must be True or False, not {shown(getattr(self, name))}")
        self._check_searches()
        for arm in self.arms:
            for name in arm.cells:
                checks.check_known(f"arm {arm.name!r} names a cell", name, [c.name for c in self.cells])
        for cell in self.cells:
            for arm in self.arms_in(cell.name):
                try:
                    self.trial(cell, arm, 0)
                except BadInput as error:
                    raise BadInput(f"cell {cell.name!r}, arm {arm.name!r}: {error}") from None

    def _check_searches(self) -> None:
        names = [cell.name for cell in self.cells]
        by_cell = self.trials if isinstance(self.trials, Mapping) else {}
        for name, count in by_cell.items():
            checks.check_known("trials names a cell", name, names)
            checks.check_whole(f"trials in {name!r}", count, least=1)
        for arm in self.arms:
            for name in arm.space if isinstance(arm.space, Mapping) else ():
                checks.check_known(f"arm {arm.name!r} names in its space a cell", name, names)
        if not isinstance(self.trials, Mapping):
            searched = any(arm.space for arm in self.arms)
            checks.check_whole("trials, the points of a search,", self.trials, least=1 if searched else 0)
        checks.check_whole("batch", self.batch, least=1)
        checks.check_whole("searches", self.searches, least=1)
        if self.searches > TUNING_REPLICATES:
            raise BadInput(f"searches must be {TUNING_REPLICATES} at most, the number of tuning replicates")

    def arms_in(self, cell: str) -> tuple[Arm, ...]:
        """The arms that are compared in a cell."""
        return tuple(arm for arm in self.arms if not arm.cells or cell in arm.cells)

    def replicates_in(self, cell: str) -> int:
        """The number of replicates of a cell: its own, or the design's; at the smallest size always that."""
        own = self.cell(cell).replicates
        return self.replicates if own is None or self.smoke else own

    def trials_in(self, cell: str) -> int:
        """The number of points of one search in a cell."""
        return self.trials if isinstance(self.trials, int) else self.trials.get(cell, 0)

    def searched(self, cell: Cell, arm: Arm, replicate: int, point: Mapping[str, Any]) -> Trial:
        """The row of a point of the arm's space; options are added to those of cell and arm."""
        row = self.trial(cell, arm, replicate)
        changes = changes_of(arm.space_in(cell.name), point)
        for name, value in changes.items():
            if isinstance(value, Mapping):
                changes[name] = {**getattr(row, name), **value}
        return self.trial(cell, arm, replicate, **changes)

    def trial(self, cell: Cell, arm: Arm, replicate: int, **point: Any) -> Trial:
        """The row of an arm in a cell, with the replicate's data and seed."""
        row = self.base.replace(**{**cell.changes, **arm.changes, **point, **self.seeds(replicate)})
        return smoke.smallest(row) if self.smoke else row

    def seeds(self, replicate: int) -> dict[str, int]:
        """The seeds of a replicate: the base's, plus its number."""
        return {"data_seed": self.base.data_seed + replicate, "seed": self.base.seed + replicate}

    def probes_of(self, replicate: int) -> Mapping[str, Any]:
        """The probes of a replicate's confirmed rows."""
        return self.probes if self.probed is None or replicate < self.probed else {}

    def times(self, replicate: int) -> bool:
        """Whether a replicate has rows that are trained alone, to measure a step."""
        return self.timing_steps > 0 and (self.timed is None or replicate < self.timed)

    def cell(self, name: str) -> Cell:
        """The cell of this name."""
        cells = {cell.name: cell for cell in self.cells}
        checks.check_known("a design is asked for a cell", name, list(cells))
        return cells[name]


#: Fields of a cell that make another network, or read other data.
_SHAPING = (
    *("data", "data_options", "model", "model_options", "activation", "order", "norm", "norm_options"),
    *("last_norm_options", "reparam", "precision", "devices", "num_nodes"),
)


def smallest_design(full: Design) -> Design:
    """Every shape of a design for two steps: one replicate, one learning rate, one point a search.

    Of cells with the same network, data set and arms, which differ in label noise, samples or the like, only
    the first is kept.
    """
    kept: dict[Any, Cell] = {}
    for cell in full.cells:
        row = full.base.replace(**cell.changes)
        shape = [str(getattr(row, name)) for name in _SHAPING]
        kept.setdefault((*shape, *(arm.name for arm in full.arms_in(cell.name))), cell)
    names = {cell.name for cell in kept.values()}
    arms = tuple(
        Arm(
            arm.name,
            space=_of_cells(smoke.left_of(arm.space), names),
            cells=tuple(name for name in arm.cells if name in names),
            **arm.changes,
        )
        for arm in full.arms
    )
    return replace(
        full,
        cells=tuple(kept.values()),
        arms=arms,
        replicates=1,
        lr=full.lr[:1],
        tuning="per_replicate",
        trials=1 if any(arm.space for arm in arms) else 0,
        curve_points=min(smoke.CURVE_POINTS, full.curve_points),
        timing_steps=min(smoke.STEPS, full.timing_steps),
        probes=smoke.cheap(full.probes),
        smoke=True,
    )


def _of_cells(space: Space | Mapping[str, Space], names: set[str]) -> Space | dict[str, Space]:
    """A space, given by cell or not, for some of the cells."""
    return {cell: space[cell] for cell in space if cell in names} if isinstance(space, Mapping) else space


def define_searches(design: Design) -> dict[str, Any]:
    """What a definition says of searches, where it has any."""
    spaces = {
        cell.name: {
            arm.name: define(space) for arm in design.arms_in(cell.name) if (space := arm.space_in(cell.name))
        }
        for cell in design.cells
    }
    if not any(spaces.values()):
        return {}
    trials = {cell.name: design.trials_in(cell.name) for cell in design.cells}
    return {"trials": trials, "batch": design.batch, "searches": design.searches, "spaces": spaces}
