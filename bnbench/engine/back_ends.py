"""Which back end trains each row of a study: the row by itself, or a fleet of rows of its shape."""

from __future__ import annotations

from dataclasses import replace

from bnbench.engine.fleet import can_fleet
from bnbench.registry import BadInput
from bnbench.study.design import Cell, Design
from bnbench.study.programs import Program, Results
from bnbench.study.trial import Trial

#: What `--fleet` takes.
FLEETS = ("auto", "off", "eager", "compiled")
#: Models of which one training leaves most of a processor, or of a GPU, to Python.
_SMALL_HERE = ("mlp",)
_SMALL_ON_GPU = ("mlp", "cnn", "resnet8", "resnet20")


def back_ends_of(design: Design, fleet: str, on_gpu: bool) -> dict[str, str]:
    """The back end of each cell's rows: "single", "eager" or "compiled".

    Back ends differ in rounding, so all arms of a cell share one: fleets only where every arm can train in
    one, none searches a space (its points differ in shape), and the study sets no `backend` itself. With
    `fleet` "auto" these are eager, for small models only.
    """
    return {cell.name: _back_end_of(design, cell, fleet, on_gpu) for cell in design.cells}


def _back_end_of(design: Design, cell: Cell, fleet: str, on_gpu: bool) -> str:
    arms = design.arms_in(cell.name)
    # To try a network for a fleet takes longer than the two steps of a smallest row.
    too_small = fleet == "auto" and design.smoke
    if fleet == "off" or too_small or any(arm.space_in(cell.name) for arm in arms):
        return "single"
    changed = (design.base.changed(), cell.changes, *(arm.changes for arm in arms))
    if any("backend" in changes for changes in changed):
        return "single"
    rows = [design.trial(cell, arm, 0) for arm in arms]
    if fleet == "auto":
        small = _SMALL_ON_GPU if on_gpu else _SMALL_HERE
        if any(row.model not in small for row in rows):
            return "single"
        fleet = "eager"
    return fleet if all(map(can_fleet, rows)) else "single"


def on_back_end(trial: Trial, back_end: str) -> Trial:
    """The row on the back end of its cell, or on its own where its study sets one.

    Rows with probes, rows that are trained alone, and those on several devices are always single; so are
    then the rows that they are compared with.
    """
    if trial.probes or trial.alone or trial.world_size > 1:
        back_end = "single"
    elif trial.backend != "single":
        back_end = trial.backend
    return trial if trial.backend == back_end else trial.replace(backend=back_end)


def program_on(program: Program, back_end: str) -> Program:
    """The same program, whose rows are asked for, and come back, on the back end of their cell.

    Inside it they keep their own keys, so that what it chooses does not know of back ends.
    """
    results: Results | None = None
    while True:
        try:
            wanted = next(program) if results is None else program.send(results)
        except StopIteration as stop:
            return [replace(entry, trial=on_back_end(entry.trial, back_end)) for entry in stop.value]
        rows = [replace(row, trial=on_back_end(row.trial, back_end)) for row in wanted]
        found = yield rows
        pairs = zip(wanted, rows, strict=True)
        results = {own.trial.key: found[row.trial.key] for own, row in pairs}


def check_back_end(trial: Trial) -> None:
    """Raise BadInput where a row that is to train in a fleet cannot."""
    if trial.backend != "single" and not can_fleet(trial):
        raise BadInput(
            f"backend cannot be {trial.backend!r} for this row, which no fleet takes (it has probes, or is"
            " trained alone, or its norm needs to be by itself); 'single' can"
        )
