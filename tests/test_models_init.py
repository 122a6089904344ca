"""Initial weights: variances against the formulas, determinism, and what is left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bnbench.models import Slot, build_model, initialize, output_layer
from bnbench.models.init import INITS
from bnbench.registry import BadInput


def two_layers(kind: str) -> nn.Module:
    """A big hidden layer with fan_in 450 and unequal fans, and a classifier."""
    hidden: nn.Module = {
        "linear": lambda: nn.Linear(450, 300),
        "conv1d": lambda: nn.Conv1d(90, 300, 5),
        "conv2d": lambda: nn.Conv2d(50, 300, 3),
    }[kind]()
    model = nn.Sequential()
    model.add_module("hidden", hidden)
    model.add_module("norm", nn.BatchNorm1d(300))
    model.add_module("head", nn.Linear(300, 200))
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def variance(init: str, fan_in: int, fan_out: int) -> float:
    return {
        "he": 2 / fan_in,
        "xavier": 2 / (fan_in + fan_out),
        "lecun": 1 / fan_in,
        "torch": 1 / (3 * fan_in),
        "normal": 1e-4,
        "orthogonal": 1 / max(fan_in, fan_out),
    }[init]


FAN_OUT = {"linear": 300, "conv1d": 1500, "conv2d": 2700}


@pytest.mark.parametrize("scale", [1.0, 0.1, 3.0])
@pytest.mark.parametrize("kind", FAN_OUT)
@pytest.mark.parametrize("init", INITS)
def test_variance_follows_the_formula_and_the_head_is_not_scaled(init: str, kind: str, scale: float) -> None:
    model = two_layers(kind)
    initialize(model, init, scale=scale, generator=generator())
    hidden, head = model.hidden.weight.double(), model.head.weight.double()
    fan_out = 300 if init == "orthogonal" else FAN_OUT[kind]
    assert hidden.var().item() == pytest.approx(scale**2 * variance(init, 450, fan_out), rel=0.05)
    assert head.var().item() == pytest.approx(variance(init, 300, 200), rel=0.05)
    assert abs(hidden.mean().item()) < 5 * hidden.std().item() / math.sqrt(hidden.numel())
    assert not model.hidden.bias.any() and not model.head.bias.any()


@pytest.mark.parametrize("init", ["he", "xavier", "lecun", "normal"])
def test_normal_draws_are_normal_and_torchs_are_uniform(init: str) -> None:
    model = two_layers("linear")
    initialize(model, init, generator=generator())
    z = model.hidden.weight.double() / model.hidden.weight.double().std()
    assert z.pow(4).mean().item() == pytest.approx(3, rel=0.05)
    initialize(model, "torch", generator=generator())
    z = model.hidden.weight.double() / model.hidden.weight.double().std()
    assert z.pow(4).mean().item() == pytest.approx(9 / 5, rel=0.05)
    assert model.hidden.weight.abs().max() <= 1 / math.sqrt(450)


def test_torch_init_with_uniform_bias_is_what_torchs_layers_draw() -> None:
    model = two_layers("conv2d")
    initialize(model, "torch", bias="uniform", generator=generator(5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        theirs = [nn.Conv2d(50, 300, 3), nn.Linear(300, 200)]
    for ours, layer in zip((model.hidden, model.head), theirs, strict=True):
        torch.testing.assert_close(ours.weight, layer.weight)
        torch.testing.assert_close(ours.bias, layer.bias)


@pytest.mark.parametrize("kind", FAN_OUT)
def test_orthogonal_rows_are_orthonormal_times_the_scale(kind: str) -> None:
    model = two_layers(kind)
    initialize(model, "orthogonal", scale=2.0, generator=generator())
    rows = model.hidden.weight.flatten(1).double()
    torch.testing.assert_close(rows @ rows.T, 4 * torch.eye(300, dtype=torch.float64), atol=1e-4, rtol=0)


def test_bias_is_a_number_or_uniform_and_not_scaled() -> None:
    model = two_layers("linear")
    initialize(model, "he", bias=0.25, scale=3.0, generator=generator())
    assert (model.hidden.bias == 0.25).all() and (model.head.bias == 0.25).all()
    initialize(model, "he", bias="uniform", scale=3.0, generator=generator())
    assert model.hidden.bias.abs().max() <= 1 / math.sqrt(450)
    assert model.hidden.bias.std().item() == pytest.approx(1 / math.sqrt(3 * 450), rel=0.2)


@pytest.mark.parametrize("init", INITS)
def test_draws_are_repeated_by_the_seed_alone_and_differ_between_seeds(init: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models = [build_model("cnn", (1, 40), 10, Slot()) for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        initialize(model, init, bias="uniform", generator=generator(seed))
    assert torch.equal(torch.get_rng_state(), before)
    same, again, other = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_every_precision_gets_the_same_network() -> None:
    single, double = (build_model("mlp", (4,), 2, Slot()) for _ in range(2))
    double.double()
    initialize(single, "he", generator=generator())
    initialize(double, "he", generator=generator())
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert b.dtype == torch.float64
        assert torch.equal(a.double(), b)


def test_norms_are_left_alone_and_every_weight_is_drawn() -> None:
    model = build_model("resnet20", (1, 8, 8), 10, Slot(), shortcut="B")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialize(model, "he", bias=0.5, generator=generator())
    for name, value in model.state_dict().items():
        is_drawn = "conv" in name or name.startswith("head")
        assert torch.equal(value, before[name]) != is_drawn, name


def test_he_keeps_the_second_moment_of_a_deep_relu_network() -> None:
    model = build_model("mlp", (512,), 512, Slot("none"), depth=12, width=512)
    initialize(model, "he", generator=generator())
    x = torch.randn(256, 512, generator=generator(1))
    hidden = model.layers(x)
    # He et al. (2015): the mean square of what a layer puts out is that of its input.
    assert hidden.square().mean().item() == pytest.approx(1, abs=0.35)
    initialize(model, "xavier", generator=generator())
    assert model.layers(x).square().mean().item() == pytest.approx(2**-12, rel=0.35)


@pytest.mark.parametrize("reparam", ["weight_norm", "weight_standardization"])
def test_a_reparametrized_weight_is_drawn_too(reparam: str) -> None:
    plain = build_model("cnn", (1, 40), 10, Slot("batch"))
    model = build_model("cnn", (1, 40), 10, Slot("batch", reparam=reparam))
    for each in (plain, model):
        initialize(each, "he", generator=generator(2))
    assert torch.equal(output_layer(model).weight, output_layer(plain).weight)
    for ours, theirs in zip(model.layers, plain.layers, strict=True):
        expected = theirs.conv.weight
        if reparam == "weight_standardization":
            flat = expected.flatten(1)
            centred = flat - flat.mean(1, keepdim=True)
            expected = (centred / centred.square().mean(1, keepdim=True).sqrt()).reshape(expected.shape)
        torch.testing.assert_close(ours.conv.weight, expected, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_drawn_is_refused() -> None:
    model = two_layers("linear")
    with pytest.raises(BadInput, match="did you mean 'xavier'"):
        initialize(model, "xavir", generator=generator())
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(BadInput, match="positive and finite"):
            initialize(model, "he", scale=scale, generator=generator())
    with pytest.raises(BadInput, match="'zero', 'uniform' or a number"):
        initialize(model, "he", bias="none", generator=generator())
    with pytest.raises(BadInput, match=r"no nn\.Linear named 'head'"):
        initialize(nn.Sequential(nn.Linear(2, 2)), "he", generator=generator())
