"""Switchable and batch-channel normalization against their formulas and torch's own layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnbench.norms import FollowsProgress, build_norm, normalization_batch_size, recalibrate
from bnbench.registry import BadInput
from bnbench.testing import norm_cases
from bnbench.testing.norm_modules import compare_compiled

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
TORCH_BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
each_dim = pytest.mark.parametrize("dim", SHAPES)


def batch_of(dim, samples=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 8, *SHAPES[dim], generator=generator, dtype=torch.float64) * 3 + 1


def with_random_parameters(layer):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.double()


def gradients(y, x, layer):
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])


# Switchable


def mixed(layer, x, batch_mean, batch_var):
    """Each channel of each sample by itself."""
    w, u = layer.mean_weight.exp(), layer.var_weight.exp()
    w, u = w / w.sum(), u / u.sum()
    outputs = []
    for sample in x:
        for c, values in enumerate(sample):
            scopes = [values, sample] if x.ndim > 2 else [sample]
            means = [*(scope.mean() for scope in scopes), batch_mean[c]]
            variances = [*(scope.var(correction=0) for scope in scopes), batch_var[c]]
            mean = sum(a * b for a, b in zip(w, means, strict=True))
            var = sum(a * b for a, b in zip(u, variances, strict=True))
            outputs.append(layer.weight[c] * (values - mean) / (var + layer.eps) ** 0.5 + layer.bias[c])
    return torch.stack(outputs).view_as(x)


def moments(x):
    columns = x.movedim(1, 0).flatten(1)
    return columns.mean(1), columns.var(1, correction=0)


@each_dim
def test_switchable_mixes_moments_in_training(dim):
    layer, x = with_random_parameters(build_norm("switchable", 8, dim)), batch_of(dim).requires_grad_()
    y, wanted = layer(x), mixed(layer, x, *moments(x))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradients(y, x, layer), gradients(wanted, x, layer))


@each_dim
def test_switchable_evaluates_with_running_moments_in_the_place_of_the_batch(dim):
    layer, x = with_random_parameters(build_norm("switchable", 8, dim)).eval(), batch_of(dim)
    layer.running_mean.copy_(torch.linspace(-1, 1, 8))
    layer.running_var.copy_(torch.linspace(0.5, 9, 8))
    torch.testing.assert_close(layer(x), mixed(layer, x, layer.running_mean, layer.running_var))


@each_dim
@pytest.mark.parametrize("scope", ["instance", "layer", "batch"])
def test_switchable_reaches_each_of_its_parts(dim, scope):
    if dim == 0 and scope == "instance":
        pytest.skip("one value has no statistics")
    layer, x = build_norm("switchable", 8, dim).double(), batch_of(dim)
    place = ["instance", "layer", "batch"][-len(layer.mean_weight) :].index(scope)
    with torch.no_grad():
        layer.mean_weight[place] = layer.var_weight[place] = 100.0
    wanted = {
        "instance": lambda: F.instance_norm(x),
        "layer": lambda: F.group_norm(x, 1),
        "batch": lambda: F.batch_norm(x, None, None, training=True),
    }[scope]()
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_switchable_averages_biased_variances_from_one(momentum):
    layer = build_norm("switchable", 8, 2, momentum=momentum).double()
    assert torch.equal(layer.running_var, torch.ones(8, dtype=torch.float64))
    (first_mean, first_var), (mean, var) = moments(batch_of(2)), moments(batch_of(2, seed=1))
    layer(batch_of(2))
    layer(batch_of(2, seed=1))
    wanted_mean = 0.09 * first_mean + 0.1 * mean if momentum else (first_mean + mean) / 2
    wanted_var = 0.81 + 0.09 * first_var + 0.1 * var if momentum else (first_var + var) / 2
    torch.testing.assert_close(layer.running_mean, wanted_mean)
    torch.testing.assert_close(layer.running_var, wanted_var)


def test_switchable_after_recalibration_has_the_moments_of_the_population():
    layer, batches = build_norm("switchable", 8, 1).double(), [batch_of(1, n, seed=n) for n in (2, 5)]
    recalibrate(nn.Sequential(layer), batches)
    mean, var = moments(torch.cat(batches))
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)


def test_switchable_has_three_shares_each_or_two_without_positions():
    assert [len(build_norm("switchable", 8, dim).mean_weight) for dim in SHAPES] == [2, 3, 3, 3]
    assert build_norm("switchable", 8, affine=False).weight is None


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_switchable_mixes_as_many_parts_as_it_has_shares_whatever_the_input(dim, shape, training):
    layer = build_norm("switchable", 4, dim).double().train(training)
    y = layer(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert y.shape == shape
    assert y.isfinite().all()


def test_switchable_takes_one_sample_with_positions_and_refuses_one_value():
    layer, x = with_random_parameters(build_norm("switchable", 8, 2)), batch_of(2, 1)
    torch.testing.assert_close(layer(x), mixed(layer, x, *moments(x)))
    for dim, one in ((0, batch_of(0, 1)), (2, x[..., :1, :1])):
        with pytest.raises(ValueError, match="more than one value a channel"):
            build_norm("switchable", 8, dim).double()(one)


# Batch-channel


class BatchThenGroup(nn.Module):
    """torch's two layers in a row; the affine map of the second is a number a group."""

    def __init__(self, ours, dim):
        super().__init__()
        self.first = TORCH_BATCH_NORM[dim](8, momentum=ours.momentum).double()
        self.second = nn.GroupNorm(ours.num_groups, 8, affine=False).double()
        self.load(ours)

    def load(self, ours):
        self.first.weight, self.first.bias = ours.weight, ours.bias
        self.scale, self.shift = ours.group_weight, ours.group_bias

    def forward(self, x):
        y = self.second(self.first(x))
        parts = y.chunk(len(self.scale), 1)
        return torch.cat([a * part + b for a, part, b in zip(self.scale, parts, self.shift, strict=True)], 1)


