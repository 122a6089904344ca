"""Evaluation: no sample lost, nothing changed, nothing but finite numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnbench.data import Arrays
from bnbench.engine import evaluate
from bnbench.engine.evaluate import (
    calibration_error,
    evaluating,
    finite_or_worst,
    logits_of,
    scores,
    worst_scores,
)


def expected_calibration_error(probabilities, labels, bins: int = 15) -> float:
    """Guo et al. (2017), eq. 3, with bins (m/M, (m+1)/M], sample by sample."""
    total = [[0, 0.0, 0.0] for _ in range(bins)]
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        place = total[min(bins - 1, math.ceil(confidence * bins) - 1)]
        place[0] += 1
        place[1] += confidence
        place[2] += row.index(confidence) == label
    return sum(abs(sure - right) for _, sure, right in total) / len(labels)


def sample(count: int, scale: float = 3.0, classes: int = 4):
    draw = torch.Generator().manual_seed(count)
    logits = scale * torch.randn(count, classes, generator=draw, dtype=torch.float64)
    return logits, torch.randint(classes, (count,), generator=draw)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17])
def test_every_sample_is_evaluated_in_order_whatever_the_last_batch(count, monkeypatch):
    monkeypatch.setattr(evaluate, "EVAL_BATCH", 8)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].running_mean.fill_(0.3)
    x = torch.randn(count, 3)
    logits = logits_of(model, Arrays(x, torch.zeros(count, dtype=torch.int64)))
    by_hand = [(model[0](row) - 0.3) / math.sqrt(1 + 1e-5) for row in x]
    torch.testing.assert_close(logits, torch.stack(by_hand).detach())


def test_logits_are_at_least_single_precision():
    arrays = Arrays(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))
    half = Arrays(arrays.x.bfloat16(), arrays.y)
    wide = Arrays(arrays.x.double(), arrays.y)
    assert logits_of(nn.Linear(3, 2).bfloat16(), half).dtype == torch.float32
    assert logits_of(nn.Linear(3, 2).double(), wide).dtype == torch.float64


def test_evaluating_puts_every_mode_back_also_after_an_error():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[2].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


@given(st.integers(1, 60), st.floats(0.01, 30))
def test_scores_equal_their_formulas(count, scale):
    logits, y = sample(count, scale)
    losses = [
        math.log(sum(math.exp(v - row[c]) for v in row))
        for row, c in zip(logits.tolist(), y.tolist(), strict=True)
    ]
    right = [row.index(max(row)) == c for row, c in zip(logits.tolist(), y.tolist(), strict=True)]
    found = scores(logits, y)
    assert found["loss"] == pytest.approx(sum(losses) / count, rel=1e-12, abs=1e-12)
    assert found["acc"] == pytest.approx(sum(right) / count, rel=1e-12)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_calibration_error_equals_its_formula(scale):
    logits, y = sample(200, scale)
    expected = expected_calibration_error(logits.softmax(1), y)
    assert calibration_error(logits, y) == pytest.approx(expected, rel=1e-5)


def test_logits_within_0_and_1_are_not_taken_for_probabilities():
    logits, y = sample(200)
    logits = logits.sigmoid()
    expected = expected_calibration_error(logits.softmax(1), y)
    assert calibration_error(logits, y) == pytest.approx(expected, rel=1e-5)


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(2, 100))
def test_worst_scores_are_chance_and_the_last_finite_loss_but_never_infinite(last, classes):
    found = worst_scores(classes, last)
    assert found["acc"] == 1 / classes
    assert found["loss"] == (max(math.log(classes), last) if math.isfinite(last) else math.log(classes))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_give_way_as_a_whole(loss):
    assert finite_or_worst({"loss": loss, "acc": 0.9}, 10, 5.0) == {"loss": 5.0, "acc": 0.1}
    assert finite_or_worst({"loss": 9.0, "acc": 0.9}, 10, 5.0) == {"loss": 9.0, "acc": 0.9}
