"""What the searches of a study tried: their trials in order, the best to expect, and what mattered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from bnbench.engine.search import importances
from bnbench.report.result import StudyResult
from bnbench.report.summaries import score
from bnbench.study.design import Arm, Cell, Design
from bnbench.study.space import Point, Space, fields_of, point_of
from bnbench.study.table import Entry
from bnbench.study.trial import Trial


@dataclass(frozen=True)
class Search:
    """One search of an arm: its trials in the order in which they were drawn.

    A trial is a point with its validation accuracy, None where it failed. `chosen` are the points that were
    confirmed in the end.
    """

    replicate: int
    trials: tuple[tuple[Point, float | None], ...]
    chosen: tuple[Point, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """The scores of the trials that did not fail, in order."""
        return tuple(found for _, found in self.trials if found is not None)


def searched_arms(design: Design, cell: Cell) -> list[Arm]:
    """The arms that search a space in a cell."""
    return [arm for arm in design.arms_in(cell.name) if arm.space_in(cell.name)]


def has_searches(design: Design) -> bool:
    """Whether any arm searches a space in any cell."""
    return any(searched_arms(design, cell) for cell in design.cells)


def searches_of(result: StudyResult, cell: Cell, arm: Arm) -> tuple[Search, ...]:
    """The searches of an arm in a cell, by rising replicate."""
    space = arm.space_in(cell.name)
    confirmed = result.table.of(cell=cell.name, arm=arm.name, roles=("own",))
    by_replicate: dict[int, list[Entry]] = {}
    for entry in result.table.of(cell=cell.name, arm=arm.name, roles=("tune",)):
        by_replicate.setdefault(entry.replicate, []).append(entry)
    once = result.design.tuning == "once"
    return tuple(
        Search(
            replicate,
            tuple((point_of(space, row.trial), score(row, "val/acc")) for row in rows),
            _distinct(point_of(space, e.trial) for e in confirmed if once or e.replicate == replicate),
        )
        for replicate, rows in sorted(by_replicate.items())
    )


def readable_point(space: Space, trial: Trial) -> dict[str, Any]:
    """The values of a row in the dimensions of another arm's space; without those of which it has none."""
    point = {}
    for dimension in space:
        try:
            point[dimension.name] = dimension.value_in(trial)
        except LookupError:
            continue
    return point


def _distinct(points: Iterable[Point]) -> tuple[Point, ...]:
    found: list[Point] = []
    for point in points:
        if point not in found:
            found.append(point)
    return tuple(found)


def best_so_far(search: Search) -> list[tuple[int, float]]:
    """The number of each trial that has a score, from 1, with the highest score until then."""
    numbered = [(i, found) for i, (_, found) in enumerate(search.trials, start=1) if found is not None]
    return list(zip((i for i, _ in numbered), accumulate((s for _, s in numbered), max), strict=True))


def expected_best(scores: Sequence[float], most: int) -> list[float]:
    """The expected maximum of k scores drawn with replacement, for k from 1 to `most`.

    E_k = Σ v_i ((i/n)^k − ((i−1)/n)^k) over the sorted scores v_1 ≤ … ≤ v_n. Empty without scores.
    Source: Dodge et al. 2019, "Show Your Work", EMNLP, section 3.
    """
    n, ordered = len(scores), sorted(scores)
    if not n:
        return []
    return [
        sum(v * ((i / n) ** k - ((i - 1) / n) ** k) for i, v in enumerate(ordered, start=1))
        for k in range(1, most + 1)
    ]


def importances_of(space: Space, searches: Iterable[Search]) -> dict[str, tuple[float, ...]]:
    """By dimension, its share of the spread of scores in each search by itself; shares of a search sum to 1.

    Empty for a space of one dimension, of which there is nothing to compare. A search whose scores are all
    alike has no shares.
    """
    if len(space) < 2:
        return {}
    found = [shares for search in searches if (shares := importances(space, search.trials))]
    return {d.name: tuple(shares[d.name] for shares in found) for d in space} if found else {}


def larger_arm(design: Design, cell: Cell, arm: Arm) -> Arm | None:
    """The arm that searches all that this one tunes and more, and is the same row otherwise."""
    return next((other for other in searched_arms(design, cell) if _is_part(design, cell, arm, other)), None)


def learning_rate_arm(design: Design, cell: Cell, arm: Arm) -> Arm | None:
    """The arm that spends its search on the learning rate alone, where this one searches more."""
    for other in searched_arms(design, cell):
        if _tuned_fields(cell, other) == {"lr"} and _is_part(design, cell, other, arm):
            return other
    return None


def grid_arm(design: Design, cell: Cell, baseline: str) -> Arm | None:
    """The arm to which recipes are compared: the only one on the grid, or among several the baseline."""
    arms = [arm for arm in design.arms_in(cell.name) if not arm.space_in(cell.name)]
    if len(arms) == 1:
        return arms[0]
    return next((arm for arm in arms if arm.name == baseline), None)


def _is_part(design: Design, cell: Cell, arm: Arm, larger: Arm) -> bool:
    fields = _tuned_fields(cell, larger)
    return (
        bool(larger.space_in(cell.name))
        and _tuned_fields(cell, arm) < fields
        and _given(design.trial(cell, arm, 0), fields) == _given(design.trial(cell, larger, 0), fields)
    )


def _tuned_fields(cell: Cell, arm: Arm) -> set[str]:
    space = arm.space_in(cell.name)
    return {name for dimension in space for name in fields_of(dimension)} if space else {"lr"}


def _given(trial: Trial, fields: set[str]) -> Mapping[str, Any]:
    return {name: value for name, value in trial.as_dict().items() if name not in fields}
