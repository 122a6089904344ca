"""The recipes that searches chose, side by side: settings, accuracy, gains, and what finding them cost."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bnbench.report.result import StudyResult
from bnbench.report.searches import (
    grid_arm,
    has_searches,
    larger_arm,
    learning_rate_arm,
    readable_point,
    searched_arms,
)
from bnbench.report.summaries import paired_scores
from bnbench.report.words import decimals, dimension_words, median_range, plain, signed
from bnbench.study.design import Arm, Cell
from bnbench.study.space import point_of
from bnbench.study.stats import paired_t_interval

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over n replicates with Student's 95 % interval, None where there is none.

    An accuracy is in percent, a gain in percentage points.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Gain:
    """The mean paired difference of test accuracy to another arm."""

    over: str
    mean: Mean


@dataclass(frozen=True)
class Recipe:
    """What an arm chose in a cell and how good it is on test data.

    `setting` has a text for each dimension that the arm tuned, `given` for those that a larger arm searches
    and this one does not. `trials` are the trainings of the searches or of the grid, `compared` those that
    compared the best of several searches.
    """

    cell: str
    arm: str
    setting: Mapping[str, str]
    given: Mapping[str, str]
    accuracy: Mean | None
    over_grid: Gain | None
    over_lr: Gain | None
    trials: int
    compared: int


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean of some values with its interval; None without values."""
    if not values:
        return None
    low, high = paired_t_interval(values, LEVEL) or (None, None)
    return Mean(statistics.fmean(values), low, high, len(values))


def recipes_of(result: StudyResult, cell: Cell) -> list[Recipe]:
    """The recipe of every arm in a cell; none where no arm of the cell searches a space."""
    design = result.design
    if not searched_arms(design, cell):
        return []
    scores = paired_scores(result, cell.name)
    return [_recipe(result, cell, arm, scores) for arm in design.arms_in(cell.name)]


def _recipe(result: StudyResult, cell: Cell, arm: Arm, scores: Mapping[str, Mapping[int, float]]) -> Recipe:
    design = result.design
    tuned, given = _settings(result, cell, arm)
    tried = {e.trial.key for e in result.table.of(cell=cell.name, arm=arm.name, roles=("tune",))}
    listed = {e.trial.key for e in result.table.of(cell=cell.name, arm=arm.name, roles=("shortlist",))}
    return Recipe(
        cell.name,
        arm.name,
        tuned,
        given,
        mean_of([100 * value for _, value in sorted(scores.get(arm.name, {}).items())]),
        _gain(scores, arm, grid_arm(design, cell, result.study.baseline)),
        _gain(scores, arm, learning_rate_arm(design, cell, arm)),
        len(tried),
        len(listed - tried),
    )


def _gain(scores: Mapping[str, Mapping[int, float]], arm: Arm, other: Arm | None) -> Gain | None:
    if other is None or other.name == arm.name:
        return None
    mine, theirs = scores.get(arm.name, {}), scores.get(other.name, {})
    mean = mean_of([100 * (mine[r] - theirs[r]) for r in sorted(mine.keys() & theirs.keys())])
    return None if mean is None else Gain(other.name, mean)


def _settings(result: StudyResult, cell: Cell, arm: Arm) -> tuple[dict[str, str], dict[str, str]]:
    confirmed = result.table.of(cell=cell.name, arm=arm.name, roles=("own",))
    rows = [e.trial for e in sorted(confirmed, key=lambda e: e.replicate)]
    space = arm.space_in(cell.name)
    larger = larger_arm(result.design, cell, arm)
    rest = () if larger is None else larger.space_in(cell.name)
    tuned = _chosen([point_of(space, row) if space else {"lr": row.lr} for row in rows])
    given = _chosen([readable_point(rest, row) for row in rows])
    return tuned, {name: text for name, text in given.items() if name not in tuned}


def _chosen(points: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each dimension's value over the confirmed replicates, in words."""
    values: dict[str, list[Any]] = {}
    for point in points:
        for name, value in point.items():
            values.setdefault(name, []).append(value)
    return {name: _in_words(found) for name, found in values.items()}


def _in_words(values: Sequence[Any]) -> str:
    if not isinstance(values[0], str):
        return median_range(values)
    counts = Counter(values).most_common()
    return values[0] if len(counts) == 1 else ", ".join(f"{label} (× {count})" for label, count in counts)


def recipe_heads(result: StudyResult) -> list[str]:
    """The heads of the table of recipes; empty where nothing is searched."""
    if not has_searches(result.design):
        return []
    measured = ["test accuracy, % [95 %]", "n", "trainings to choose"]
    names = {
        arm.name for c in result.design.cells if (arm := grid_arm(result.design, c, result.study.baseline))
    }
    if names:
        measured.insert(2, f"gain over “{'”, “'.join(sorted(names))}”, pp")
    if _has_lr_arms(result):
        measured.insert(-1, "gain over the learning rate alone, pp")
    return ["arm", *measured, *(dimension_words(name) for name in _dimensions(result))]


def recipe_rows(result: StudyResult, cell: Cell) -> list[list[str]]:
    """The recipes of a cell as texts under :func:`recipe_heads`; in parentheses what was not searched."""
    has_grid = any(grid_arm(result.design, c, result.study.baseline) for c in result.design.cells)
    has_lr_arms, dimensions = _has_lr_arms(result), _dimensions(result)
    rows = []
    for recipe in recipes_of(result, cell):
        accuracy = recipe.accuracy
        row = [recipe.arm, mean_words(accuracy), str(accuracy.n) if accuracy else "0"]
        row += [gain_words(recipe.over_grid)] if has_grid else []
        row += [gain_words(recipe.over_lr)] if has_lr_arms else []
        row.append(f"{recipe.trials} + {recipe.compared}" if recipe.compared else str(recipe.trials))
        for name in dimensions:
            given = f"({recipe.given[name]})" if name in recipe.given else "–"
            row.append(recipe.setting.get(name, given))
        rows.append(row)
    return rows


def recipe_values(result: StudyResult) -> list[dict[str, Any]]:
    """The recipes of all cells as plain values with all their digits."""
    return [asdict(recipe) for cell in result.design.cells for recipe in recipes_of(result, cell)]


def mean_words(mean: Mean | None, *, sign: bool = False) -> str:
    """`71.2 [70.6, 71.8]`: a mean with its interval, to two digits of the interval's half-width."""
    if mean is None:
        return "–"
    show = signed if sign else plain
    if mean.low is None or mean.high is None:
        return show(mean.value, 1)
    places = decimals((mean.high - mean.low) / 2)
    return f"{show(mean.value, places)} [{show(mean.low, places)}, {show(mean.high, places)}]"


def gain_words(gain: Gain | None) -> str:
    """`+1.1 [+0.4, +1.7]`, or a dash where there is nothing to compare with."""
    return "–" if gain is None else mean_words(gain.mean, sign=True)


def _dimensions(result: StudyResult) -> list[str]:
    """Every dimension that an arm of the study tunes, in the order of the spaces."""
    design = result.design
    spaces = [arm.space_in(cell.name) for cell in design.cells for arm in design.arms]
    names = dict.fromkeys(d.name for space in sorted(spaces, key=len, reverse=True) for d in space)
    return list(names) if all(spaces) or "lr" in names else ["lr", *names]


def _has_lr_arms(result: StudyResult) -> bool:
    design = result.design
    return any(learning_rate_arm(design, c, arm) is not None for c in design.cells for arm in design.arms)
