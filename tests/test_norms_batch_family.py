"""Mean-only, variance-only, L1, range and batch-instance normalization against formulas written apart."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnbench.norms import build_norm, recalibrate
from bnbench.registry import BadInput

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
FAMILY = ("mean_only_batch", "variance_only_batch", "l1_batch", "range_batch", "batch_instance")
each_norm = pytest.mark.parametrize("name", FAMILY)
each_dim = pytest.mark.parametrize("dim", SHAPES)


def batch_of(dim, samples=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 4, *SHAPES[dim], generator=generator, dtype=torch.float64) * 3 + 2 + seed


def made(name, dim, **options):
    layer = build_norm(name, 4, dim, **options).double()
    with torch.no_grad():
        if getattr(layer, "weight", None) is not None:
            layer.weight.copy_(torch.linspace(0.5, 2, 4))
        if layer.bias is not None:
            layer.bias.copy_(torch.linspace(-1, 1, 4))
    return layer


def columns_of(x):
    return x.movedim(1, 0).flatten(1)


def statistics(name, x):
    """Each channel's centre, its scale, and what the running scale should take, from its list of values."""
    centres, scales, kept = [], [], []
    for values in columns_of(x):
        mean = values.sum() / len(values)
        if name == "l1_batch":
            scale = math.sqrt(math.pi / 2) * sum((value - mean).abs() for value in values) / len(values)
            scales.append(scale + 1e-5)
            kept.append(scale)
        elif name == "range_batch":
            scale = (max(values) - min(values)) / math.sqrt(2 * math.log(len(values)))
            scales.append(scale + 1e-5)
            kept.append(scale)
        elif name == "variance_only_batch":
            squares = sum((value - mean) ** 2 for value in values)
            scales.append(torch.sqrt(squares / len(values) + 1e-5))
            kept.append(squares / (len(values) - 1))
            mean = torch.zeros(())
        else:
            scales.append(torch.ones(()))
        centres.append(mean)
    stack = [torch.stack(list(map(torch.as_tensor, part))).double() for part in (centres, scales)]
    return *stack, torch.stack(kept) if kept else None


def by_formula(layer, x, centre, scale):
    shape = (1, 4, *(1,) * (x.ndim - 2))
    weight = getattr(layer, "weight", None)
    slope = torch.ones(4) if weight is None else weight
    bias = torch.zeros(4) if layer.bias is None else layer.bias
    return (x - centre.view(shape)) * (slope / scale).view(shape) + bias.view(shape)


def running(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers() if name.startswith("running")}


@each_dim
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", FAMILY[:-1])
def test_a_training_step_is_the_formula_and_moves_the_averages(name, affine, dim):
    layer, x = made(name, dim, affine=affine, momentum=0.25), batch_of(dim)
    centre, scale, kept = statistics(name, x)
    torch.testing.assert_close(layer(x), by_formula(layer, x, centre, scale))
    wanted = {}
    if name != "variance_only_batch":
        wanted["running_mean"] = 0.25 * centre
    if kept is not None:
        wanted["running_var" if name == "variance_only_batch" else "running_scale"] = 0.75 + 0.25 * kept
    torch.testing.assert_close(running(layer), wanted)


@each_dim
@pytest.mark.parametrize("name", FAMILY[:-1])
def test_without_momentum_evaluation_is_by_the_average_of_all_steps(name, dim):
    layer = made(name, dim, momentum=None)
    batches = [batch_of(dim, seed=seed) for seed in range(3)]
    for x in batches:
        layer(x)
    parts = [statistics(name, x) for x in batches]
    centre = torch.stack([part[0] for part in parts]).mean(0)
    scale = torch.ones(4)
    if parts[0][2] is not None:
        kept = torch.stack([part[2] for part in parts]).mean(0)
        scale = (kept + 1e-5).sqrt() if name == "variance_only_batch" else kept + 1e-5
    x = batch_of(dim, samples=1, seed=9)
    torch.testing.assert_close(layer.eval()(x), by_formula(layer, x, centre, scale))


