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
    calibrated_losses,
    calibration_error,
    evaluating,
    finite_or_worst,
    fit_temperature,
    logits_of,
    scale_of_norms,
    scores,
    worst_scores,
)
from bnbench.norms import build_norm


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


def nll_at(temperature: float, logits, y) -> float:
    log_p = (logits.double() / temperature).log_softmax(1)
    return -log_p[torch.arange(len(y)), y].mean().item()


def drawn_from(sharpness: float, count: int = 400):
    """Logits, and labels that are drawn from their softmax at this sharpness."""
    logits, _ = sample(count)
    draw = torch.Generator().manual_seed(5)
    return logits, (sharpness * logits).softmax(1).multinomial(1, generator=draw)[:, 0]


@pytest.mark.parametrize("sharpness", [0.1, 0.4, 1.0, 3.0])
def test_the_temperature_is_the_best_one_of_a_grid(sharpness):
    logits, y = drawn_from(sharpness)
    found = fit_temperature(logits, y)
    grid = [math.exp(math.log(0.05) + step * math.log(400) / 2000) for step in range(2001)]
    best = min(grid, key=lambda temperature: nll_at(temperature, logits, y))
    assert grid[0] < best < grid[-1]
    assert found == pytest.approx(best, rel=math.log(400) / 2000)
    assert nll_at(found, logits, y) <= nll_at(best, logits, y)
    # At the minimum the slope is 0 to rounding.
    for nearby in (found * (1 - 1e-4), found * (1 + 1e-4)):
        assert nll_at(nearby, logits, y) > nll_at(found, logits, y)


@given(st.integers(5, 80), st.floats(0.05, 20), st.floats(0.05, 20))
def test_a_temperature_undoes_a_scale_of_the_logits(count, scale, other):
    logits, y = sample(count, classes=3)
    first, second = (fit_temperature(c * logits, y) / c for c in (scale, other))
    bounds = (0.05 / scale, 0.05 / other, 20 / scale, 20 / other)
    if all(first != pytest.approx(bound) and second != pytest.approx(bound) for bound in bounds):
        assert first == pytest.approx(second, rel=1e-8)


def test_a_temperature_without_an_optimum_is_at_the_end_of_its_range():
    logits, _ = sample(50)
    assert fit_temperature(logits, logits.argmax(1)) == 0.05
    assert fit_temperature(1e4 * logits, logits.argmax(1)) == 0.05
    assert fit_temperature(logits, logits.argmin(1)) == 20.0


def test_a_temperature_that_means_nothing_is_1():
    logits, y = sample(50)
    assert fit_temperature(torch.zeros_like(logits) + 3, y) == 1.0
    for wrong in (math.nan, math.inf):
        logits[7, 1] = wrong
        assert fit_temperature(logits, y) == 1.0


def test_calibrated_losses_are_those_at_the_temperature_of_the_validation_data():
    logits, y = (value.float() if value.is_floating_point() else value for value in drawn_from(0.4))
    parts = {"val": (logits[:200], y[:200]), "train": (logits[200:300], y[200:300])}
    parts["test"] = (logits[300:], y[300:])
    found = calibrated_losses(**parts)
    temperature = fit_temperature(*parts["val"])
    assert found == {
        "val/temperature": temperature,
        "train/loss_calibrated": pytest.approx(nll_at(temperature, *parts["train"]), rel=1e-12),
        "test/loss_calibrated": pytest.approx(nll_at(temperature, *parts["test"]), rel=1e-12),
    }


def test_the_scale_of_norms_is_a_root_mean_square_over_learned_and_fixed_ones():
    learned, fixed = build_norm("layer", 3, 0), build_norm("batch", 1, 0, gamma=-4.0, learn_gamma=False)
    with torch.no_grad():
        learned.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    model = nn.Sequential(
        nn.Linear(2, 3), learned, nn.Linear(3, 1), fixed, build_norm("batch", 1, affine=False)
    )
    assert scale_of_norms(model) == {"norm/gamma": pytest.approx(math.sqrt((1 + 4 + 9 + 16) / 4))}
    assert scale_of_norms(nn.Linear(2, 3)) == {}
    with torch.no_grad():
        learned.weight[0] = math.nan
    assert scale_of_norms(model) == {}


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(2, 100))
def test_worst_scores_are_chance_and_the_last_finite_loss_but_never_infinite(last, classes):
    found = worst_scores(classes, last)
    assert found["acc"] == 1 / classes
    assert found["loss"] == (max(math.log(classes), last) if math.isfinite(last) else math.log(classes))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_give_way_as_a_whole(loss):
    assert finite_or_worst({"loss": loss, "acc": 0.9}, 10, 5.0) == {"loss": 5.0, "acc": 0.1}
    assert finite_or_worst({"loss": 9.0, "acc": 0.9}, 10, 5.0) == {"loss": 9.0, "acc": 0.9}
