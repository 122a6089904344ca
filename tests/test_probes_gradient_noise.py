"""The gradient noise scale against models whose gradient has a known mean and covariance."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnbench.probes.gradient_noise import measure_gradient_noise
from bnbench.registry import BadInput

FEATURES, SIZE = 20, 4


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line():
    torch.manual_seed(0)
    return nn.Linear(FEATURES, 1, bias=False).double()


def mean_output(output, y):
    return output.mean()


def half_squared_error(output, y):
    return 0.5 * (output.squeeze(1) - y).square().mean()


def averages(readings):
    """Means of the estimates of |G|² and tr Σ over readings."""
    squares = [reading.values["gradient_norm"] ** 2 for reading in readings]
    traces = [reading.values["trace"] for reading in readings]
    return sum(squares) / len(squares), sum(traces) / len(traces)


def test_estimates_are_unbiased_where_a_sample_is_its_gradient():
    mean, scales = numbers(FEATURES), torch.linspace(0.5, 2, FEATURES, dtype=torch.float64)
    readings = []
    for seed in range(1, 201):
        x = mean + scales * numbers(8 * SIZE, FEATURES, seed=seed)
        readings.append(measure_gradient_noise(line(), x, x[:, 0], batch_size=SIZE, loss=mean_output))
    square, trace = averages(readings)
    assert square == pytest.approx(mean.square().sum().item(), rel=0.03)
    assert trace == pytest.approx(scales.square().sum().item(), rel=0.03)


def test_estimates_are_unbiased_for_least_squares():
    model, noise = line(), 0.5
    away = numbers(FEATURES, seed=999) * 0.7
    readings = []
    for seed in range(1, 201):
        x = numbers(8 * SIZE, FEATURES, seed=seed)
        target = model.weight[0].detach() - away
        y = x @ target + noise * numbers(8 * SIZE, seed=1000 + seed)
        readings.append(measure_gradient_noise(model, x, y, batch_size=SIZE, loss=half_squared_error))
    square, trace = averages(readings)
    # For x ~ N(0, I) and d = w − w*: E[g] = d, Σ = (|d|² + noise²) I + d dᵀ.
    distance = away.square().sum().item()
    assert square == pytest.approx(distance, rel=0.05)
    assert trace == pytest.approx(FEATURES * (distance + noise**2) + distance, rel=0.05)


def test_under_batch_norm_it_is_the_covariance_of_whole_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)).double()
    x, y = numbers(67, 6), torch.arange(67) % 3
    rows = []
    for batch, labels in zip(x[:64].split(8), y[:64].split(8), strict=True):
        plain = copy.deepcopy(model).train()
        F.cross_entropy(plain(batch), labels).backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in plain.parameters()]))
    gradients = torch.stack(rows)
    scatter = torch.cov(gradients.T).trace().item()
    square = gradients.mean(0).square().sum().item() - scatter / 8
    values = measure_gradient_noise(model.eval(), x, y, batch_size=8).values
    assert values["trace"] == pytest.approx(8 * scatter, rel=1e-9)
    assert values["gradient_norm"] == pytest.approx(math.sqrt(square), rel=1e-9)
    assert values["noise_scale"] == pytest.approx(8 * scatter / square, rel=1e-9)


def test_batches_that_are_alike_have_no_noise():
    x = numbers(SIZE, FEATURES).repeat(8, 1)
    values = measure_gradient_noise(line(), x, x[:, 0], batch_size=SIZE, loss=mean_output).values
    assert values["gradient_norm"] == pytest.approx(x.mean(0).norm().item())
    assert values["trace"] == pytest.approx(0, abs=1e-12)
    assert values["noise_scale"] == pytest.approx(0, abs=1e-12)


def test_a_gradient_that_is_not_seen_has_no_scale():
    x = numbers(SIZE, FEATURES)
    x = torch.cat([x, -x])
    values = measure_gradient_noise(line(), x, x[:, 0], batch_size=SIZE, loss=mean_output).values
    assert math.isnan(values["noise_scale"])
    assert math.isnan(values["gradient_norm"])
    # Two gradients ±m: b times the variance, 2 |m|².
    assert values["trace"] == pytest.approx(2 * SIZE * x[:SIZE].mean(0).square().sum().item())


def test_dropout_draws_anew_for_each_batch():
    x = numbers(SIZE, FEATURES).repeat(8, 1)
    model = nn.Sequential(nn.Dropout(0.5), line())
    values = measure_gradient_noise(model, x, x[:, 0], batch_size=SIZE, loss=mean_output).values
    # A mask of 0 or 2 adds the variance x² a number: tr Σ = mean |x|². Five of eight standard errors.
    assert values["trace"] == pytest.approx(x.square().sum(1).mean().item(), rel=0.5)


def test_frozen_parameters_are_no_part():
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), line()).double()
    model[0].requires_grad_(False)
    x = numbers(32, FEATURES)
    values = measure_gradient_noise(model, x, x[:, 0], batch_size=SIZE, loss=mean_output).values
    moved = model[0](x)
    plain = measure_gradient_noise(line(), moved, x[:, 0], batch_size=SIZE, loss=mean_output).values
    assert values == pytest.approx(plain, nan_ok=True)


def test_too_few_samples_are_refused():
    with pytest.raises(BadInput, match=r"probe 'gradient_noise' needs two batches .* not 7 samples"):
        measure_gradient_noise(line(), numbers(7, FEATURES), numbers(7), batch_size=4)
