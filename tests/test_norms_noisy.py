"""Noisy batch normalization: batch normalization, then in training an affine map drawn at every step."""

import copy

import pytest
import torch
from torch import nn

from bnbench.norms import build_norm, recalibrate
from bnbench.registry import BadInput

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
SAMPLES, UNITS, STEPS = 16, 64, 300


def batch_of(dim, samples=8, units=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, units, *SHAPES[dim], generator=generator, dtype=torch.float64) * 3 + 1


def with_random_affine(layer):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(8, generator=generator))
    return layer


def draws_of(noise, steps=STEPS):
    """Shifts m and scales s (steps, samples, units) that a layer drew, solved for from its output.

    The first and the last position give two equations for the two unknowns; the others have to agree.
    """
    x = batch_of(1, SAMPLES, UNITS)
    clean = build_norm("batch", UNITS, 1).double()(x).detach()
    layer = build_norm("noisy_batch", UNITS, 1, noise=noise).double()
    torch.manual_seed(0)
    shifts, scales = [], []
    for _ in range(steps):
        y = layer(x).detach()
        s = (y[..., 0] - y[..., -1]) / (clean[..., 0] - clean[..., -1])
        m = y[..., 0] - s * clean[..., 0]
        torch.testing.assert_close(y, s[..., None] * clean + m[..., None])
        shifts.append(m)
        scales.append(s)
    return torch.stack(shifts), torch.stack(scales)


@pytest.fixture(scope="module", params=[0.5, 1.0, 2.0])
def drawn(request):
    return request.param, *draws_of(request.param)


def variances(draws):
    """Unbiased estimates of the variance within a step and unit, and of that between these."""
    within = draws.var(1).mean()
    return float(within), float(draws.mean(1).var() - within / SAMPLES)


def test_the_means_of_the_draws_are_those_of_the_distribution(drawn):
    noise, shifts, scales = drawn
    # Five standard errors, as if a unit had one draw a step: its draws in a step share their mean.
    error = 5 / (STEPS * UNITS) ** 0.5
    assert abs(float(shifts.mean())) < error * noise * (1 / 12 + 1 / 300) ** 0.5
    assert abs(float(scales.mean()) - (1 + noise / 8)) < error * noise * (1 / 192 + 1 / 100) ** 0.5


def test_the_variances_within_and_between_steps_are_those_of_the_distribution(drawn):
    noise, shifts, scales = drawn
    shift, scale = variances(shifts), variances(scales)
    assert shift == pytest.approx((noise**2 / 300, noise**2 / 12), rel=0.03)
    assert scale == pytest.approx((noise**2 / 100, noise**2 / 192), rel=0.03)


def test_shifts_are_uniform_around_a_mean_that_all_samples_share(drawn):
    noise, shifts, _ = drawn
    ranges = shifts.amax(1) - shifts.amin(1)
    assert ranges.max() <= 0.2 * noise + 1e-6
    # The expected range of n uniform draws is (n − 1) / (n + 1) of the width.
    assert float(ranges.mean()) == pytest.approx(0.2 * noise * (SAMPLES - 1) / (SAMPLES + 1), rel=0.01)
    assert 0.58 * noise < shifts.abs().max() <= 0.6 * noise + 1e-6


def test_scales_are_normal_around_a_mean_that_all_samples_share(drawn):
    noise, _, scales = drawn
    deviations = (scales - scales.mean(1, keepdim=True)) * (SAMPLES / (SAMPLES - 1)) ** 0.5 / (0.1 * noise)
    assert float((deviations.abs() > 2).double().mean()) == pytest.approx(0.0455, rel=0.05)
    assert deviations.abs().max() > 4


