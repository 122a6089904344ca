"""Tests of the dead-units probe on activations whose share of stuck units is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnbench import NormClassifier
from bnbench.probes.base import Moment
from bnbench.probes.dead_units import DeadUnits, measure_dead_units

LABELS = torch.zeros(0)


def shifted(biases: list[float], *activations: nn.Module, scale: float = 1.0) -> nn.Module:
    """A map of one number to units scale · x + bias, and what follows."""
    linear = nn.Linear(1, len(biases))
    nn.init.constant_(linear.weight, scale)
    linear.bias.data = torch.tensor(biases, dtype=torch.float32)
    return nn.Sequential(linear, *activations)


def spread(count: int) -> Tensor:
    """Numbers evenly spread over (0, 1)."""
    return ((torch.arange(count) + 0.5) / count)[:, None]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.SiLU()])
def test_units_that_are_never_positive_are_dead(activation: nn.Module) -> None:
    reading = measure_dead_units(shifted([-2, -1, -0.5, 0, 3], activation), spread(50), LABELS)
    assert reading.values["dead"] == pytest.approx(2 / 5)
    assert math.isnan(reading.values["saturated"])


def test_a_unit_is_dead_below_one_positive_input_in_a_thousand() -> None:
    # Of 2,000 inputs just below 1, so many are above these thresholds: 1, 2 and 3.
    thresholds = [-(1 - k / 2000) for k in (1, 2, 3)]
    reading = measure_dead_units(shifted(thresholds, nn.ReLU()), spread(2000), LABELS)
    assert reading.values["dead"] == pytest.approx(1 / 3)


def test_units_are_saturated_that_are_nearly_always_in_the_flat_part() -> None:
    # tanh(2.0923) = .97: of the inputs in (0, 1), the share that is above is 1, .96, .94 and 0.
    border = math.atanh(0.97)
    model = shifted([border, border - 0.04, border - 0.06, 0], nn.Tanh())
    assert measure_dead_units(model, spread(1000), LABELS).values["saturated"] == pytest.approx(2 / 4)
    below = shifted([-border, -border + 0.04, -border + 0.06, 0], nn.Tanh(), scale=-1)
    assert measure_dead_units(below, spread(1000), LABELS).values["saturated"] == pytest.approx(2 / 4)
    border = math.log(19)
    model = shifted([border, border - 0.04, border - 0.06, 0], nn.Sigmoid())
    reading = measure_dead_units(model, spread(1000), LABELS)
    assert reading.values["saturated"] == pytest.approx(2 / 4)
    assert math.isnan(reading.values["dead"])
    # Flat on both sides, for half of the inputs each.
    both = shifted([-500.0], nn.Sigmoid(), scale=1000)
    assert measure_dead_units(both, spread(1000), LABELS).values["saturated"] == 1


def test_values_weigh_layers_by_their_units_and_series_keep_the_kinds_apart() -> None:
    model = nn.Sequential(
        shifted([-2, 1], nn.ReLU()),
        *(nn.Linear(2, 6), nn.ReLU()),
        *(nn.Linear(6, 1), nn.Tanh()),
    )
    nn.init.constant_(model[1].weight, 1)
    model[1].bias.data = torch.tensor([-9.0, -9, -9, 0, 0, 0])
    nn.init.zeros_(model[3].weight)
    nn.init.constant_(model[3].bias, 9)
    reading = measure_dead_units(model, spread(20), LABELS)
    assert reading.index == ("0.1", "2", "4")
    assert reading.series["dead"] == pytest.approx((1 / 2, 3 / 6, math.nan), nan_ok=True)
    assert reading.series["saturated"] == pytest.approx((math.nan, math.nan, 1), nan_ok=True)
    assert reading.values == pytest.approx({"dead": 4 / 8, "saturated": 1})


def test_a_channel_is_alive_that_is_positive_at_one_position_of_one_image() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    nn.init.ones_(model[0].weight)
    model[0].bias.data = torch.tensor([-1.0, -3.0])
    x = torch.zeros(4, 1, 5, 5)
    x[2, 0, 3, 1] = 2.0
    # One of 100 inputs a channel.
    assert measure_dead_units(model, x, LABELS).values["dead"] == pytest.approx(1 / 2)


def test_the_units_of_a_sequence_are_its_last_axis_behind_a_linear_map() -> None:
    model = shifted([-2, 1, 1, 1], nn.ReLU())
    assert measure_dead_units(model, spread(12).view(4, 3, 1), LABELS).values["dead"] == pytest.approx(1 / 4)


def test_statistics_are_those_of_the_batch_also_for_a_model_in_evaluation_mode() -> None:
    norm = nn.BatchNorm1d(3)
    nn.init.constant_(norm.running_mean, 100.0)
    model = nn.Sequential(nn.Linear(2, 3), norm, nn.ReLU()).eval()
    assert measure_dead_units(model, torch.randn(20, 2), LABELS).values["dead"] == 0
    assert norm.running_mean.tolist() == [100.0] * 3


def test_a_batch_norm_net_has_the_dead_units_of_a_plain_recomputation() -> None:
    torch.manual_seed(0)
    module = NormClassifier("mlp", "batch", in_shape=(8,), num_classes=3)
    for layer in module.model.layers:
        nn.init.normal_(layer.norm.bias, -2, 2)
    x = h = torch.randn(64, 8)
    wanted = []
    for layer in module.model.layers:
        a = F.batch_norm(layer.linear(h), None, None, layer.norm.weight, layer.norm.bias, training=True)
        wanted.append((a.amax(0) <= 0).float().mean().item())
        h = a.relu()
    assert min(wanted) > 0.1
    reading = DeadUnits().measure(module, x, LABELS, Moment(step=0, lr=0.1, batch_size=64))
    assert reading.series["dead"] == pytest.approx(wanted)


class Negate(nn.Module):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.neg_()


def test_what_follows_in_place_does_not_matter() -> None:
    model = shifted([-2, 1], nn.ReLU(inplace=True), Negate())
    assert measure_dead_units(model, spread(20), LABELS).values["dead"] == pytest.approx(1 / 2)


def test_each_call_of_a_shared_activation_counts() -> None:
    act = nn.ReLU()
    model = nn.Sequential(shifted([-2, 1], act), Negate(), act)
    reading = measure_dead_units(model, spread(20), LABELS)
    assert reading.index == ("0.1", "0.1 (2)")
    assert reading.series["dead"] == pytest.approx((1 / 2, 1))


def test_units_without_a_number_make_the_share_nan() -> None:
    reading = measure_dead_units(shifted([math.nan, 1], nn.ReLU()), spread(20), LABELS)
    assert math.isnan(reading.values["dead"])


def test_a_model_without_activation_modules_has_no_shares() -> None:
    reading = measure_dead_units(shifted([0, 1], nn.LeakyReLU()), spread(20), LABELS)
    assert all(map(math.isnan, reading.values.values()))
    assert reading.index == ()
