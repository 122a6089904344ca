"""The contract of every registered model, with every order it offers and typical norms."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from bnbench.models import MODELS, ORDERS, Slot, build_model, describe, initialize, output_layer
from bnbench.models.base import LINEAR_MAPS
from bnbench.registry import BadInput

SHAPES = {1: (5,), 2: (1, 40), 3: (1, 8, 8)}
NORMS = ("none", "batch", "layer", "group")
NORM_TYPES = {norm: type(Slot(norm).build_norm(8, 2)) for norm in NORMS}

# Other depths of resnet20 and vgg11, by the same code: one pass of each is enough.
OTHER_DEPTHS = {"resnet8", "resnet32", "resnet44", "resnet56", "resnet110", "vgg13", "vgg16", "vgg19"}
ORDERED = [
    (name, order) for name, entry in MODELS.items() if name not in OTHER_DEPTHS for order in entry.orders
]
CASES = [
    (name, order, rank, norm)
    for name, entry in MODELS.items()
    for order in entry.orders
    for rank in entry.ranks
    for norm in (("batch",) if name in OTHER_DEPTHS else NORMS)
]


def small(name: str) -> dict[str, Any]:
    """Options that make a model cheap: 8 units or channels."""
    return {option: 8 for option in ("width", "channels") if option in MODELS[name].options}


def build(name: str, rank: int = 3, **slot: Any) -> nn.Module:
    return build_model(name, SHAPES[rank], 4, Slot(**slot), **small(name))


def drawn(name: str, rank: int = 3, **slot: Any) -> nn.Module:
    model = build(name, rank, **slot)
    initialize(model, "he", generator=torch.Generator().manual_seed(1))
    return model


def batch(rank: int) -> torch.Tensor:
    return torch.randn(6, *SHAPES[rank], generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("name", "order", "rank", "norm"), CASES)
def test_output_has_a_logit_a_class_and_gradients_reach_every_parameter(
    name: str, order: str, rank: int, norm: str
) -> None:
    model = drawn(name, rank, norm=norm, order=order, activation="gelu")
    logits = model(batch(rank))
    assert logits.shape == (6, 4)
    nn.functional.cross_entropy(logits, torch.arange(6) % 4).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("name", "order"), ORDERED)
def test_model_is_built_on_the_meta_device_with_the_same_parameters(name: str, order: str, norm: str) -> None:
    with torch.device("meta"):
        on_meta = build(name, norm=norm, order=order)
    real = build(name, norm=norm, order=order)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert {n: p.shape for n, p in on_meta.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert describe(on_meta) == describe(real)


@pytest.mark.parametrize(("name", "order"), ORDERED)
def test_a_copy_and_a_state_dict_give_the_same_logits(name: str, order: str) -> None:
    x = batch(3)
    model = drawn(name, order=order)
    model(x)
    model.eval()
    loaded = build(name, order=order).eval()
    loaded.load_state_dict(model.state_dict())
    logits = model(x)
    assert torch.equal(copy.deepcopy(model)(x), logits)
    assert torch.equal(loaded(x), logits)


@pytest.mark.parametrize(("name", "order"), ORDERED)
def test_building_is_deterministic_and_leaves_the_global_random_state(name: str, order: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = drawn(name, order=order)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    second = drawn(name, order=order)
    for (first_name, a), (second_name, b) in zip(
        first.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert first_name == second_name
        assert torch.equal(a, b)


def followers(model: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """The kind of module that runs next, in the order of execution, after each hidden linear map."""
    kinds: list[tuple[str, nn.Module]] = []
    hooks = [
        module.register_forward_hook(lambda m, _, __, name=name: kinds.append((name, m)))
        for name, module in model.named_modules()
        if not list(module.children()) and not isinstance(module, nn.Identity)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return {
        name: type(following).__name__
        for (name, module), (_, following) in itertools.pairwise(kinds)
        if isinstance(module, LINEAR_MAPS)
    }


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("name", "order"), ORDERED)
def test_a_bias_is_left_out_where_a_norm_follows(name: str, order: str, norm: str) -> None:
    with torch.device("meta"):
        model = build(name, norm=norm, order=order)
    hidden = [
        module
        for module in model.modules()
        if isinstance(module, LINEAR_MAPS) and module is not output_layer(model)
    ]
    assert {module.bias is not None for module in hidden} == {norm == "none" or order == "act-norm"}


@pytest.mark.parametrize(("name", "order"), [pair for pair in ORDERED if pair[1] in ("norm-act", "act-norm")])
def test_what_follows_each_linear_map_is_what_the_order_says(name: str, order: str) -> None:
    follows = followers(build(name, order=order), batch(3))
    expected = {"norm-act": NORM_TYPES["batch"].__name__, "act-norm": "ReLU"}[order]
    # In a residual net a projection, or the padding, runs between the second convolution and what follows.
    assert {kind for where, kind in follows.items() if "conv2" not in where and "shortcut" not in where} == {
        expected
    }


@pytest.mark.parametrize(("name", "order"), ORDERED)
def test_every_hidden_layer_has_one_norm_and_the_classifier_none(name: str, order: str) -> None:
    model = build(name, order=order)
    norms = [n for n, module in model.named_modules() if isinstance(module, NORM_TYPES["batch"])]
    hidden = [n for n, module in model.named_modules() if isinstance(module, LINEAR_MAPS) and n != "head"]
    if order != "norm-act":
        hidden = [n for n in hidden if "shortcut" not in n]
    assert len(norms) == len(hidden)
    assert isinstance(model.layers, nn.Sequential)
    assert type(output_layer(model)) is nn.Linear
    assert output_layer(model).bias is not None
    trace: list[nn.Module] = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, _, __: trace.append(m))
    logits = model(batch(3))
    assert trace[-1] is output_layer(model)
    assert logits.shape == (6, 4)


@pytest.mark.parametrize("name", sorted({name for name, _ in ORDERED} - {"mlp"}))
def test_channels_last_stays_channels_last(name: str) -> None:
    model = build_model(name, (3, 16, 16), 4, Slot(), **small(name)).to(memory_format=torch.channels_last)
    reference = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    seen: list[bool] = []
    for module in model.modules():
        if isinstance(module, LINEAR_MAPS) and module is not output_layer(model):
            module.register_forward_hook(
                lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    x = torch.randn(8, 3, 16, 16)
    logits = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, reference(x), rtol=1e-3, atol=1e-4)
    assert seen and all(seen)


@pytest.mark.parametrize(("name", "order"), ORDERED)
def test_model_can_be_stacked_and_vmapped(name: str, order: str) -> None:
    x = batch(3)
    models = [drawn(name, norm="layer", order=order).double() for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    parameters, buffers = torch.func.stack_module_state(models)
    stacked = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x.double(),)))(
        parameters, buffers
    )
    apart = torch.stack([model(x.double()) for model in models])
    torch.testing.assert_close(stacked, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(MODELS))
def test_what_a_model_does_not_offer_is_refused_in_one_line(name: str) -> None:
    entry = MODELS[name]
    refused = [{"slot": Slot(order=order)} for order in ORDERS if order not in entry.orders] + [
        {"in_shape": (1, 2, 2, 2)},
        {"in_shape": (1, 0)},
        {"in_shape": 40},
        {"in_shape": (1, 8.0)},
        {"num_classes": 0},
        {"num_classes": True},
        {"wdith": 8},
        *[{option: "none such"} for option in entry.options],
        *[{option: 0} for option in entry.options],
    ]
    for change in refused:
        arguments: dict[str, Any] = {"in_shape": (1, 8, 8), "num_classes": 3, "slot": Slot()} | change
        with pytest.raises(BadInput) as refusal:
            build_model(name, **arguments)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) > 20


def test_a_misspelt_model_or_option_is_answered_by_the_nearest() -> None:
    with pytest.raises(BadInput, match="no model named 'mpl'; did you mean 'mlp'"):
        build_model("mpl", (1, 8, 8), 2, Slot())
    with pytest.raises(BadInput, match="no option 'dept'; did you mean 'depth'"):
        build_model("mlp", (4,), 2, Slot(), dept=3)
