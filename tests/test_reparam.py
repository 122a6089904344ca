"""Weight reparametrizations against their formulas."""

import copy

import pytest
import torch
from torch import nn

from bnbench.norms import REPARAMS, apply_reparam
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


def test_a_constant_row_is_standardized_to_zero_with_finite_gradients():
    layer = nn.Linear(6, 4)
    nn.init.ones_(layer.weight)
    apply_reparam(layer, "weight_standardization")
    layer(torch.randn(3, 6)).square().sum().backward()
    assert torch.equal(layer.weight, torch.zeros(4, 6))
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


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
