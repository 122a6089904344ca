"""The train–eval gap against outputs written out by formula, and the variance shift of dropout."""

import copy
import math

import pytest
import torch
from torch import nn

from bnbench.lit import NormClassifier
from bnbench.norms import recalibrate
from bnbench.probes.eval_gap import measure_eval_gap
from bnbench.registry import BadInput

GAPS = ("variance_l2", "variance_kl", "lag_l2", "lag_kl")
EPS = 1e-5


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(dropout=0.0):
    torch.manual_seed(1)
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    layers += [nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 5)]
    model = nn.Sequential(*layers).double()
    for place in (1, 5):
        model[place].running_mean.uniform_(-0.3, 0.3)
        model[place].running_var.uniform_(0.5, 1.5)
    return model


def gaps(output, precise):
    """Relative l2 distance and KL divergence in nats, sample by sample."""
    p, q = precise.softmax(1), output.softmax(1)
    divergence = sum((p[i] * (p[i] / q[i]).log()).sum() for i in range(len(p))) / len(p)
    return [
        ((output - precise).square().sum() / precise.square().sum()).sqrt().item(),
        divergence.item(),
    ]


def by_formula(model, x, size):
    """The network layer by layer: outputs by batch statistics, by those of all samples, by averages."""
    first, one, second, two, head = (copy.deepcopy(model[i]) for i in (0, 1, 4, 5, 7))
    batches = x.unflatten(0, (-1, size))

    def normalize(norm, a, mean, var):
        return (a - mean) / (var + EPS).sqrt() * norm.weight + norm.bias

    a = first(batches)
    own = (a.mean(1, keepdim=True), a.var(1, correction=0, keepdim=True))
    everything = (a.flatten(0, 1).mean(0), a.flatten(0, 1).var(0, correction=0))
    hidden = [
        torch.relu(normalize(one, a, *statistics))
        for statistics in (own, everything, (one.running_mean, one.running_var))
    ]
    b = second(hidden[0])
    own = (b.mean(1, keepdim=True), b.var(1, correction=0, keepdim=True))
    everything = (b.flatten(0, 1).mean(0), b.flatten(0, 1).var(0, correction=0))
    return [
        head(torch.tanh(normalize(two, second(h), *statistics))).flatten(0, 1)
        for h, statistics in zip(hidden, (own, everything, (two.running_mean, two.running_var)), strict=True)
    ]


def test_both_parts_equal_the_network_written_out_by_formula():
    model, x = network(), numbers(64, 6) * 2 + 1
    by_batch, precise, averaged = by_formula(model, x, 8)
    reading = measure_eval_gap(model.train(), x, batch_size=8)
    wanted = gaps(by_batch, precise) + gaps(averaged, precise)
    assert [reading.values[name] for name in GAPS] == pytest.approx(wanted, rel=1e-9)
    assert min(wanted) > 1e-3


def test_after_recalibration_there_is_no_lag():
    model, x = network(), numbers(64, 6)
    before = measure_eval_gap(model, x, batch_size=8).values
    recalibrate(model, x.split(8))
    after = measure_eval_gap(model, x, batch_size=8).values
    assert after["lag_l2"] < 1e-12 < before["lag_l2"]
    assert abs(after["lag_kl"]) < 1e-12 < before["lag_kl"]
    assert after["variance_l2"] == pytest.approx(before["variance_l2"])


def test_batches_that_are_alike_leave_lag_alone():
    values = measure_eval_gap(network(), numbers(8, 6).repeat(4, 1), batch_size=8).values
    assert values["variance_l2"] < 1e-12
    assert values["lag_l2"] > 0.01


def test_dropout_is_no_part_of_either():
    x = numbers(64, 6)
    without, dropped = (measure_eval_gap(network(p), x, batch_size=8).values for p in (0.0, 0.5))
    assert [without[name] for name in GAPS] == [dropped[name] for name in GAPS]


@pytest.mark.parametrize("norm", ["none", "layer", "group", "frozen_batch", "virtual_batch"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_model_without_running_averages_has_no_gap_at_all(norm, kind):
    model = NormClassifier(kind, norm, in_shape=(1, 8, 8), num_classes=10, dropout=0.5)
    model.reference = numbers(8, 1, 8, 8, seed=1).float()
    model.find_followers()
    reading = measure_eval_gap(model, numbers(32, 1, 8, 8).float(), batch_size=8)
    assert [reading.values[name] for name in GAPS] == [0, 0, 0, 0]
    assert math.isnan(reading.values["variance_shift"]) == (norm != "frozen_batch")


@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize("norm", ["batch", "ghost_batch"])
def test_dropout_directly_before_a_norm_shifts_the_variance_by_one_minus_p(p, norm):
    model = NormClassifier("mlp", norm, in_shape=(64,), num_classes=10, dropout=p, dropout_at="before-norm")
    torch.manual_seed(12)
    reading = measure_eval_gap(model, numbers(2048, 64).float(), batch_size=256)
    assert reading.values["variance_shift"] == pytest.approx(1 - p, rel=0.02)
    assert reading.index == tuple(f"model.layers.{layer}.norm" for layer in range(4))
    assert reading.series["variance_shift"][0] == reading.values["variance_shift"]


def test_dropout_with_a_mean_shifts_less_by_formula():
    dropout, mean = nn.Dropout(0.4), 1.5
    model = nn.Sequential(dropout, nn.BatchNorm1d(200)).double().train()
    x = numbers(2048, 200) + mean
    torch.manual_seed(12)
    # With E[m²] = 1 / (1 − p) of the mask: Var[m x] = (σ² + μ²) / (1 − p) − μ².
    wanted = 1 / ((1 + mean**2) / 0.6 - mean**2)
    reading = measure_eval_gap(model, x, batch_size=256)
    assert reading.values["variance_shift"] == pytest.approx(wanted, rel=0.02)


def test_without_dropout_there_is_no_shift_at_the_first_norm():
    model, x = network(), numbers(64, 6)
    x[:, 0] = 3.0
    with torch.no_grad():
        model[0].weight[0, 1:] = 0  # Its first unit is constant.
    reading = measure_eval_gap(model.train(), x, batch_size=8)
    assert reading.values["variance_shift"] == pytest.approx(1, abs=1e-12)


def test_too_few_samples_are_refused():
    with pytest.raises(BadInput, match=r"probe 'eval_gap' needs two batches .* not 8 samples .* of 8;"):
        measure_eval_gap(network(), numbers(8, 6), batch_size=8)
