"""Moving average batch normalization against its equations in NumPy, and the centred weights beside it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from bnbench.norms import apply_reparam, build_norm, normalization_batch_size
from bnbench.registry import BadInput
from tests.own_backward import check_compiled_steps, check_replicas

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
CHANNELS = 4


def batch_of(dim, seed, samples=6, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5
    x = torch.randn(samples, *SHAPES[dim], CHANNELS, generator=generator, dtype=torch.float64)
    return scale * (x * scales + 0.3).movedim(-1, 1).contiguous()


def layer_of(dim, **options):
    layer = build_norm("moving_average_batch", CHANNELS, dim, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.5, 2.0, 1.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.0, -1.0, 2.0]))
    return layer


def run_step(layer, x, g):
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], g)
    return [tensor.detach().clone().numpy() for tensor in (y, *gradients, layer.running_square)]


class Equations:
    """The layer on arrays (values of a channel, C), with lists of all past statistics for its buffers."""

    def __init__(self, gamma, beta, *, size, warmup, share, eps):
        self.gamma, self.beta = gamma, beta
        self.size, self.warmup, self.share, self.eps = size, warmup, share, eps
        self.squares, self.overlaps = [], []
        self.average = np.ones(CHANNELS)

    def buffered(self, history):
        return np.mean(history[-self.size :], axis=0) if len(history) >= self.size else history[-1]

    def forward(self, x):
        self.squares.append((x**2).mean(0))
        square = self.buffered(self.squares)
        self.root = np.sqrt(square + self.eps)
        self.z = x / self.root
        self.ratio = np.ones(CHANNELS)
        if len(self.squares) > self.warmup:
            self.ratio = np.clip(self.root / np.sqrt(self.average + self.eps), 1 / 5, 5)
        self.average = (1 - self.share) * self.average + self.share * square
        return self.gamma * self.ratio * self.z + self.beta

    def backward(self, dy):
        g = dy * self.gamma * self.ratio
        self.overlaps.append((g * self.z).mean(0))
        dx = (g - self.buffered(self.overlaps) * self.z) / self.root
        return dx, (dy * self.ratio * self.z).sum(0), dy.sum(0)


def as_rows(array):
    return np.moveaxis(np.asarray(array), 1, -1).reshape(-1, CHANNELS)


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize(("size", "warmup"), [(1, 0), (3, 2), (2, 5)])
def test_eight_steps_are_those_of_the_equations(dim, size, warmup):
    layer = layer_of(dim, buffer_size=size, warmup=warmup, momentum=0.3, eps=0.01)
    values = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    equations = Equations(*values, size=size, warmup=warmup, share=0.3, eps=0.01)
    ratios = []
    for step in range(8):
        # Scales that jump, so that the ratio meets both of its bounds.
        x = batch_of(dim, step, scale=(1, 1, 1, 100, 1, 1e-3, 1, 1)[step])
        g = batch_of(dim, 10 + step)
        y, dx, dgamma, dbeta, average = run_step(layer, x, g)
        np.testing.assert_allclose(as_rows(y), equations.forward(as_rows(x)), rtol=1e-12, atol=1e-12)
        wanted = equations.backward(as_rows(g))
        for got, right in zip((as_rows(dx), dgamma, dbeta), wanted, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(average, equations.average, rtol=1e-12)
        ratios.append(equations.ratio)
    if (size, warmup) == (1, 0):
        assert np.max(ratios) == 5
        assert np.min(ratios) == 1 / 5


def test_before_its_buffers_are_full_the_gradient_is_exact():
    layer = layer_of(1, buffer_size=1000)
    values = layer.weight.detach() + 0.1, layer.bias.detach()

    def forward(x, weight, bias):
        return functional_call(copy.deepcopy(layer), {"weight": weight, "bias": bias}, x)

    leaves = [leaf.clone().requires_grad_() for leaf in (batch_of(1, 0), *values)]
    assert torch.autograd.gradcheck(forward, leaves)


def test_evaluation_divides_by_the_average_and_moves_nothing():
    layer = layer_of(2, eps=0.01)
    run_step(layer, batch_of(2, 0), batch_of(2, 1))
    before = copy.deepcopy(layer.state_dict())
    x, shape = batch_of(2, 2), (1, -1, 1, 1)
    slope = layer.weight.view(shape) / (layer.running_square.view(shape) + 0.01).sqrt()
    torch.testing.assert_close(layer.eval()(x), slope * x + layer.bias.view(shape))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_passes_without_a_backward_pass_do_not_count_in_the_buffer_of_gradients():
    layer = layer_of(0, buffer_size=2)
    with torch.no_grad():
        for seed in (0, 1):
            layer(batch_of(0, seed))
    assert int(layer.num_gradients_tracked) == 0
    x, g = batch_of(0, 2), batch_of(0, 3)
    _, dx, *_ = run_step(layer, x, g)
    square = torch.stack([batch_of(0, 1).square().mean(0), x.square().mean(0)]).mean(0).numpy()
    root = np.sqrt(square + 1e-5)
    z, scaled = x.numpy() / root, g.numpy() * layer.weight.detach().numpy()
    np.testing.assert_allclose(dx, (scaled - (scaled * z).mean(0) * z) / root, rtol=1e-12)


def test_batches_of_two_in_a_full_buffer_have_the_noise_of_larger_ones():
    drawn = [batch_of(0, seed, samples=2) for seed in range(300)]
    deviations = {}
    for size in (1, 16):
        layer = build_norm("moving_average_batch", CHANNELS, 0, buffer_size=size, warmup=1000).double()
        gains = [float((layer(x) / x).mean().detach()) for x in drawn]
        deviations[size] = np.std(gains[20:])
    assert deviations[16] < 0.4 * deviations[1]


@pytest.mark.parametrize("dim", [0, 2])
def test_replicas_under_vmap_train_as_alone(dim):
    layers = [layer_of(dim, buffer_size=2, warmup=1, momentum=0.3) for _ in range(3)]
    check_replicas(layers, lambda seed: batch_of(dim, seed), steps=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_the_same_steps():
    layer, twin = (layer_of(2, buffer_size=2, warmup=1, momentum=0.3) for _ in range(2))
    check_compiled_steps(layer, twin, lambda seed: batch_of(2, seed))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.5}, "momentum must be a number from 0 to 1, not 1.5"),
        ({"buffer_size": 0}, "buffer_size must be a number of batches of at least 1, not 0"),
        ({"warmup": -1}, "warmup must be a number of steps of at least 0, not -1"),
    ],
)
def test_wrong_options_are_one_clear_line(options, words):
    with pytest.raises(BadInput, match=words):
        build_norm("moving_average_batch", 4, **options)


def test_the_statistics_are_those_of_as_many_batches_as_the_buffer_has():
    assert normalization_batch_size("moving_average_batch", 1) == 16
    assert normalization_batch_size("moving_average_batch", 4, buffer_size=3) == 12


# Centred weights


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv1d(3, 4, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(2, 4, 2)]
)
def test_centred_weights_sum_to_zero_for_each_output(layer):
    original = layer.weight.detach().clone()
    apply_reparam(layer, "centred_weight")
    for row, source in zip(layer.weight, original, strict=True):
        torch.testing.assert_close(row, source - source.sum() / source.numel())
    x = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    (layer.weight * x).sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    wanted = x - x.flatten(1).mean(1).view(-1, *(1,) * (x.ndim - 1))
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", ["centred_weight", "weight_standardization"])
def test_weights_of_bfloat16_are_centred_in_float32(name):
    weight = 3 + torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    layer, wide = nn.Linear(64, 4), nn.Linear(64, 4).double()
    layer.weight.data, wide.weight.data = weight.bfloat16(), weight.bfloat16().double()
    for each in (layer, wide):
        apply_reparam(each, name)
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight, wide.weight.bfloat16(), rtol=2**-7, atol=0)


def test_one_input_cannot_be_centred():
    with pytest.raises(BadInput, match="at least 2 input weights to be centred"):
        apply_reparam(nn.Linear(1, 4), "centred_weight")
