"""Batch noise against the exact variance of a mean without replacement, all subsets, and plain sampling."""

import itertools
import math

import pytest
import torch
from torch import nn

from bnbench.lit import NormClassifier
from bnbench.norms import build_norm
from bnbench.probes.batch_noise import measure_batch_noise
from bnbench.registry import BadInput


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def identity(features, *more):
    """A linear map that gives its input, and more layers."""
    linear = nn.Linear(features, features, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.eye(features))
    return nn.Sequential(linear, *more).double()


def exact(samples, size):
    """Var[μ_B] / σ² for batches of a size from so many samples, without replacement."""
    return (samples - size) / (samples - 1) / size


@pytest.mark.parametrize("size", [8, 64])
def test_the_mean_of_a_batch_scatters_as_sampling_without_replacement_does(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256))
    model.append(nn.BatchNorm1d(256)).append(nn.Linear(256, 10))
    reading = measure_batch_noise(model, numbers(8 * size, 256).float(), batch_size=size)
    assert reading.index == ("0", "3")
    for noise, samples in zip(reading.series["mean_noise"], reading.series["effective_samples"], strict=True):
        assert noise == pytest.approx(exact(8 * size, size), rel=0.05)
        assert samples == pytest.approx(1 / noise)


def test_noise_equals_that_of_all_batches_there_are():
    x = numbers(8, 300).exp()
    subsets = torch.stack([x[list(members)] for members in itertools.combinations(range(8), 4)])
    variance = x.var(0, correction=0)
    means = (subsets.mean(1).var(0, correction=0) / variance).mean().item()
    variances = subsets.var(1, correction=0).var(0, correction=0) / variance.square()
    reading = measure_batch_noise(identity(300), x, batch_size=4)
    assert means == pytest.approx(exact(8, 4))
    assert reading.values["mean_noise"] == pytest.approx(means, rel=0.02)
    assert reading.values["variance_noise"] == pytest.approx(variances.mean().item(), rel=0.02)


@pytest.mark.parametrize(("correlated", "per_sample"), [(False, 16), (True, 1)])
def test_positions_add_samples_as_far_as_they_differ(correlated, per_sample):
    channels, size = 128, 16
    conv = nn.Conv2d(channels, channels, 1, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(torch.eye(channels)[..., None, None])
    x = numbers(8 * size, channels, 4, 4) + 100
    if correlated:
        x = x[..., :1, :1].expand_as(x)
    reading = measure_batch_noise(nn.Sequential(conv, nn.Flatten()), x, batch_size=size)
    wanted = per_sample / exact(8 * size, size)
    assert reading.values["effective_samples"] == pytest.approx(wanted, rel=0.05)


def test_a_layer_is_cut_as_the_norm_behind_it_cuts():
    layers = [build_norm("batch", 200, 0), nn.Tanh(), nn.Linear(200, 200)]
    layers += [build_norm("ghost_batch", 200, 0, ghost_size=4), nn.Linear(200, 10)]
    reading = measure_batch_noise(identity(200, *layers), numbers(128, 200), batch_size=16)
    whole, ghosts = reading.series["mean_noise"]
    assert whole == pytest.approx(exact(128, 16), rel=0.05)
    assert ghosts == pytest.approx(exact(128, 4), rel=0.05)


def test_the_output_of_a_sample_scatters_as_among_random_others():
    samples, size = 128, 16
    x = numbers(samples, 64) * 3 + 1
    model = identity(64, nn.BatchNorm1d(64, affine=False), nn.Tanh(), nn.Linear(64, 40))
    head = model[-1]

    def output(batch, statistics_of):
        scale = (statistics_of.var(0, correction=0) + 1e-5).sqrt()
        return torch.tanh((batch - statistics_of.mean(0)) / scale) @ head.weight.T

    generator = torch.Generator().manual_seed(3)
    scatter = []
    for i in range(0, samples, 8):
        others = torch.cat([torch.arange(i), torch.arange(i + 1, samples)])
        outputs = []
        for _ in range(100):
            chosen = others[torch.randperm(samples - 1, generator=generator)[: size - 1]]
            outputs.append(output(x[i : i + 1], x[torch.cat([torch.tensor([i]), chosen])]))
        scatter.append(torch.cat(outputs).var(0))
    wanted = (torch.stack(scatter).mean() / output(x, x).var(0).mean()).sqrt().item()
    reading = measure_batch_noise(model, x, batch_size=size)
    assert reading.values["logit_noise"] == pytest.approx(wanted, rel=0.08)


@pytest.mark.parametrize("norm", ["none", "layer", "group", "rms", "virtual_batch"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_outputs_without_batch_statistics_do_not_scatter_at_all(norm, kind):
    model = NormClassifier(kind, norm, in_shape=(1, 8, 8), num_classes=10, dropout=0.5)
    model.reference = numbers(8, 1, 8, 8, seed=1).float()
    reading = measure_batch_noise(model, numbers(64, 1, 8, 8).float(), batch_size=8)
    assert reading.values["logit_noise"] == 0
    assert reading.values["mean_noise"] > 0


def test_dropout_is_no_part_of_the_noise():
    readings = [
        measure_batch_noise(
            NormClassifier("mlp", "batch", in_shape=(64,), num_classes=10, dropout=dropout),
            numbers(64, 64).float(),
            batch_size=8,
        )
        for dropout in (0.0, 0.5)
    ]
    assert readings[0] == readings[1]
    assert 0.1 < readings[0].values["logit_noise"] < 2


def test_constant_units_are_left_out():
    x = numbers(64, 20)
    some, none = x.clone(), torch.ones_like(x)
    some[:, 10:] = 1e3 / 7
    values = measure_batch_noise(identity(20), some, batch_size=8).values
    assert values == pytest.approx(measure_batch_noise(identity(10), x[:, :10], batch_size=8).values)
    assert all(
        math.isnan(value) for value in measure_batch_noise(identity(20), none, batch_size=8).values.values()
    )


def test_a_layer_that_runs_twice_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.linear(torch.tanh(self.linear(x)))))

    model = Twice().double()
    x = numbers(32, 6)
    once = nn.Sequential(model.linear, nn.Linear(6, 3)).double()
    twice, plain = (measure_batch_noise(m, x, batch_size=8) for m in (model, once))
    assert twice.index == ("linear",)
    assert twice.series["variance_noise"] == plain.series["variance_noise"]


def test_too_few_samples_are_refused():
    with pytest.raises(BadInput, match=r"probe 'batch_noise' needs two batches .* not 15 samples .* of 8;"):
        measure_batch_noise(identity(4), numbers(15, 4), batch_size=8)
    with pytest.raises(BadInput, match="ReLU has no linear map"):
        measure_batch_noise(nn.ReLU(), numbers(16, 4), batch_size=8)
