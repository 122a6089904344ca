"""What the slot puts where: dropout, replaced activations, reparametrized weights, parameter counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from bnbench.models import MODELS, ModelEntry, Slot, build_model, describe, norm_scales
from bnbench.norms import NORMS
from bnbench.registry import BadInput

CHAINS = ("mlp", "cnn", "vgg11")


def trace(model: nn.Module, in_shape: tuple[int, ...] = (1, 8, 8)) -> list[str]:
    """Names of the leaf modules in the order in which they run."""
    names: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _, __, ___, name=name: names.append(name.rpartition(".")[2]))
        for name, module in model.named_modules()
        if not list(module.children()) and not isinstance(module, nn.Identity)
    ]
    model(torch.randn(4, *in_shape))
    for hook in hooks:
        hook.remove()
    return [name for name in names if name != "pool"]


def model_with(name: str, **slot: Any) -> nn.Module:
    options = {"depth": 3} if name in ("mlp", "cnn") else {"width": 4}
    return build_model(name, (1, 8, 8), 3, Slot(dropout=0.5, **slot), **options)


@pytest.mark.parametrize("name", CHAINS)
def test_dropout_everywhere_follows_every_hidden_layer(name: str) -> None:
    for order, pair in (("norm-act", ["norm", "activation"]), ("act-norm", ["activation", "norm"])):
        names = trace(model_with(name, order=order))
        linear, depth = names[0], (8 if name == "vgg11" else 3)
        assert names == [linear, *pair, "dropout"] * depth + ["head"]


@pytest.mark.parametrize("name", CHAINS)
def test_last_dropout_stands_directly_before_the_classifier(name: str) -> None:
    names = trace(model_with(name, dropout_at="last"))
    assert names.count("dropout") == 1
    assert names[-2:] == ["dropout", "head"]


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", CHAINS)
def test_dropout_before_the_norm_follows_the_linear_map_or_the_activation(name: str, norm: str) -> None:
    names = trace(model_with(name, norm=norm, dropout_at="before-norm"))
    ran = ["norm"] if "norm" in names else []
    linear, depth = names[0], (8 if name == "vgg11" else 3)
    assert names == [linear, "dropout", *ran, "activation"] * depth + ["head"]
    names = trace(model_with(name, norm=norm, order="act-norm", dropout_at="before-norm"))
    assert names == [linear, "activation", "dropout", *ran] * depth + ["head"]


@pytest.mark.parametrize("order", MODELS["resnet20"].orders)
def test_residual_dropout_is_between_the_convolutions_and_before_the_classifier(order: str) -> None:
    model = model_with("resnet20", order=order)
    places = [n for n, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert places == [f"layers.{i}.branch.dropout" for i in range(9)] + ["dropout"]
    for block in model.layers:
        names = [name for name, _ in block.branch.named_children()]
        assert names.index("dropout") == names.index("conv2") - 1
    last = model_with("resnet20", order=order, dropout_at="last")
    assert [n for n, module in last.named_modules() if isinstance(module, nn.Dropout)] == ["dropout"]


@pytest.mark.parametrize("order", MODELS["resnet20"].orders)
def test_residual_dropout_before_the_norm_is_beside_every_norm(order: str) -> None:
    names = trace(model_with("resnet20", order=order, dropout_at="before-norm"))
    norms = [i for i, name in enumerate(names) if name.endswith("norm")]
    assert len(norms) == 19
    assert all(names[i - 1].endswith("dropout") for i in norms)
    assert sum(name.endswith("dropout") for name in names) == 19


def test_dropout_is_off_in_evaluation_and_absent_at_zero() -> None:
    model = model_with("mlp", norm="none").eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    assert not any(isinstance(m, nn.Dropout) for m in build_model("mlp", (4,), 2, Slot()).modules())


@pytest.mark.parametrize(
    ("activation", "kind"),
    [("relu", nn.ReLU), ("sigmoid", nn.Sigmoid), ("tanh", nn.Tanh), ("gelu", nn.GELU)],
)
def test_activation_is_the_one_that_was_asked_for(activation: str, kind: type[nn.Module]) -> None:
    model = build_model("mlp", (4,), 2, Slot(activation=activation), depth=3)
    activations = [layer.activation for layer in model.layers]
    assert [type(each) for each in activations] == [kind] * 3


def test_a_norm_that_replaces_the_activation_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dataclasses.replace(NORMS["batch"], replaces_activation=True)
    monkeypatch.setitem(NORMS._entries, "batch", entry)
    for order in ("norm-act", "act-norm"):
        names = trace(build_model("cnn", (1, 8, 8), 3, Slot(order=order), depth=2))
        assert names == ["conv", "norm", "conv", "norm", "head"]
        model = build_model("cnn", (1, 8, 8), 3, Slot(order=order), depth=2)
        assert all(layer.conv.bias is None for layer in model.layers)


def test_a_norm_that_neither_centres_nor_shifts_leaves_the_bias() -> None:
    biases = {
        norm: build_model("mlp", (4,), 2, Slot(norm, options), depth=1).layers[0].linear.bias is not None
        for norm, options in (("rms", {}), ("batch", {"affine": False}), ("layer", {}), ("none", {}))
    }
    assert biases == {"rms": True, "batch": False, "layer": False, "none": True}


@pytest.mark.parametrize("name", [*CHAINS, "resnet20"])
def test_reparametrization_reaches_every_hidden_weight_and_not_the_classifier(name: str) -> None:
    options = {"width": 4} if name.startswith(("vgg", "res")) else {}
    model = build_model(name, (1, 8, 8), 3, Slot(reparam="weight_norm"), **options)
    is_parametrized = {
        n: nn.utils.parametrize.is_parametrized(module)
        for n, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    assert is_parametrized.pop("head") is False
    assert is_parametrized and all(is_parametrized.values())


def test_describe_counts_weights_biases_and_the_rest() -> None:
    plain = describe(build_model("mlp", (6,), 3, Slot("batch"), depth=2, width=5))
    assert (plain.weights, plain.biases, plain.norm, plain.total) == (6 * 5 + 25 + 15, 3, 20, 93)
    none = describe(build_model("mlp", (6,), 3, Slot("none"), depth=2, width=5))
    assert (none.weights, none.biases, none.norm) == (70, 13, 0)
    weight_norm = describe(build_model("mlp", (6,), 3, Slot("none", reparam="weight_norm"), depth=2, width=5))
    assert (weight_norm.weights, weight_norm.biases, weight_norm.norm) == (70 + 10, 13, 0)


#: The last norm of each model and order, by name.
LAST_NORMS = {
    ("mlp", "norm-act"): "layers.2.norm",
    ("cnn", "act-norm"): "layers.2.norm",
    ("vgg11", "norm-act"): "layers.7.norm",
    ("resnet20", "norm-act"): "layers.8.branch.last_norm",
    ("resnet20", "act-norm"): "layers.8.after.norm",
    ("resnet20", "pre-act"): "final.norm",
    ("resnet20", "post-add"): "layers.8.after.norm",
    ("resnet18", "norm-act"): "layers.7.branch.last_norm",
}


@pytest.mark.parametrize(("name", "order"), LAST_NORMS)
def test_last_norm_options_change_the_last_norm_and_no_other(name: str, order: str) -> None:
    model = model_with(
        name, order=order, norm_options={"gamma_init": 0.5}, last_norm_options={"gamma_init": 3.0}
    )
    scales = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if n.endswith("norm.weight")}
    changed = {n for n, scale in scales.items() if bool((scale == 3.0).all())}
    assert changed == {LAST_NORMS[name, order]}
    assert all(bool((scale == 0.5).all()) for n, scale in scales.items() if n not in changed)
    # It is the norm that runs last, behind which nothing is normalized.
    ran: list[str] = []
    for n, module in model.named_modules():
        if n in scales:
            module.register_forward_hook(lambda _, __, ___, n=n: ran.append(n))
    model(torch.randn(4, 1, 8, 8))
    assert ran[-1] == LAST_NORMS[name, order]
    assert len(ran) == len(scales)


def test_a_last_layer_keeps_its_bias_where_its_own_norm_leaves_it_alive() -> None:
    def biases(name: str, **slot: Any) -> list[bool]:
        model = model_with(name, norm="layer", **slot)
        return [m.bias is not None for n, m in model.named_modules() if n.endswith(("linear", "conv2"))]

    for name, count in (("mlp", 3), ("resnet20", 9)):
        bare = {"last_norm_options": {"affine": False}}
        assert biases(name) == [False] * count
        assert biases(name, **bare) == [False] * (count - 1) + [True]
        shifted = {"norm_options": {"affine": False}, "last_norm_options": {"affine": True}}
        assert biases(name, **shifted) == [True] * (count - 1) + [False]


def test_a_model_that_calls_no_norm_its_last_takes_no_options_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(in_shape: tuple[int, ...], num_classes: int, slot: Slot) -> nn.Module:
        return nn.Sequential(slot.build_norm(in_shape[0], 0), nn.Linear(in_shape[0], num_classes))

    monkeypatch.setitem(MODELS._entries, "bare", ModelEntry("bare", build, ("norm-act",), (1,), "", {}))
    build_model("bare", (4,), 2, Slot())
    with pytest.raises(BadInput, match="model 'bare' has no last norm for last_norm_options") as refusal:
        build_model("bare", (4,), 2, Slot(last_norm_options={"gamma_init": 2.0}))
    assert "\n" not in str(refusal.value)


def test_scales_of_norms_are_found_whether_learned_or_fixed() -> None:
    slot = Slot(
        "batch", {"gamma": 2.0, "learn_gamma": False}, last_norm_options={"gamma": None, "learn_gamma": True}
    )
    scales = norm_scales(build_model("cnn", (1, 8, 8), 3, slot))
    assert [(scale.requires_grad, scale[0].item()) for scale in scales] == [(False, 2.0)] * 2 + [(True, 1.0)]
    assert norm_scales(build_model("cnn", (1, 8, 8), 3, Slot("none"))) == []
    assert norm_scales(build_model("cnn", (1, 8, 8), 3, Slot("batch", {"affine": False}))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "bach"}, "did you mean 'batch'"),
        ({"order": "norm-atc"}, "did you mean 'norm-act'"),
        ({"activation": "rleu"}, "did you mean 'relu'"),
        ({"dropout_at": "lst"}, "did you mean 'last'"),
        ({"dropout": 1.0}, r"\[0, 1\), not 1.0"),
        ({"dropout": -0.1}, r"\[0, 1\)"),
        ({"dropout": "0.5"}, r"\[0, 1\), not '0.5'"),
        ({"dropout": float("nan")}, r"\[0, 1\)"),
        ({"reparam": "weight_nrm"}, "did you mean 'weight_norm'"),
    ],
)
def test_a_slot_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Slot(**change)


def test_a_norms_bad_option_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(BadInput):
        build_model("cnn", (1, 8, 8), 3, Slot("group", {"num_groups": 7}))


def test_cnn_maps_are_halved_while_they_are_at_least_8_wide() -> None:
    sizes = {}
    for in_shape in ((1, 40), (1, 8, 8), (3, 32, 32), (1, 3)):
        model = build_model("cnn", in_shape, 10, Slot("none"), depth=4)
        x, seen = torch.randn(1, *in_shape), []
        for layer in model.layers:
            x = layer(x)
            seen.append(x.shape[-1])
        sizes[in_shape] = seen
    assert sizes == {
        (1, 40): [40, 20, 10, 5],
        (1, 8, 8): [8, 4, 4, 4],
        (3, 32, 32): [32, 16, 8, 4],
        (1, 3): [3, 3, 3, 3],
    }
