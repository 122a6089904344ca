"""Weight reparametrizations against their formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnbench.models import Slot, build_model, initialize
from bnbench.norms import REPARAMS, apply_reparam
from bnbench.norms.reparam import activation_gain, data_dependent_init, scale_weight
from bnbench.registry import BadInput

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(3, 4, 3),
    "conv2d": lambda: nn.Conv2d(3, 4, 3, bias=False),
    "grouped": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
}


def layer_of(kind):
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return LAYERS[kind]().double()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", REPARAMS)
def test_every_reparametrization_trains_copies_and_loads(name, kind):
    layer = layer_of(kind)
    assert apply_reparam(layer, name) is layer
    layer.weight.square().mul(
        torch.linspace(0, 1, layer.weight.numel()).view_as(layer.weight)
    ).sum().backward()
    weights = [parameter for key, parameter in layer.named_parameters() if key.startswith("parametrizations")]
    assert weights
    assert all(weight.grad.isfinite().all() and weight.grad.abs().sum() > 0 for weight in weights)
    loaded = apply_reparam(LAYERS[kind]().double(), name)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.weight, layer.weight)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


@pytest.mark.parametrize("name", REPARAMS)
def test_a_weight_may_be_assigned_after(name):
    layer, other = apply_reparam(layer_of("linear"), name), layer_of("linear")
    with torch.no_grad():
        layer.weight = 2 * other.weight + 1
        other.weight.mul_(2).add_(1)
    torch.testing.assert_close(layer.weight, apply_reparam(other, name).weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_norm_splits_length_and_direction(kind):
    layer, plain = layer_of(kind), layer_of(kind)
    apply_reparam(layer, "weight_norm")
    torch.testing.assert_close(layer.weight, plain.weight)
    lengths, directions = (parameter for key, parameter in layer.named_parameters() if "original" in key)
    torch.testing.assert_close(lengths.flatten(), plain.weight.flatten(1).norm(dim=1))
    with torch.no_grad():
        lengths.mul_(3)
        directions.mul_(7)
    torch.testing.assert_close(layer.weight, 3 * plain.weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_standardization_is_its_formula(kind):
    layer, plain = layer_of(kind), layer_of(kind)
    apply_reparam(layer, "weight_standardization", eps=1e-3)
    for row, original in zip(layer.weight, plain.weight, strict=True):
        mean = original.sum() / original.numel()
        variance = (original - mean).square().sum() / original.numel()
        torch.testing.assert_close(row, (original - mean) / (variance + 1e-3) ** 0.5)


@pytest.mark.parametrize("name", ["weight_standardization", "scaled_weight_standardization"])
def test_a_constant_row_is_standardized_to_zero_with_finite_gradients(name):
    layer = nn.Linear(6, 4)
    nn.init.ones_(layer.weight)
    apply_reparam(layer, name)
    layer(torch.randn(3, 6)).square().sum().backward()
    assert torch.equal(layer.weight, torch.zeros(4, 6))
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_scaled_weight_standardization_is_its_formula(kind):
    layer, plain = layer_of(kind), layer_of(kind)
    # The third output has so little variance that the bound takes its place.
    for each in (layer, plain):
        each.weight.data[2] = 0.3 + 1e-4 * torch.linspace(0, 1, each.weight[2].numel()).view_as(
            each.weight[2]
        )
    apply_reparam(layer, "scaled_weight_standardization")
    gain = torch.tensor([1.0, 0.5, 2.0, -3.0], dtype=torch.float64)
    layer.parametrizations.weight.original1.data.copy_(gain)
    for row, original, own in zip(layer.weight, plain.weight, gain, strict=True):
        values = original.detach().flatten().tolist()
        mean = math.fsum(values) / len(values)
        spread = math.fsum((value - mean) ** 2 for value in values)
        expected = [
            own * math.sqrt(2 / (1 - 1 / math.pi)) * (v - mean) / math.sqrt(max(spread, 1e-4)) for v in values
        ]
        torch.testing.assert_close(row.flatten(), torch.stack(expected))


def test_gains_of_activations_are_those_of_the_normal_distribution():
    assert activation_gain("identity") == 1
    # E[max(z, 0)²] = 1/2 and E[max(z, 0)] = 1/√(2π).
    assert activation_gain("relu") == pytest.approx((0.5 - 1 / (2 * math.pi)) ** -0.5, rel=1e-14)
    z, weights = np.polynomial.hermite_e.hermegauss(150)
    weights /= math.sqrt(2 * math.pi)
    erf = np.array([math.erf(value / math.sqrt(2)) for value in z])
    for name, values in {
        "tanh": np.tanh(z),
        "sigmoid": 1 / (1 + np.exp(-z)),
        "gelu": z * (1 + erf) / 2,
    }.items():
        variance = weights @ values**2 - (weights @ values) ** 2
        assert activation_gain(name) == pytest.approx(variance**-0.5, rel=1e-9)
    # What the authors' code has, from samples.
    for name, estimate in {"relu": 1.713959, "tanh": 1.593912, "sigmoid": 4.803835, "gelu": 1.701504}.items():
        assert activation_gain(name) == pytest.approx(estimate, rel=2e-3)


@pytest.mark.parametrize("activation", ["relu", "identity", "tanh", "sigmoid", "gelu"])
def test_scaled_weights_keep_the_variance_of_activations(activation):
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 400, generator=draw)
    layer = nn.Linear(400, 300)
    nn.init.normal_(layer.weight, 0.2, 3.0, generator=draw)
    apply_reparam(layer, "scaled_weight_standardization", activation=activation)
    nn.init.zeros_(layer.bias)
    out = layer(getattr(F, activation, getattr(torch, activation, lambda x: x))(z))
    assert out.var().item() == pytest.approx(1, rel=0.03)
    # Rows without a mean leave no mean in the outputs, beside that of the sampled inputs.
    assert out.mean(0).abs().max().item() < 0.3


def test_scaled_weights_keep_the_signal_over_a_deep_net_without_a_norm():
    model = build_model(
        "mlp", (256,), 5, Slot("none", reparam="scaled_weight_standardization"), depth=20, width=256
    )
    initialize(model, "normal", generator=torch.Generator().manual_seed(0))
    h = torch.randn(500, 256, generator=torch.Generator().manual_seed(1))
    variances = []
    for layer in model.layers:
        variances.append(layer[0](h).var().item())
        h = layer(h)
    # The first layer reads data, which no ReLU has halved.
    assert variances[0] == pytest.approx(activation_gain("relu") ** 2, rel=0.1)
    assert variances[-1] == pytest.approx(variances[0], rel=0.35)


def test_weights_that_are_assigned_put_the_gain_back():
    layer = apply_reparam(layer_of("linear"), "scaled_weight_standardization")
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(7)
        layer.weight = layer_of("linear").weight.detach()
    torch.testing.assert_close(layer.weight.detach(), before)


def test_scaled_weights_of_bfloat16_are_standardized_in_float32():
    layer = apply_reparam(layer_of("conv2d").float(), "scaled_weight_standardization").bfloat16()
    wide = apply_reparam(layer_of("conv2d").float(), "scaled_weight_standardization")
    with torch.no_grad():
        wide.weight = layer.parametrizations.weight.original0.float()
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight, wide.weight.bfloat16())


@pytest.mark.parametrize("name", ["none", "weight_norm", "scaled_weight_standardization"])
@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_a_weight_is_scaled_whatever_it_is_computed_from(name, factor):
    layer = layer_of("conv2d")
    if name != "none":
        apply_reparam(layer, name)
    before = layer.weight.detach().clone()
    scale_weight(layer, factor)
    torch.testing.assert_close(layer.weight.detach(), factor * before)
    layer(torch.randn(2, 3, 5, 5, dtype=torch.float64)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_a_standardized_weight_cannot_be_scaled():
    layer = apply_reparam(nn.Linear(6, 4), "weight_standardization")
    with pytest.raises(BadInput, match="its reparametrization fixes the size of its weight"):
        scale_weight(layer, 0.5)


def test_a_data_dependent_start_gives_every_layer_mean_zero_and_variance_one():
    model = build_model("cnn", (3, 10, 10), 4, Slot("none", reparam="weight_norm"), depth=3, channels=6)
    initialize(model, "he", bias="uniform", generator=torch.Generator().manual_seed(0))
    model.double()
    x = 5 + torch.randn(20, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    directions = [layer.conv.parametrizations.weight.original1.detach().clone() for layer in model.layers]
    seen = []
    for layer in model.layers:
        layer.conv.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    data_dependent_init(model, x)
    seen.clear()
    model(x)
    assert len(seen) == 3
    for outputs, layer, direction in zip(seen, model.layers, directions, strict=True):
        flat = outputs.transpose(0, 1).flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.zeros(6, dtype=torch.float64), atol=1e-10, rtol=0)
        torch.testing.assert_close(flat.square().mean(1), torch.ones(6, dtype=torch.float64))
        assert torch.equal(layer.conv.parametrizations.weight.original1, direction)


def test_a_data_dependent_start_is_the_papers_for_one_linear_layer():
    layer, x = layer_of("linear"), torch.randn(9, 6, dtype=torch.float64)
    t = x @ (layer.weight / layer.weight.norm(dim=1, keepdim=True)).T
    apply_reparam(layer, "weight_norm")
    data_dependent_init(nn.Sequential(layer), x)
    std = t.std(0, correction=0)
    torch.testing.assert_close(layer.parametrizations.weight.original0.flatten(), 1 / std)
    torch.testing.assert_close(layer.bias, -t.mean(0) / std)


def test_a_data_dependent_start_says_what_it_lacks():
    with pytest.raises(BadInput, match="no layer of the model is reparametrized by 'weight_norm'"):
        data_dependent_init(nn.Linear(6, 4), torch.randn(8, 6))
    layer = apply_reparam(nn.Linear(6, 4), "weight_norm")
    with pytest.raises(BadInput, match="an output is the same over all of x"):
        data_dependent_init(layer, torch.randn(1, 6))
    assert not layer._forward_hooks


@pytest.mark.parametrize(
    ("layer", "name", "options", "words"),
    [
        (
            nn.Linear(6, 4),
            "weight_nrom",
            {},
            "no reparametrization named 'weight_nrom'; did you mean 'weight_norm'?",
        ),
        (nn.Linear(6, 4), "weight_norm", {"eps": 1e-3}, "'weight_norm' has no option 'eps'"),
        (nn.Linear(6, 4), "weight_standardization", {"eps": "a"}, "eps must be float, not 'a'"),
        (nn.Linear(6, 4), "weight_standardization", {"eps": 0.0}, "eps must be a positive number"),
        (nn.Linear(1, 4), "weight_standardization", {}, "at least 2 input weights"),
        (nn.Linear(1, 4), "scaled_weight_standardization", {}, "at least 2 input weights"),
        (nn.Linear(6, 4), "scaled_weight_standardization", {"eps": -1.0}, "eps must be a positive number"),
        (
            nn.Linear(6, 4),
            "scaled_weight_standardization",
            {"activation": "rleu"},
            "activation cannot be 'rleu'; did you mean 'relu'?",
        ),
        (nn.BatchNorm1d(4), "weight_norm", {}, "takes a Linear or Conv layer, not BatchNorm1d"),
        (nn.ConvTranspose2d(3, 4, 3), "weight_norm", {}, "not ConvTranspose2d"),
        (nn.LazyLinear(4), "weight_norm", {}, "has a shape"),
        (
            apply_reparam(nn.Linear(6, 4), "weight_norm"),
            "weight_standardization",
            {},
            "reparametrized already",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(layer, name, options, words):
    with pytest.raises(BadInput) as caught:
        apply_reparam(layer, name, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
