"""Frozen batch normalization: batch normalization until it is frozen, a fixed affine map from then on."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from bnbench.norms import NORMS, build_norm, normalization_batch_size, recalibrate
from bnbench.registry import BadInput
from bnbench.testing import NormCase, norm_checks

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}


def batch_of(dim, samples=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 8, *SHAPES[dim], generator=generator, dtype=torch.float64) * 3 + 1


def with_random_affine(layer):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for values in (layer.weight, layer.bias):
            values.copy_(torch.randn(8, generator=generator))
    return layer.double()


def with_random_statistics(layer):
    layer = with_random_affine(layer)
    generator = torch.Generator().manual_seed(8)
    layer.running_mean.copy_(torch.randn(8, generator=generator))
    layer.running_var.copy_(torch.rand(8, generator=generator) + 0.5)
    return layer


def warm(num_features, dim=2, *, eps=1e-5):
    """A layer that is told that the training has just begun."""
    layer = build_norm("frozen_batch", num_features, dim, eps=eps, freeze_after=0.5, learn_affine=True)
    layer.set_progress(0.0)
    return layer


@pytest.mark.parametrize("check", norm_checks(), ids=lambda check: check.__name__.removeprefix("check_norm_"))
def test_until_it_is_frozen_it_keeps_the_contract_of_batch_normalization(check):
    entry = dataclasses.replace(NORMS["batch"], layer=warm)
    check(NormCase(warm, (0, 1, 2, 3), entry))


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_until_it_is_frozen_it_is_batch_normalization_to_the_last_bit(dim, dtype):
    ours, batch = warm(8, dim), build_norm("batch", 8, dim)
    for layer in (ours, batch):
        with_random_affine(layer).to(dtype)
    for seed, fraction in enumerate((0.0, 0.3, 0.49)):
        ours.set_progress(fraction)
        leaves = [batch_of(dim, seed=seed).to(dtype).requires_grad_() for _ in range(2)]
        outputs = [layer(x) for layer, x in zip((ours, batch), leaves, strict=True)]
        gradients = [
            torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
            for y, x, layer in zip(outputs, leaves, (ours, batch), strict=True)
        ]
        assert torch.equal(*outputs)
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert torch.equal(ours.running_mean, batch.running_mean)
    assert torch.equal(ours.running_var, batch.running_var)
    x = batch_of(dim, seed=9).to(dtype)
    assert torch.equal(ours.eval()(x), batch.eval()(x))


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("learn_affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_frozen_it_is_a_fixed_affine_map(dim, learn_affine, training):
    layer = build_norm("frozen_batch", 8, dim, eps=0.1, freeze_after=0.5, learn_affine=learn_affine)
    with_random_statistics(layer).train(training)
    layer.set_progress(0.5)
    before = copy.deepcopy(layer.state_dict())
    x = batch_of(dim).requires_grad_()
    shape = (1, 8, *(1,) * dim)
    slope = (layer.weight / (layer.running_var + 0.1).sqrt()).view(shape)
    wanted = slope * (x - layer.running_mean.view(shape)) + layer.bias.view(shape)
    y = layer(x)
    torch.testing.assert_close(y, wanted)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, slope.expand_as(x).detach())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_layer_that_nobody_tells_of_progress_is_frozen():
    layer = build_norm("frozen_batch", 8, 0, freeze_after=0.5)
    x = batch_of(0).float()
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert torch.equal(layer.running_mean, torch.zeros(8))


def test_it_learns_scale_and_shift_only_where_it_is_asked_to():
    assert list(build_norm("frozen_batch", 8).parameters()) == []
    learned = build_norm("frozen_batch", 8, learn_affine=True)
    assert [name for name, _ in learned.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("options", [{}, {"freeze_after": 0.5, "learn_affine": True}])
def test_its_state_is_that_of_torchvisions_layer_and_takes_that_of_a_batch_norm(options):
    layer = build_norm("frozen_batch", 8, 2, **options).double()
    assert set(layer.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    trained = nn.BatchNorm2d(8).double()
    for seed in range(3):
        trained(batch_of(2, seed=seed))
    with torch.no_grad():
        trained.weight.mul_(1.5)
    model = nn.Sequential(layer)
    model.load_state_dict(nn.Sequential(trained).state_dict())
    x = batch_of(2, seed=9)
    assert torch.equal(model(x), trained.eval()(x))


def network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8), warm(8, 0), nn.ReLU(), nn.Linear(8, 8), warm(8, 0)]
    return nn.Sequential(*layers).double()


def test_recalibration_leaves_frozen_statistics_as_they_are():
    model = network()
    for step in range(3):
        model(batch_of(0, seed=step))
    for layer in (model[1], model[4]):
        layer.set_progress(0.5)
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, [batch_of(0, seed=9)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recalibration_before_it_is_frozen_is_that_of_batch_normalization():
    model = network()
    batch = nn.Sequential(
        model[0], build_norm("batch", 8, 0), nn.ReLU(), model[3], build_norm("batch", 8, 0)
    ).double()
    for either in (model, batch):
        recalibrate(either, [batch_of(0, seed=1), batch_of(0, seed=2)])
    for index in (1, 4):
        assert torch.equal(model[index].running_mean, batch[index].running_mean)
        assert torch.equal(model[index].running_var, batch[index].running_var)


def test_a_frozen_layer_normalizes_by_its_own_statistics_while_others_are_recalibrated():
    model, x = network(), batch_of(0, seed=3)
    model[1].set_progress(1.0)
    hidden = model[3](model[1].eval()(model[0](x)).relu())
    recalibrate(model, [x])
    torch.testing.assert_close(model[4].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[4].running_var, hidden.var(0, correction=0))


def test_it_uses_batch_statistics_only_where_it_is_not_frozen_from_the_start():
    assert normalization_batch_size("frozen_batch", 1) is None
    assert normalization_batch_size("frozen_batch", 64, freeze_after=0.5) == 64
    with pytest.raises(BadInput, match="1 sample before it is frozen; it needs at least 2"):
        normalization_batch_size("frozen_batch", 1, freeze_after=0.5)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(BadInput, match="freeze_after must be at least 0 and below 1"):
        build_norm("frozen_batch", 8, freeze_after=share)