@each_norm
@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_momentum_of_0_keeps_the_averages_and_one_of_1_takes_the_last_batch(name, momentum):
    layer, fresh = made(name, 1, momentum=momentum), running(made(name, 1))
    last = made(name, 1, momentum=1.0)
    for seed in range(2):
        layer(batch_of(1, seed=seed))
    last(batch_of(1, seed=1))
    torch.testing.assert_close(running(layer), fresh if momentum == 0 else running(last))


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("name", ["l1_batch", "batch"])
def test_of_gaussian_inputs_the_l1_scale_is_the_standard_deviation(name, dim):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(20_000, 4, *(1,) * dim, generator=generator) + 5
    y = build_norm(name, 4, dim)(x)
    torch.testing.assert_close(columns_of(y).std(1), torch.ones(4), atol=0.02, rtol=0)


@pytest.mark.parametrize("values", [100, 10_000])
def test_of_gaussian_inputs_the_range_is_what_extreme_values_say(values):
    # With b = √(2 ln n), the mean maximum of n Gaussian values tends to b − (ln ln n + ln 4π − 1.1544) / 2b.
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(values, 1000, generator=generator)
    layer = build_norm("range_batch", 1000, 0, momentum=1.0)
    layer(x)
    root = math.sqrt(2 * math.log(values))
    largest = root - (math.log(math.log(values)) + math.log(4 * math.pi) - 2 * 0.5772) / (2 * root)
    assert float(layer.running_scale.mean()) == pytest.approx(3 * 2 * largest / root, rel=0.03)


def test_the_gradient_through_a_range_reaches_equal_extremes_alike():
    x = torch.tensor([[-2.0], [-2.0], [0.0], [1.0], [3.0]], requires_grad=True)
    y = build_norm("range_batch", 1, 0)(x)
    (gradient,) = torch.autograd.grad(y[2].sum(), x)
    assert float(gradient[0]) == float(gradient[1])
    assert float(gradient[4] - gradient[3]) == pytest.approx(2 * float(gradient[3] - gradient[0]), rel=1e-5)


def test_a_bias_before_it_is_dead_where_the_mean_is_subtracted_and_only_there():
    x = batch_of(2)
    shifted = x + torch.linspace(-2, 2, 4).view(1, 4, 1, 1)
    for name in FAMILY:
        same = torch.allclose(made(name, 2)(shifted), made(name, 2)(x))
        assert same == (name != "variance_only_batch")


@pytest.mark.parametrize("name", FAMILY[1:4])
def test_evaluation_is_precise_far_from_zero(name):
    layer, x = build_norm(name, 4, 1, momentum=1.0), 1e4 + batch_of(1) / 3
    layer(x.float())
    exact = made(name, 1, momentum=1.0, affine=False)
    exact(x.float().double())
    wanted = exact.eval()(x.float().double())
    error = (layer.eval()(x.float()) - wanted).abs().max()
    # A step of float32 at 1e4 is 2^-10. An output that keeps its mean is that far from zero itself.
    steps = 8 if name == "variance_only_batch" else 2
    assert float(error.detach()) < steps * 2**-10


# Precise statistics


@each_dim
def test_recalibration_finds_the_moments_of_the_population(dim):
    batches = [batch_of(dim, samples, seed=seed) for seed, samples in enumerate((5, 2, 7))]
    columns = columns_of(torch.cat(batches))
    names = ["mean_only_batch", "variance_only_batch", *(["batch_instance"] if dim else [])]
    for name in names:
        layer = made(name, dim)
        recalibrate(layer, batches)
        found = running(layer)
        wanted = {"running_mean": columns.mean(1), "running_var": columns.var(1, correction=0)}
        torch.testing.assert_close(found, {buffer: wanted[buffer] for buffer in found})
        assert int(layer.num_batches_tracked) == 0


@each_dim
@pytest.mark.parametrize("name", ["l1_batch", "range_batch"])
def test_recalibration_averages_scales_by_samples(name, dim):
    layer = made(name, dim)
    batches = [batch_of(dim, samples, seed=seed) for seed, samples in enumerate((5, 2, 7))]
    recalibrate(layer, batches)
    scales = torch.stack([statistics(name, x)[2] for x in batches])
    shares = torch.tensor([[5.0], [2.0], [7.0]]).double() / 14
    wanted = {
        "running_mean": columns_of(torch.cat(batches)).mean(1),
        "running_scale": (shares * scales).sum(0),
    }
    torch.testing.assert_close(running(layer), wanted)


# Batch-instance normalization


