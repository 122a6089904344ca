"""Batch renormalization and inference example weighing against formulas written apart."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnbench.norms import FollowsProgress, build_norm, recalibrate
from bnbench.registry import BadInput

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
each_dim = pytest.mark.parametrize("dim", SHAPES)


def batch_of(dim, samples=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.2, 1.0, 2.0, 6.0], dtype=torch.float64).view(1, 4, *(1,) * dim)
    x = torch.randn(samples, 4, *SHAPES[dim], generator=generator, dtype=torch.float64)
    return (x + 1 + 0.1 * seed) * scale


def made(name, dim, **options):
    layer = build_norm(name, 4, dim, **options).double()
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.copy_(torch.linspace(0.5, 2, 4))
            layer.bias.copy_(torch.linspace(-1, 1, 4))
    return layer


def columns_of(x):
    return x.movedim(1, 0).flatten(1)


def spread(values, dim):
    return values.view(1, 4, *(1,) * dim)


def std_of(x):
    """√(biased variance + eps) of each channel."""
    return (columns_of(x).var(1, correction=0) + 1e-5).sqrt()


# Batch renormalization


def renormalized(x, r, d, layer):
    """γ (x̂ r + d) + β, with r and d given."""
    dim = x.ndim - 2
    hat = (x - spread(columns_of(x).mean(1), dim)) / spread(std_of(x), dim)
    return spread(layer.weight, dim) * (hat * spread(r, dim) + spread(d, dim)) + spread(layer.bias, dim)


def corrections(x, mean, std, r_max, d_max):
    """r and d, each number by itself."""
    r = [min(max(float(s / t), 1 / r_max), r_max) for s, t in zip(std_of(x), std, strict=True)]
    d = [
        min(max(float((m - n) / t), -d_max), d_max)
        for m, n, t in zip(columns_of(x).mean(1), mean, std, strict=True)
    ]
    return torch.tensor(r, dtype=torch.float64), torch.tensor(d, dtype=torch.float64)


@each_dim
@pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.5, 0.5), (1.0, 2.0), (4.0, 0.0)])
def test_training_corrects_by_the_averages_from_before_the_step(dim, r_max, d_max):
    layer = made("batch_renorm", dim, r_max=r_max, d_max=d_max, momentum=0.25)
    mean, std = torch.zeros(4).double(), torch.ones(4).double()
    for seed in range(3):
        x = batch_of(dim, seed=seed)
        r, d = corrections(x, mean, std, r_max, d_max)
        torch.testing.assert_close(layer(x), renormalized(x, r, d, layer))
        mean, std = 0.75 * mean + 0.25 * columns_of(x).mean(1), 0.75 * std + 0.25 * std_of(x)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_std, std)


@each_dim
def test_evaluation_is_by_the_averages_whose_deviation_holds_eps(dim):
    layer, x = made("batch_renorm", dim, momentum=1.0), batch_of(dim, seed=1)
    layer(x)
    wanted = F.batch_norm(
        batch_of(dim),
        columns_of(x).mean(1),
        columns_of(x).var(1, correction=0),
        layer.weight,
        layer.bias,
        eps=1e-5,
    )
    torch.testing.assert_close(layer.eval()(batch_of(dim)), wanted)


@each_dim
def test_with_its_limits_closed_it_is_batch_normalization(dim):
    closed, ramped = made("batch_renorm", dim, r_max=1.0, d_max=0.0), made("batch_renorm", dim)
    ramped.set_progress(0.0)
    batch = made("batch", dim)
    for seed in range(2):
        x = batch_of(dim, seed=seed).requires_grad_()
        wanted = batch(x)
        (gradient,) = torch.autograd.grad(wanted.pow(3).sum(), x)
        for layer in (closed, ramped):
            y = layer(x)
            torch.testing.assert_close(y, wanted)
            torch.testing.assert_close(torch.autograd.grad(y.pow(3).sum(), x)[0], gradient)


def test_the_gradient_takes_r_and_d_for_constants():
    layer = made("batch_renorm", 1, r_max=1.5, d_max=0.5)
    x = batch_of(1, samples=3).requires_grad_()
    r, d = corrections(x.detach(), torch.zeros(4), torch.ones(4), 1.5, 0.5)
    assert ((r - 1).abs() > 0).all()
    assert ((r > 1 / 1.5) & (r < 1.5)).any() and (r == 1.5).any(), "some are clipped and some are not"
    torch.testing.assert_close(renormalized(x, r, d, layer), layer(x))

    def with_constants(given):
        return renormalized(given, r, d, layer)

    assert torch.autograd.gradcheck(with_constants, x)
    fresh = made("batch_renorm", 1, r_max=1.5, d_max=0.5)
    weights = batch_of(1, samples=3, seed=4)
    leaves = (x, layer.weight, layer.bias)
    wanted = torch.autograd.grad((with_constants(x) * weights).sum(), leaves)
    ours = torch.autograd.grad((fresh(x) * weights).sum(), (x, fresh.weight, fresh.bias))
    torch.testing.assert_close(ours, wanted)
    # The derivative of what the forward pass computes is another: where nothing is clipped, γ / σ.
    assert not torch.allclose(ours[0], weights * spread(layer.weight, 1), atol=1e-2)


@each_dim
def test_where_nothing_is_clipped_training_computes_what_evaluation_does(dim):
    layer = made("batch_renorm", dim, momentum=0.5)
    for seed in range(8):
        layer(batch_of(dim, samples=64, seed=seed))
    layer.set_progress(0.4)
    x = batch_of(dim, samples=32, seed=9)
    r, d = corrections(x, layer.running_mean, layer.running_std, math.inf, math.inf)
    assert ((r > 1 / 3) & (r < 3) & (d.abs() < 5)).all()
    evaluation = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), evaluation)
    layer.set_progress(0.0)
    assert (layer(x) - layer.eval()(x)).abs().max() > 1e-2


def test_limits_open_linearly_between_a_twentieth_and_two_fifths_of_the_training():
    layer = build_norm("batch_renorm", 4, r_max=3.0, d_max=5.0)
    assert isinstance(layer, FollowsProgress)
    assert (float(layer.r_max), float(layer.d_max)) == (3.0, 5.0)
    for fraction, wanted in {
        0.0: (1.0, 0.0),
        0.05: (1.0, 0.0),
        0.12: (1.4, 1.0),
        0.225: (2.0, 2.5),
        0.4: (3.0, 5.0),
        1.0: (3.0, 5.0),
    }.items():
        layer.set_progress(fraction)
        assert (float(layer.r_max), float(layer.d_max)) == pytest.approx(wanted, rel=1e-6)
    layer.set_progress(0.05)
    assert (float(layer.r_max), float(layer.d_max)) == (1.0, 0.0)  # exactly, so that it is batch norm
    layer.set_progress(0.4)
    assert (float(layer.r_max), float(layer.d_max)) == (3.0, 5.0)


def test_limits_are_state_and_the_text_has_those_at_the_end_of_the_ramp():
    layer = build_norm("batch_renorm", 4, r_max=2.0, d_max=1.5)
    layer.set_progress(0.2)
    loaded = build_norm("batch_renorm", 4, r_max=2.0, d_max=1.5)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.r_max, layer.r_max) and 1 < float(loaded.r_max) < 2
    assert "4, r_max=2.0, d_max=1.5, eps=1e-05, momentum=0.1, affine=True" in repr(loaded)


@each_dim
def test_recalibration_gives_a_deviation_that_holds_eps(dim):
    layer = made("batch_renorm", dim)
    batches = [batch_of(dim, samples, seed=seed) for seed, samples in enumerate((5, 2, 7))]
    layer(batches[0])
    limits, population = (layer.r_max.clone(), layer.d_max.clone()), torch.cat(batches)
    recalibrate(layer, batches)
    torch.testing.assert_close(layer.running_mean, columns_of(population).mean(1))
    torch.testing.assert_close(layer.running_std, std_of(population))
    assert (layer.r_max, layer.d_max) == limits
    # On the population itself there is nothing left to correct, whatever the limits.
    evaluation = layer.eval()(population)
    for fraction in (0.0, 1.0):
        layer.set_progress(fraction)
        recalibrate(layer, batches)
        torch.testing.assert_close(layer.train()(population), evaluation)


def test_without_momentum_averages_are_those_of_all_steps():
    layer, batches = made("batch_renorm", 1, momentum=None), [batch_of(1, seed=seed) for seed in range(3)]
    for x in batches:
        layer(x)
    stds = torch.stack([std_of(x) for x in batches])
    torch.testing.assert_close(layer.running_std, stds.mean(0))
    torch.testing.assert_close(layer.running_mean, columns_of(torch.cat(batches)).mean(1))


def test_evaluation_of_batch_renorm_is_precise_far_from_zero():
    layer, x = build_norm("batch_renorm", 4, 1, momentum=1.0), (1e4 + batch_of(1)).float()
    layer(x)
    exact = F.batch_norm(x.double(), None, None, training=True)
    # A step of float32 at 1e4 is 2^-10, and the smallest deviation 0.2.
    assert float((layer.eval()(x) - exact).abs().max().detach()) < 4 * 2**-10 / 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": 0.9}, "r_max must be a finite number of at least 1"),
        ({"r_max": math.inf}, "r_max must be a finite number of at least 1"),
        ({"d_max": -0.1}, "d_max must be a finite number of at least 0"),
        ({"d_max": math.nan}, "d_max must be a finite number of at least 0"),
        ({"momentum": 1.5}, "momentum must be a number from 0 to 1, or None"),
    ],
)
def test_limits_that_cannot_be_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        build_norm("batch_renorm", 4, **options)


def test_one_value_a_channel_cannot_be_trained_on():
    layer = made("batch_renorm", 0)
    with pytest.raises(ValueError, match=r"more than one value a channel, and the input is \(1, 4\)"):
        layer(batch_of(0, 1))
    assert layer.eval()(batch_of(0, 1)).isfinite().all()


# Inference example weighing


def by_second_moments(layer, x, mean, mean_square, alpha):
    """Evaluation of each example by itself, from mixtures of E[x] and E[x²]."""
    outputs = []
    for example in x:
        own = example.reshape(4, -1)
        a = (1 - alpha) * mean + alpha * own.mean(1)
        b = (1 - alpha) * mean_square + alpha * own.square().mean(1)
        slope = 1 / (b - a**2 + 1e-5).sqrt()
        if layer.weight is not None:
            slope = slope * layer.weight
        y = (own - a[:, None]) * slope[:, None]
        outputs.append((y if layer.bias is None else y + layer.bias[:, None]).view_as(example))
    return torch.stack(outputs)


@each_dim
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize(("alpha", "affine"), [(0.0, True), (0.3, True), (0.9, False)])
def test_evaluation_mixes_running_second_moments_with_those_of_the_example(dim, momentum, alpha, affine):
    layer = made("example_weighted_batch", dim, alpha=alpha, momentum=momentum, affine=affine)
    mean, mean_square = torch.zeros(4).double(), torch.ones(4).double()
    for step in range(1, 4):
        x = batch_of(dim, seed=3 * step)
        layer(x)
        rate = 1 / step if momentum is None else momentum
        mean = (1 - rate) * mean + rate * columns_of(x).mean(1)
        mean_square = (1 - rate) * mean_square + rate * columns_of(x).square().mean(1)
    torch.testing.assert_close(layer.running_var, mean_square - mean**2)
    x = batch_of(dim, seed=1)
    torch.testing.assert_close(layer.eval()(x), by_second_moments(layer, x, mean, mean_square, alpha))


@each_dim
def test_training_is_that_of_batch_normalization_whatever_alpha(dim):
    x = batch_of(dim)
    wanted = made("batch", dim)(x)
    for alpha in (0.0, 0.7):
        torch.testing.assert_close(made("example_weighted_batch", dim, alpha=alpha)(x), wanted)


@each_dim
def test_as_its_share_grows_an_example_is_normalized_by_itself(dim):
    layer = made("example_weighted_batch", dim, alpha=1 - 1e-9, affine=False)
    layer(batch_of(dim))
    x = batch_of(dim, seed=1)
    y = layer.eval()(x)
    wanted = F.group_norm(x, 4) if dim else torch.zeros_like(x)
    torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)


def test_alpha_may_be_set_on_a_trained_layer():
    trained, twin = (made("example_weighted_batch", 2, alpha=alpha) for alpha in (0.0, 0.4))
    for layer in (trained, twin):
        layer(batch_of(2))
    trained.alpha = 0.4
    assert torch.equal(trained.eval()(batch_of(2, seed=1)), twin.eval()(batch_of(2, seed=1)))


@each_dim
def test_recalibration_finds_the_populations_moments(dim):
    layer = made("example_weighted_batch", dim, alpha=0.2)
    batches = [batch_of(dim, samples, seed=seed) for seed, samples in enumerate((5, 2, 7))]
    recalibrate(layer, batches)
    columns = columns_of(torch.cat(batches))
    torch.testing.assert_close(layer.running_mean, columns.mean(1))
    torch.testing.assert_close(layer.running_var, columns.var(1, correction=0))
    x = batch_of(dim, seed=9)
    wanted = by_second_moments(layer, x, columns.mean(1), columns.square().mean(1), 0.2)
    torch.testing.assert_close(layer.eval()(x), wanted)


def test_example_weighing_is_precise_far_from_zero():
    layer, x = build_norm("example_weighted_batch", 4, 1, momentum=0.5), batch_of(1)
    exact = made("example_weighted_batch", 1, momentum=0.5, affine=False)
    for seed in range(20):
        far = (1e4 + batch_of(1, seed=seed)).float()
        layer(far)
        exact(far.double())
    far = (1e4 + x).float()
    error = (layer.eval()(far) - exact.eval()(far.double())).abs().max()
    assert float(error.detach()) < 4 * 2**-10 / 0.2


def test_gradients_of_evaluation_flow_through_the_examples_share():
    layer = made("example_weighted_batch", 1, alpha=0.5)
    layer(batch_of(1))
    assert torch.autograd.gradcheck(layer.eval(), batch_of(1, samples=2, seed=1).requires_grad_())


@pytest.mark.parametrize("alpha", [-0.1, 1.0, math.nan])
def test_a_share_that_is_none_is_refused(alpha):
    with pytest.raises(BadInput, match="alpha must be at least 0 and below 1"):
        build_norm("example_weighted_batch", 4, alpha=alpha)


def test_it_can_be_a_layer_of_a_network_that_is_trained():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 6),
            build_norm("batch_renorm", 6, 0),
            nn.ReLU(),
            nn.Linear(6, 4),
            build_norm("example_weighted_batch", 4, 0),
        ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = batch_of(0, samples=32)
    losses = []
    for step in range(40):
        model[1].set_progress(step / 40)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x / 6)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