@each_dim
@pytest.mark.parametrize("options", [{}, {"num_groups": 4}, {"num_groups": 1, "momentum": None}])
def test_batch_channel_is_batch_norm_and_then_group_norm(dim, options):
    layer = with_random_parameters(build_norm("batch_channel", 8, dim, **options))
    pair, x = BatchThenGroup(layer, dim), batch_of(dim).requires_grad_()
    for training in (True, True, False):
        y, wanted = layer.train(training)(x), pair.train(training)(x)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(gradients(y, x, layer), gradients(wanted, x, layer), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        {name: getattr(layer, name) for name, _ in pair.first.named_buffers()},
        dict(pair.first.named_buffers()),
    )


def test_batch_channel_has_an_affine_map_a_channel_and_one_a_group():
    layer = build_norm("batch_channel", 64)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {"weight": (64,), "bias": (64,), "group_weight": (16,), "group_bias": (16,)}
    assert list(build_norm("batch_channel", 64, affine=False).parameters()) == []


def estimator(dim=2, **options):
    return with_random_parameters(build_norm("batch_channel", 8, dim, estimate=True, **options))


@each_dim
def test_estimates_move_first_and_then_normalize_as_constants(dim):
    layer, rate = estimator(dim, momentum=0.3), 0.3
    mean, var = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    for seed in range(3):
        x = batch_of(dim, seed=seed).requires_grad_()
        columns = x.detach().movedim(1, 0).flatten(1)
        mean = (1 - rate) * mean + rate * columns.mean(1)
        var = (1 - rate) * var + rate * ((columns - mean[:, None]) ** 2).mean(1)
        shape = (8, *(1,) * dim)
        z = (x - mean.view(shape)) / (var.view(shape) + layer.eps) ** 0.5
        z = z * layer.weight.view(shape) + layer.bias.view(shape)
        parts = F.group_norm(z, 2).chunk(2, 1)
        wanted = torch.cat([parts[k] * layer.group_weight[k] + layer.group_bias[k] for k in range(2)], 1)
        y = layer(x)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(gradients(y, x, layer), gradients(wanted, x, layer))
    torch.testing.assert_close((layer.running_mean, layer.running_var), (mean, var))
    torch.testing.assert_close(layer.eval()(x), wanted)


def test_the_rate_of_the_estimates_rises_from_nothing():
    layer, rates = estimator(momentum=0.2), []
    for fraction in (0.0, 0.025, 0.05, 1.0):
        for module in layer.modules():
            if isinstance(module, FollowsProgress):
                module.set_progress(fraction)
        rates.append(float(layer.rate.value))
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.2])
    layer.rate.set_progress(0.0)
    layer(batch_of(2))
    assert torch.equal(layer.running_mean, torch.zeros(8, dtype=torch.float64))
    assert torch.equal(layer.running_var, torch.ones(8, dtype=torch.float64))


def test_only_a_layer_that_estimates_follows_the_progress():
    for estimate in (False, True):
        modules = build_norm("batch_channel", 8, estimate=estimate).modules()
        assert any(isinstance(module, FollowsProgress) for module in modules) == estimate


def test_estimates_take_a_batch_of_one_value_and_two_calls_before_a_backward_pass():
    layer = estimator(dim=0)
    assert layer(batch_of(0, 1)).isfinite().all()
    y = layer(batch_of(0)) + layer(batch_of(0, seed=1))
    y.sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert normalization_batch_size("batch_channel", 1, estimate=True) == 1


def test_estimates_are_recalibrated_to_the_moments_of_the_population():
    layer, batches = estimator(dim=1), [batch_of(1, n, seed=n) for n in (2, 5)]
    recalibrate(nn.Sequential(layer), batches)
    torch.testing.assert_close((layer.running_mean, layer.running_var), moments(torch.cat(batches)))


@pytest.mark.slow  # the compiler takes ten seconds to load
def test_estimates_that_a_compiled_step_moves_are_those_that_its_backward_pass_reads():
    compare_compiled(norm_cases("batch_channel", estimate=True, momentum=0.5)[0], "aot_eager")


def test_what_batch_channel_cannot_be_is_one_clear_line():
    with pytest.raises(BadInput, match="num_groups=3 does not divide 8 channels"):
        build_norm("batch_channel", 8, num_groups=3)
    with pytest.raises(BadInput, match="estimate=True needs a momentum"):
        build_norm("batch_channel", 8, estimate=True, momentum=None)
    with pytest.raises(BadInput, match="a batch of 1 sample; it needs 2, or estimate=True"):
        normalization_batch_size("batch_channel", 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        build_norm("batch_channel", 8, 0)(torch.zeros(1, 8))