def gated(dim, gates, **options):
    layer = made("batch_instance", dim, **options)
    with torch.no_grad():
        layer.gate.copy_(torch.as_tensor(gates))
    return layer


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_instance_is_the_mixture_of_torchs_two_norms(dim, affine):
    gates = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    layer, batches = gated(dim, gates, affine=affine), [batch_of(dim, seed=seed) for seed in range(2)]
    norms = (None, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    batch = norms[dim](4, affine=False).double()
    shape = (1, 4, *(1,) * dim)
    share = gates.view(shape)
    slope = layer.weight.view(shape) if affine else 1.0
    shift = layer.bias.view(shape) if affine else 0.0
    for training, x in itertools.product((True, False), batches):
        layer.train(training)
        batch.train(training)
        y = share * batch(x) + (1 - share) * F.instance_norm(x)
        torch.testing.assert_close(layer(x), slope * y + shift)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, name), getattr(batch, name))


def test_a_gate_that_an_update_moved_out_is_put_back_by_the_next_training_step_and_learns_on():
    x = batch_of(2)
    layer, wanted = gated(2, [1.5, -0.5, 0.4, 1.0]), gated(2, [1.0, 0.0, 0.4, 1.0])
    torch.testing.assert_close(layer.eval()(x), wanted.eval()(x))
    assert float(layer.gate[0].detach()) == 1.5  # evaluation leaves it
    torch.testing.assert_close(layer.train()(x), wanted.train()(x))
    assert torch.equal(layer.gate, wanted.gate)
    (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), layer.gate)
    assert gradient.abs().min() > 1e-3


def test_training_holds_gates_inside_as_clipping_after_each_update_does():
    layer, by_hand = gated(1, [1.0] * 4), gated(1, [1.0] * 4)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.01, momentum=0.9) for one in (layer, by_hand)]
    crossed = False
    for step in range(12):
        x = batch_of(1, seed=step % 3)
        for one, optimizer in zip((layer, by_hand), optimizers, strict=True):
            optimizer.zero_grad()
            (one(x) - x).square().mean().backward()
            optimizer.step()
        crossed = crossed or bool(((by_hand.gate < 0) | (by_hand.gate > 1)).any())
        with torch.no_grad():
            by_hand.gate.clamp_(0, 1)
        torch.testing.assert_close(layer.eval()(x), by_hand.eval()(x))
        layer.train()
        by_hand.train()
    assert crossed


def test_a_layer_that_is_used_twice_before_the_backward_pass_has_the_gradients_of_both():
    layer, first, second = gated(1, [1.0, 0.0, 0.4, 0.9]), batch_of(1), batch_of(1, seed=1)
    (layer(first) + layer(second)).pow(3).sum().backward()
    twins = [gated(1, [1.0, 0.0, 0.4, 0.9]) for _ in range(2)]
    (twins[0](first) + twins[1](second)).pow(3).sum().backward()
    torch.testing.assert_close(layer.gate.grad, twins[0].gate.grad + twins[1].gate.grad)


# What is refused


@each_norm
def test_a_momentum_that_is_none_is_refused(name):
    for momentum in (-0.1, 1.5, float("nan")):
        with pytest.raises(BadInput, match="momentum must be a number from 0 to 1, or None"):
            build_norm(name, 4, momentum=momentum)


@pytest.mark.parametrize("name", FAMILY[:-1])
def test_one_value_a_channel_is_refused_in_training_and_taken_in_evaluation(name):
    layer, x = made(name, 0), batch_of(0, samples=1)
    with pytest.raises(ValueError, match=r"more than one value a channel, and the input is \(1, 4\)"):
        layer(x)
    assert layer.eval()(x).isfinite().all()
    assert made(name, 1)(batch_of(1, samples=1)).isfinite().all()  # five positions


def test_batch_instance_needs_positions_and_a_gate_inside():
    with pytest.raises(BadInput, match="it needs spatial axes, and dim=0 has none"):
        build_norm("batch_instance", 4, 0)
    for gate in (-0.1, 1.1, float("nan")):
        with pytest.raises(BadInput, match="gate_init must be a number from 0 to 1"):
            build_norm("batch_instance", 4, gate_init=gate)
    for training in (True, False):
        with pytest.raises(ValueError, match="one position a channel"):
            made("batch_instance", 2).train(training)(torch.ones(3, 4, 1, 1, dtype=torch.float64))
