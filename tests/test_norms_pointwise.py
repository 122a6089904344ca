"""Filter response and local response normalization, and the point-wise functions in a norm's place."""

import math

import pytest
import torch
from torch import nn

from bnbench.models import Slot
from bnbench.norms import build_norm
from bnbench.registry import BadInput

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
each_dim = pytest.mark.parametrize("dim", SHAPES)
each_spatial_dim = pytest.mark.parametrize("dim", [1, 2, 3])


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
    return torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()], allow_unused=True)


# Filter response


def filtered(layer, x, eps):
    outputs = []
    for sample in x:
        for c, values in enumerate(sample):
            y = layer.weight[c] * values / ((values**2).mean() + eps) ** 0.5 + layer.bias[c]
            outputs.append(torch.where(y > layer.tau[c], y, layer.tau[c]))
    return torch.stack(outputs).view_as(x)


@each_spatial_dim
def test_filter_response_is_the_formula_with_its_threshold(dim):
    layer = with_random_parameters(build_norm("filter_response", 8, dim, learn_eps=False))
    x = batch_of(dim).requires_grad_()
    y, wanted = layer(x), filtered(layer, x, 1e-6)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradients(y, x, layer), gradients(wanted, x, layer))
    assert (y == layer.tau.view(8, *(1,) * dim)).any()  # the threshold cuts something off


@each_spatial_dim
def test_filter_response_learns_eps_where_there_is_one_position(dim):
    layer = with_random_parameters(build_norm("filter_response", 8, dim))
    x = batch_of(0).view(6, 8, *(1,) * dim).requires_grad_()
    y, wanted = layer(x), filtered(layer, x, 1e-6 + layer.learned_eps.abs())
    torch.testing.assert_close(y, wanted)
    ours = gradients(y, x, layer)
    torch.testing.assert_close(ours, gradients(wanted, x, layer))
    assert ours[-1].abs() > 1e-3


def test_filter_response_with_positions_has_eps_alone_and_a_gradient_of_zero_for_the_learned_one():
    layer, x = build_norm("filter_response", 8, 2).double(), batch_of(2)
    assert float(layer.learned_eps.detach()) == pytest.approx(1e-4)
    before = layer(x)
    before.sum().backward()
    assert torch.equal(layer.learned_eps.grad, torch.zeros(1, dtype=torch.float64))
    with torch.no_grad():
        layer.learned_eps.fill_(5.0)
    assert torch.equal(layer(x), before)


def test_filter_response_without_a_learned_eps_is_the_sign_of_one_position():
    layer, x = build_norm("filter_response", 8, 2, learn_eps=False).double(), batch_of(0)[..., None, None]
    torch.testing.assert_close(layer(x), (x.sign() + 1) / 2, rtol=0, atol=1e-3)


def test_filter_response_starts_as_a_rectifier_and_no_activation_follows():
    layer, x = build_norm("filter_response", 8, 2).double(), batch_of(2)
    assert torch.equal(layer(x) == 0, x <= 0)
    assert not any(
        isinstance(part, nn.ReLU) for part in Slot(norm="filter_response").build_pair(8, 2).modules()
    )


def test_filter_response_without_an_affine_map_keeps_its_threshold():
    layer = build_norm("filter_response", 8, affine=False, learn_eps=False)
    assert [name for name, _ in layer.named_parameters()] == ["tau"]
    torch.testing.assert_close(
        layer.double()(batch_of(2)), build_norm("filter_response", 8).double()(batch_of(2))
    )
    with pytest.raises(BadInput, match="norm 'filter_response': it needs spatial axes, and dim=0 has none"):
        build_norm("filter_response", 8, 0)


# Dynamic tanh and erf

FUNCTIONS = {"dynamic_tanh": math.tanh, "dynamic_erf": math.erf}
SLOPES = {  # derivatives
    "dynamic_tanh": lambda z: 1 / math.cosh(z) ** 2,
    "dynamic_erf": lambda z: 2 / math.sqrt(math.pi) * math.exp(-(z**2)),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_dim
@each_function
def test_a_point_wise_layer_is_its_function_at_every_value(name, dim):
    layer, x = with_random_parameters(build_norm(name, 8, dim)), batch_of(dim).requires_grad_()
    alpha, shift = float(layer.alpha.detach()), float(getattr(layer, "shift", torch.zeros(1)).detach())
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        z, channel = alpha * float(x[tuple(place)].detach()) + shift, place[1]
        weight, bias = float(layer.weight[channel].detach()), float(layer.bias[channel].detach())
        assert float(y[tuple(place)].detach()) == pytest.approx(weight * FUNCTIONS[name](z) + bias, abs=1e-12)
        slope = weight * alpha * SLOPES[name](z)
        assert float(gradient[tuple(place)]) == pytest.approx(slope, abs=1e-12)


@each_function
def test_a_point_wise_layer_learns_a_scalar_and_starts_at_a_half(name):
    layer = build_norm(name, 8)
    start = {key: value.detach().unique().tolist() for key, value in layer.named_parameters()}
    assert start == {"weight": [1.0], "bias": [0.0], "alpha": [0.5]} | (
        {"shift": [0.0]} if name == "dynamic_erf" else {}
    )
    assert layer.alpha.numel() == 1
    assert float(build_norm(name, 8, alpha_init=2).alpha.detach()) == 2.0
    assert build_norm(name, 8, affine=False).weight is None
    assert isinstance(Slot(norm=name).build_activation(), nn.ReLU)


@each_function
def test_a_point_wise_layer_saturates(name):
    layer = build_norm(name, 8, 0)
    x = torch.tensor([[1e4], [-1e4]]).expand(2, 8).requires_grad_()
    y = layer(x)
    assert torch.equal(y, x.sign())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros(2, 8))


# Local response


@each_spatial_dim
@pytest.mark.parametrize("size", [1, 4, 5, 20])
def test_local_response_is_that_of_torch_with_a_sum_for_the_mean(dim, size):
    ours = build_norm("local_response", 8, dim, size=size, alpha=0.5, beta=0.6, k=1.5)
    torchs, x = nn.LocalResponseNorm(size, 0.5 * size, 0.6, 1.5), batch_of(dim).requires_grad_()
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(gradients(ours(x), x, ours), gradients(torchs(x), x, torchs))


def test_local_response_has_the_numbers_of_alexnet():
    x = batch_of(0)
    y = build_norm("local_response", 8, 0)(x)
    for n in range(len(x)):
        for c in range(8):
            energy = sum(float(x[n, j]) ** 2 for j in range(max(0, c - 2), min(7, c + 2) + 1))
            assert float(y[n, c]) == pytest.approx(float(x[n, c]) / (2 + 1e-4 * energy) ** 0.75, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size, the number of channels in a sum, must be 1 or more, not 0"),
        ({"k": 0.0}, "k must be above 0"),
        ({"alpha": -1.0}, "alpha and beta at least 0"),
        ({"beta": float("nan")}, "alpha and beta at least 0"),
    ],
)
def test_what_local_response_cannot_be_is_one_clear_line(options, words):
    with pytest.raises(BadInput, match=words):
        build_norm("local_response", 8, **options)
