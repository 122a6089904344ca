"""Tests of the weights probe: known norms, and what the effective learning rate means behind a norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bnbench.norms.reparam import apply_reparam
from bnbench.probes.base import Moment
from bnbench.probes.weight_norm import Weights, measure_weights

LABELS = torch.zeros(0)


def three_maps() -> nn.Module:
    """Maps with weights of norm 2, 6 and 5."""
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 1))
    for place, value in ((0, 2 / math.sqrt(12)), (2, 6 / 4), (4, 5 / math.sqrt(2))):
        nn.init.constant_(model[place].weight, value)
    return model


def test_norms_and_effective_learning_rates_are_those_of_known_weights() -> None:
    reading = measure_weights(three_maps(), torch.randn(3, 1, 4), LABELS, lr=0.3)
    assert reading.index == ("0", "2", "4")
    assert reading.series["norm"] == pytest.approx((2, 6, 5))
    assert reading.series["effective_lr"] == pytest.approx((0.3 / 4, 0.3 / 36, 0.3 / 25))
    assert reading.values["norm"] == pytest.approx(math.sqrt(4 + 36 + 25))
    # √(4 · 36) = 12; the output layer has no part in it.
    assert reading.values["effective_lr"] == pytest.approx(0.3 / 12)


def test_the_callback_takes_the_learning_rate_of_the_moment() -> None:
    moment = Moment(step=7, lr=0.6, batch_size=3)
    reading = Weights().measure(three_maps(), torch.randn(3, 1, 4), LABELS, moment)
    assert reading.values["effective_lr"] == pytest.approx(0.6 / 12)


def test_a_step_behind_a_norm_turns_the_weight_as_the_effective_rate_does_at_unit_length() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, size, dtype=torch.float64, generator=generator) for size in (6, 3))
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3, eps=1e-12)).double()
    weight = model[0].weight
    nn.init.normal_(weight, std=2.0, generator=generator)

    def direction_after_step(start: Tensor, lr: float) -> Tensor:
        with torch.no_grad():
            weight.copy_(start)
        (gradient,) = torch.autograd.grad((model(x) - y).square().mean(), weight)
        moved = start - lr * gradient
        return moved / moved.norm()

    start = weight.detach().clone()
    effective = measure_weights(model, x, y, lr=0.8).series["effective_lr"][0]
    turned = direction_after_step(start, 0.8)
    assert (turned - start / start.norm()).norm() > 1e-3
    assert direction_after_step(start / start.norm(), effective) == pytest.approx(turned, rel=1e-9)


def test_a_reparametrized_weight_is_taken_as_it_is_computed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    apply_reparam(model[0], "weight_norm")
    with torch.no_grad():
        model[0].parametrizations.weight.original0.copy_(torch.tensor([[1.0], [2.0], [2.0]]))
    reading = measure_weights(model, torch.randn(5, 4), LABELS, lr=1.0)
    # Rows of length 1, 2 and 2.
    assert reading.series["norm"][0] == pytest.approx(3)


def test_a_single_map_has_its_own_effective_rate() -> None:
    model = nn.Linear(4, 1)
    nn.init.constant_(model.weight, 1.0)
    assert measure_weights(model, torch.randn(5, 4), LABELS, lr=0.2).values["effective_lr"] == pytest.approx(
        0.05
    )


def test_there_is_no_effective_rate_without_a_rate_or_a_weight() -> None:
    x = torch.randn(3, 1, 4)
    assert math.isnan(measure_weights(three_maps(), x, LABELS).values["effective_lr"])
    assert measure_weights(three_maps(), x, LABELS, lr=0.0).values["effective_lr"] == 0
    for value in (0.0, math.nan):
        broken = three_maps()
        nn.init.constant_(broken[0].weight, value)
        reading = measure_weights(broken, x, LABELS, lr=0.1)
        assert math.isnan(reading.values["effective_lr"])
        assert math.isnan(reading.series["effective_lr"][0])
        assert reading.series["effective_lr"][1] == pytest.approx(0.1 / 36)
