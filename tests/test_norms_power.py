"""Power normalization against its equations in NumPy, over several steps."""

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call, stack_module_state

from bnbench.norms import build_norm, normalization_batch_size
from bnbench.registry import BadInput
from tests.own_backward import check_compiled_steps, check_replicas

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
CHANNELS = 4


def batch_of(dim, seed, samples=6):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5
    x = torch.randn(samples, *SHAPES[dim], CHANNELS, generator=generator, dtype=torch.float64) * scale + 0.3
    return x.movedim(-1, 1).contiguous()


def layer_of(dim, **options):
    layer = build_norm("power", CHANNELS, dim, **options).double()
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([1.5, -0.5, 2.0, 1.0]))
            layer.bias.copy_(torch.tensor([0.1, 0.0, -1.0, 2.0]))
    return layer


def run_step(layer, x, g):
    """Output, gradients and ψ², ν after one training step, all as arrays."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], g)
    state = layer.running_square, layer.running_gradient
    return [tensor.detach().clone().numpy() for tensor in (y, *gradients, *state)]


class Equations:
    """Algorithm 2 of the paper, on arrays (values of a channel, C)."""

    def __init__(self, gamma, beta, share, eps):
        self.gamma, self.beta, self.share, self.eps = gamma, beta, share, eps
        self.square, self.gradient = np.ones(CHANNELS), np.zeros(CHANNELS)

    def step(self, x, dy, warm=False):
        batch_square = (x**2).mean(0)
        root = np.sqrt((batch_square if warm else self.square) + self.eps)
        z = x / root
        y = self.gamma * z + self.beta
        self.square = (1 - self.share) * self.square + self.share * batch_square
        g = dy * self.gamma
        overlap = (g * z).mean(0)
        removed = overlap if warm else self.gradient
        dx = (g - removed * z) / root
        self.gradient = self.gradient * (1 - self.share * (z**2).mean(0)) + self.share * overlap
        return y, dx, (dy * z).sum(0), dy.sum(0)


def as_rows(array):
    return np.moveaxis(np.asarray(array), 1, -1).reshape(-1, CHANNELS)


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("warmup", [0, 2])
def test_five_steps_are_those_of_the_equations(dim, warmup):
    layer = layer_of(dim, momentum=0.3, eps=0.01, warmup=warmup)
    equations = Equations(layer.weight.detach().numpy(), layer.bias.detach().numpy(), 0.3, 0.01)
    for step in range(5):
        x, g = batch_of(dim, step), batch_of(dim, 10 + step)
        *flat, square, gradient = run_step(layer, x, g)
        y, dx, dgamma, dbeta = equations.step(as_rows(x), as_rows(g), warm=step < warmup)
        for got, wanted in zip(map(as_rows, flat[:2]), (y, dx), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
        for got, wanted in zip(flat[2:], (dgamma, dbeta), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(square, equations.square, rtol=1e-12)
        np.testing.assert_allclose(gradient, equations.gradient, rtol=1e-12, atol=1e-14)
    assert np.abs(gradient).min() > 1e-3


def test_evaluation_divides_by_the_average_and_moves_nothing():
    layer = layer_of(2, eps=0.01)
    run_step(layer, batch_of(2, 0), batch_of(2, 1))
    before = copy.deepcopy(layer.state_dict())
    x = batch_of(2, 2).requires_grad_()
    shape = (1, -1, 1, 1)
    slope = layer.weight.view(shape) / (layer.running_square.view(shape) + 0.01).sqrt()
    y = layer.eval()(x)
    torch.testing.assert_close(y, slope * x + layer.bias.view(shape))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, slope.expand_as(x).detach())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_in_the_warm_up_the_gradient_is_exact():
    layer = layer_of(1, warmup=1)
    weight, bias = layer.weight.detach() + 0.1, layer.bias.detach()

    def forward(x, weight, bias):
        return functional_call(copy.deepcopy(layer), {"weight": weight, "bias": bias}, x)

    leaves = [leaf.clone().requires_grad_() for leaf in (batch_of(1, 0), weight, bias)]
    assert torch.autograd.gradcheck(forward, leaves)


def test_after_many_steps_the_gradient_is_orthogonal_to_the_output_in_the_mean():
    layer = layer_of(0, affine=False, momentum=0.02)
    overlaps = []
    for step in range(400):
        x = batch_of(0, step, samples=16)
        # A gradient with a part along x, as that of every loss that depends on the scale of x.
        y, dx, *_ = run_step(layer, x, batch_of(0, 1000 + step, samples=16) + 0.5 * x)
        if step >= 150:
            overlaps.append(((dx * y).mean(0), (0.5 * x.numpy() * y).mean(0)))
    removed, given = (np.abs(np.mean(values, axis=0)) for values in zip(*overlaps, strict=True))
    assert (removed < 0.1 * given).all()


def test_samples_do_not_see_each_other_in_either_pass():
    x, g = batch_of(2, 0), batch_of(2, 1)
    first, second = layer_of(2), layer_of(2)
    for layer in (first, second):
        run_step(layer, batch_of(2, 2), batch_of(2, 3))
    y, dx, *_ = run_step(first, x, g)
    part, part_dx, *_ = run_step(second, x[:2], g[:2])
    np.testing.assert_allclose(part, y[:2], rtol=1e-13)
    np.testing.assert_allclose(part_dx, dx[:2], rtol=1e-12, atol=1e-14)


def test_a_pass_that_is_not_derived_leaves_the_gradients_average_alone():
    layer = layer_of(0)
    with torch.no_grad():
        layer(batch_of(0, 0))
    assert torch.equal(layer.running_gradient, torch.zeros(CHANNELS, dtype=torch.float64))
    assert not torch.equal(layer.running_square, torch.ones(CHANNELS, dtype=torch.float64))


def test_two_passes_may_come_before_their_backward_passes():
    layer, inputs = layer_of(0), [batch_of(0, seed).requires_grad_() for seed in (0, 1)]
    first, second = (layer(x) for x in inputs)
    second.sum().backward()
    average = layer.running_gradient.clone()
    first.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert not torch.equal(average, layer.running_gradient)


@pytest.mark.parametrize("dim", [0, 2])
def test_replicas_under_vmap_train_as_alone(dim):
    layers = [layer_of(dim, momentum=0.3) for _ in range(3)]
    check_replicas(layers, lambda seed: batch_of(dim, seed), steps=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_the_same_steps():
    layer, twin = (layer_of(2, momentum=0.3, warmup=2) for _ in range(2))
    check_compiled_steps(layer, twin, lambda seed: batch_of(2, seed))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_replicas_have_its_backward_pass_too():
    layers = [layer_of(0, momentum=0.3) for _ in range(2)]
    skeleton, states = copy.deepcopy(layers[0]).to("meta"), [stack_module_state(layers) for _ in range(2)]

    def run(parameters, buffers, x):
        forward = lambda *state: functional_call(skeleton, state[:2], state[2])  # noqa: E731
        return torch.vmap(forward)(parameters, buffers, x)

    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager")
    for step in range(3):
        x, g = (torch.stack([batch_of(0, 7 * step + k + 50 * n) for k in range(2)]) for n in (0, 1))
        results = []
        for call, (parameters, buffers) in zip((run, compiled), states, strict=True):
            leaf = x.clone().requires_grad_()
            y = call(parameters, buffers, leaf)
            results.append([y, *torch.autograd.grad(y, [leaf, *parameters.values()], g), *buffers.values()])
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_a_momentum_that_is_none_is_refused(momentum):
    with pytest.raises(BadInput, match="momentum must be a number from 0 to 1"):
        build_norm("power", 4, momentum=momentum)


def test_a_negative_warm_up_is_refused():
    with pytest.raises(BadInput, match="warmup must be a number of steps of at least 0, not -1"):
        build_norm("power", 4, warmup=-1)


@pytest.mark.parametrize("name", ["power", "moving_average_batch", "online"])
def test_what_is_no_derivative_is_not_derived_again(name):
    x = batch_of(0, 0).requires_grad_()
    y = build_norm(name, CHANNELS, 0).double()(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_only_a_warm_up_has_statistics_of_a_batch():
    assert normalization_batch_size("power", 1) is None
    assert normalization_batch_size("power", 8, warmup=10) == 8
