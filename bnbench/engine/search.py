"""Optuna's part in a search: the next points of a space, and how much each dimension of it mattered.

Nothing is stored here. A study in memory is filled with what is known, asked, and thrown away, so that what
comes out is a function of what goes in, whoever asks and however often.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from bnbench.study.space import Choice, Point, Space

if TYPE_CHECKING:
    import optuna

#: So many points of a search are drawn at random before the sampler has something to learn from.
STARTUP = 8
#: After so many draws in a row that give nothing new, a space counts as exhausted.
_PATIENCE = 50

History = Sequence[tuple[Point, float | None]]


def draw(
    space: Space,
    history: History,
    count: int,
    seed: tuple[Hashable, ...],
    is_new: Callable[[Point], bool],
) -> list[Point]:
    """Draw points by multivariate TPE: a :data:`bnbench.study.space.Sampler`.

    `history` are the points so far with their scores, higher being better; None stands for a failure. The
    points of one batch know of each other as running ones ("constant liar"). Fewer than `count` come back
    where the space has nothing new left. The same arguments give the same points.
    Source: Bergstra et al. 2011 (TPE); Falkner et al. 2018 (multivariate, BOHB).
    """
    import optuna

    with quiet_optuna():
        sampler = optuna.samplers.TPESampler(
            seed=_number(seed), n_startup_trials=STARTUP, multivariate=True, constant_liar=True
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials([frozen(space, point, score) for point, score in history])
        points: list[Point] = []
        misses = 0
        while len(points) < count and misses < _PATIENCE:
            trial = study.ask(distributions(space))
            point = {d.name: d.kept(trial.params[d.name]) for d in space}
            if point in points or not is_new(point):
                misses += 1
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                misses = 0
                points.append(point)
        return points


def importances(space: Space, history: History) -> dict[str, float]:
    """How much of the spread of a search's scores each dimension accounts for; they sum to 1.

    Functional analysis of variance over a forest of regression trees (Hutter et al. 2014). Empty where fewer
    than two points have a score or all score alike.
    """
    scored = [(point, score) for point, score in history if score is not None]
    if len({score for _, score in scored}) < 2:
        return {}
    import optuna

    with quiet_optuna():
        study = optuna.create_study(direction="maximize")
        study.add_trials([frozen(space, point, score) for point, score in scored])
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=16, max_depth=16, seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {dimension.name: float(found.get(dimension.name, 0.0)) for dimension in space}


def distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    """The space in Optuna's words."""
    import optuna

    return {
        d.name: optuna.distributions.CategoricalDistribution(list(d.levels))
        if isinstance(d, Choice)
        else optuna.distributions.FloatDistribution(d.low, d.high, log=True)
        for d in space
    }


def frozen(
    space: Space,
    point: Point,
    score: float | None,
    attributes: Mapping[str, object] | None = None,
    curve: Mapping[int, float] | None = None,
) -> optuna.trial.FrozenTrial:
    """A finished trial of Optuna's: a point with its score, or a failure."""
    import optuna

    states = optuna.trial.TrialState
    return optuna.trial.create_trial(
        params=dict(point),
        distributions=distributions(space),
        value=score,
        state=states.FAIL if score is None else states.COMPLETE,
        user_attrs=dict(attributes or {}),
        intermediate_values=dict(curve or {}),
    )


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna without its lines on every study and trial, and without its notes on what is experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _number(seed: tuple[Hashable, ...]) -> int:
    text = json.dumps([str(part) for part in seed])
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
