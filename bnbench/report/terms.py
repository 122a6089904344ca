"""The design of a study in plain words: learning rates, tuning, searches and what they cost."""

from __future__ import annotations

from collections.abc import Mapping

from bnbench.engine.search import STARTUP
from bnbench.report.result import StudyResult
from bnbench.report.searches import has_searches, searched_arms
from bnbench.report.words import dimension_words
from bnbench.study.design import TUNING_REPLICATES, Arm, Cell, Design
from bnbench.study.programs import SHORTLIST
from bnbench.study.space import Range, Space


def tuning_terms(result: StudyResult) -> list[tuple[str, str]]:
    """How the arms of a study are tuned: names with explanations."""
    design = result.design
    terms = [("Learning rates", _learning_rates(design)), ("Tuning", _tuning(result))]
    if not has_searches(design):
        return terms
    terms.append(("Searches", _searches(design)))
    if design.tuning == "once":
        shortlist = (
            f"the {SHORTLIST} best settings of each search are tried on all {TUNING_REPLICATES} tuning"
            " replicates, and the one with the best mean validation accuracy is confirmed"
        )
        terms.append(("Comparing the best", shortlist))
    terms.append(("Trainings to choose, an arm", _costs(design)))
    return terms


def space_words(design: Design, arm: Arm) -> list[str]:
    """What an arm tunes, a text a dimension: `learning rate: 0.001 to 3`, by cell where cells differ."""
    cells: dict[str, dict[str, list[str]]] = {}
    for cell in design.cells:
        for name, levels in _levels(arm.space_in(cell.name)).items():
            cells.setdefault(name, {}).setdefault(levels, []).append(cell.name)
    return [
        f"{name}: " + "; ".join(
            levels if len(where) == len(design.cells) else f"{levels} ({', '.join(where)})"
            for levels, where in found.items()
        )
        for name, found in cells.items()
    ]  # fmt: skip


def _levels(space: Space) -> dict[str, str]:
    return {
        dimension_words(d.name): f"{d.low:g} to {d.high:g}" if isinstance(d, Range) else " | ".join(d.levels)
        for d in space
    } or {"learning rate": "the grid"}


def _learning_rates(design: Design) -> str:
    rates = ", ".join(f"{lr:g}" for lr in design.lr)
    if not has_searches(design):
        return f"{rates}, the same for every arm"
    on_grid = [arm.name for arm in design.arms if not all(arm.space_in(cell.name) for cell in design.cells)]
    if not on_grid:
        return "searched by every arm"
    return f"{rates} for {', '.join(f'“{name}”' for name in on_grid)}; searched by the other arms"


def _tuning(result: StudyResult) -> str:
    if result.study.program == "sweep":
        return "none: the whole grid is trained and validation data are read"
    where = (
        "once, on three replicates of its own, by"
        if result.design.tuning == "once"
        else "in every replicate by its own"
    )
    return f"{where} validation accuracy; test data are read once, by the confirming training"


def _searches(design: Design) -> str:
    once = design.tuning == "once"
    repeated = f"{design.searches} for each arm and cell" if once else "one for each arm, cell and replicate"
    trials = _by_cell({
        cell.name: f"{design.trials_in(cell.name)} trials" for cell in design.cells
        if searched_arms(design, cell)
    })  # fmt: skip
    return (
        f"{repeated}, each with data and a seed of its own. {trials}, {design.batch} at a time: the arm's own"
        f" setting first where the space has it, at random until {STARTUP} are scored, then by a multivariate"
        " tree-structured Parzen estimator (TPE) from the scores of the same search"
    )


def _costs(design: Design) -> str:
    return _by_cell({cell.name: _cost(design, cell) for cell in design.cells})


def _cost(design: Design, cell: Cell) -> str:
    once = design.tuning == "once"
    costs = []
    if searched_arms(design, cell):
        trials = design.trials_in(cell.name)
        searches = design.searches if once else design.replicates_in(cell.name)
        more = searches * min(SHORTLIST, trials) * (TUNING_REPLICATES - 1) if once else 0
        costs.append(
            f"{searches} × {trials} by searching" + (f" and up to {more} to compare" if more else "")
        )
    if any(not arm.space_in(cell.name) for arm in design.arms):
        replicates = TUNING_REPLICATES if once else design.replicates_in(cell.name)
        costs.append(f"{replicates} × {len(design.lr)} on the grid")
    return ", or ".join(costs)


def _by_cell(texts: Mapping[str, str]) -> str:
    """The text of all cells where it is one, else each with its cell."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{cell}: {text}" for cell, text in texts.items())
