"""Tests of Optuna's part in a search: the same in, the same out, and better than chance."""

from __future__ import annotations

import hashlib
import math
import statistics
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
import pytest

from bnbench.engine.search import STARTUP, draw, frozen, importances
from bnbench.study import Choice, Range

LR = Range("lr", 1e-3, 3.0)
SIZE = Choice("batch_size", (16, 64, 256))
SPACE = (LR, SIZE, Choice("label_smoothing", (0.0, 0.1)))


def score(point: Mapping[str, Any]) -> float:
    """Best at lr .1 and batches of 64; label smoothing does nothing."""
    return -abs(math.log10(point["lr"]) + 1) - 0.5 * (point["batch_size"] != "64")


def search(space: tuple[Any, ...] = SPACE, seed: object = 0, trials: int = 40, batch: int = 4) -> list[Any]:
    history: list[Any] = []
    for number in range(trials // batch):
        made = draw(space, history, batch, ("s", str(seed), number), lambda point: True)
        history += [(point, score(point)) for point in made]
    return history


def test_the_same_question_has_the_same_answer_in_another_process() -> None:
    history = search(trials=16)
    code = (
        "from tests.test_engine_search import search\n"
        "print([(p, s) for p, s in search(trials=16)])"
    )  # fmt: skip
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(history)


def test_another_seed_draws_other_points() -> None:
    assert search(trials=8, seed=1) != search(trials=8, seed=2)


def test_later_points_score_better_than_the_random_ones() -> None:
    gains = []
    for seed in range(6):
        scores = [s for _, s in search(seed=seed)]
        gains.append(statistics.fmean(scores[-16:]) - statistics.fmean(scores[:STARTUP]))
    assert statistics.fmean(gains) > 0.3, gains


def test_points_of_a_batch_differ_and_lie_in_the_space() -> None:
    made = draw(SPACE, [], 16, ("s",), lambda point: True)
    assert len({str(point) for point in made}) == 16
    for point in made:
        assert LR.low <= point["lr"] <= LR.high
        assert LR.kept(point["lr"]) == point["lr"]
        assert point["batch_size"] in SIZE.levels


def test_a_space_without_new_points_gives_fewer() -> None:
    space = (SIZE,)
    made = draw(space, [], 8, ("s",), lambda point: True)
    assert sorted(point["batch_size"] for point in made) == ["16", "256", "64"]
    history = [(point, 0.5) for point in made]
    assert draw(space, history, 8, ("s",), lambda point: point not in made) == []


def test_failures_are_told_and_teach_nothing() -> None:
    """Points at high rates fail; the sampler goes on to learn from the others."""
    history: list[Any] = []
    for number in range(8):
        made = draw(SPACE, history, 4, ("f", number), lambda point: True)
        history += [(point, None if point["lr"] > 1 else score(point)) for point in made]
    assert any(s is None for _, s in history)
    assert max(s for _, s in history if s is not None) > -0.3


def test_optunas_own_sampler_gives_these_points() -> None:
    """Filled and asked by hand, a study of Optuna's with the documented settings answers the same."""
    history = search(trials=12)
    made = draw(SPACE, history, 1, ("by hand",), lambda point: True)
    number = int(hashlib.sha256(b'["by hand"]').hexdigest()[:8], 16)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=number, n_startup_trials=8, multivariate=True, constant_liar=True
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    kinds = {
        "lr": optuna.distributions.FloatDistribution(1e-3, 3.0, log=True),
        "batch_size": optuna.distributions.CategoricalDistribution(["16", "64", "256"]),
        "label_smoothing": optuna.distributions.CategoricalDistribution(["0.0", "0.1"]),
    }
    for point, value in history:
        study.add_trial(optuna.trial.create_trial(params=point, distributions=kinds, value=value))
    asked = study.ask(kinds).params
    assert made == [{**asked, "lr": LR.kept(asked["lr"])}]


def test_importances_name_what_matters_and_sum_to_one() -> None:
    found = importances(SPACE, search(trials=40))
    assert list(found) == ["lr", "batch_size", "label_smoothing"]
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["lr"] > found["batch_size"] > found["label_smoothing"]
    assert found["label_smoothing"] < 0.1


def test_importances_need_two_different_scores() -> None:
    point = {"lr": 0.1, "batch_size": "16", "label_smoothing": "0.0"}
    assert importances(SPACE, []) == {}
    assert importances(SPACE, [(point, 0.5), ({**point, "lr": 0.2}, 0.5), ({**point, "lr": 0.3}, None)]) == {}


def test_a_failed_point_is_a_failed_trial() -> None:
    point = {"lr": 0.1, "batch_size": "16", "label_smoothing": "0.0"}
    trial = frozen(SPACE, point, None, {"row": "abc"})
    assert trial.state == optuna.trial.TrialState.FAIL
    assert (trial.params, trial.user_attrs) == (point, {"row": "abc"})