def test_the_noise_of_a_step_tells_nothing_of_the_next_nor_of_another_unit(drawn):
    _, *both = drawn
    for draws in both:
        means = draws.mean(1)
        for first, second in ((means[1:], means[:-1]), (means[:, 1:], means[:, :-1])):
            pairs = torch.stack([first.flatten(), second.flatten()])
            assert abs(float(torch.corrcoef(pairs)[0, 1])) < 5 / first.numel() ** 0.5
    shifts, scales = both
    pairs = torch.stack([shifts.mean(1).flatten(), scales.mean(1).flatten()])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 5 / pairs.shape[1] ** 0.5


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}])
def test_without_noise_it_is_batch_normalization_to_the_last_bit(dim, dtype, options):
    ours = build_norm("noisy_batch", 8, dim, noise=0, **options)
    batch = build_norm("batch", 8, dim, **options)
    for layer in (ours, batch):
        with_random_affine(layer).to(dtype)
    before = torch.get_rng_state()
    for seed in range(3):
        leaves = [batch_of(dim, seed=seed).to(dtype).requires_grad_() for _ in range(2)]
        outputs = [layer(x) for layer, x in zip((ours, batch), leaves, strict=True)]
        gradients = [
            torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
            for y, x, layer in zip(outputs, leaves, (ours, batch), strict=True)
        ]
        assert torch.equal(*outputs)
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert ours.state_dict().keys() == batch.state_dict().keys()
    assert all(torch.equal(value, batch.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_noisy_training_it_evaluates_as_batch_normalization_to_the_last_bit(dim, dtype):
    ours, batch = build_norm("noisy_batch", 8, dim, noise=3.0), build_norm("batch", 8, dim)
    for layer in (ours, batch):
        with_random_affine(layer).to(dtype)
    for seed in range(3):
        x = batch_of(dim, seed=seed).to(dtype)
        assert not torch.equal(ours(x), batch(x))
    x = batch_of(dim, seed=9).to(dtype)
    before = torch.get_rng_state()
    assert torch.equal(ours.eval()(x), batch.eval()(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_comes_after_the_learned_scale_and_shift():
    layer = build_norm("noisy_batch", UNITS, 0).double()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(1000.0)
    y = torch.stack([layer(batch_of(0, SAMPLES, UNITS)) for _ in range(20)]).detach() / 1000
    # Of 1000 s + m, the scale's deviations are all that is left: a map before β would leave none.
    assert float(y.std()) == pytest.approx((1 / 192 + 1 / 100) ** 0.5, rel=0.05)


def test_the_gradient_is_that_of_batch_normalization_times_the_scales():
    x = batch_of(1, SAMPLES, 8).requires_grad_()
    ours, batch = build_norm("noisy_batch", 8, 1).double(), build_norm("batch", 8, 1).double()
    clean, y = batch(x), ours(x)
    scales = ((y[..., :1] - y[..., -1:]) / (clean[..., :1] - clean[..., -1:])).detach()
    weights = batch_of(1, SAMPLES, 8, seed=5)
    torch.testing.assert_close(
        torch.autograd.grad((weights * y).sum(), [x, *ours.parameters()]),
        torch.autograd.grad((weights * scales * clean).sum(), [x, *batch.parameters()]),
    )


def test_a_seed_gives_the_same_noise_in_every_precision():
    layer, x = build_norm("noisy_batch", 8, 2, momentum=0.0), batch_of(2)
    outputs = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        copied = copy.deepcopy(layer).to(dtype)
        outputs.append([copied(x.to(dtype)).double() for _ in range(2)])
    exact = outputs[0]
    assert (exact[0] - exact[1]).abs().max() > 0.1
    for other, tolerance in zip(outputs[1:], (1e-5, 0.05), strict=True):
        torch.testing.assert_close(other, exact, rtol=tolerance, atol=tolerance)


def network(name, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), build_norm(name, 8, 0, **options), nn.ReLU(), nn.Linear(8, 8)]
    return nn.Sequential(*layers, build_norm(name, 8, 0, **options)).double()


def test_recalibration_is_done_without_noise():
    noisy, batch = network("noisy_batch", noise=2.0), network("batch")
    for model in (noisy, batch):
        recalibrate(model, [batch_of(0, seed=1), batch_of(0, seed=2)])
    assert all(torch.equal(value, batch.state_dict()[name]) for name, value in noisy.state_dict().items())
    assert all(module.training for module in noisy.modules())


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_a_dose_that_is_none_is_refused(noise):
    with pytest.raises(BadInput, match="norm 'noisy_batch': noise must be a finite number of at least 0"):
        build_norm("noisy_batch", 8, noise=noise)
