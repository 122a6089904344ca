"""Residual and VGG networks against published parameter counts and independent forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnbench.models import Slot, build_model, describe, initialize
from bnbench.registry import BadInput

# He et al. (2016), table 6, prints 0.27, 0.46, 0.66, 0.85 and 1.7 million; the exact numbers are those of
# github.com/akamaster/pytorch_resnet_cifar10 (shortcut A) and github.com/kuangliu/pytorch-cifar (ResNet-18).
# ResNet-8 has as much less than ResNet-20 as that has less than ResNet-32: two blocks a stage.
PUBLISHED = {
    "resnet8": 75_290,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet18": 11_173_962,
}


def count(name: str, norm: str = "batch", **options: Any) -> int:
    with torch.device("meta"):
        return describe(build_model(name, (3, 32, 32), 10, Slot(norm), **options)).total


@pytest.mark.parametrize("name", PUBLISHED)
def test_resnet_has_the_published_number_of_parameters(name: str) -> None:
    assert count(name) == PUBLISHED[name]


# Channels by layer of Simonyan & Zisserman (2015), table 1, columns A, B, D and E.
VGG_CHANNELS = {
    "vgg11": [64, 128, 256, 256, 512, 512, 512, 512],
    "vgg13": [64, 64, 128, 128, 256, 256, 512, 512, 512, 512],
    "vgg16": [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
    "vgg19": [64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512],
}


@pytest.mark.parametrize("name", VGG_CHANNELS)
def test_vgg_has_the_parameters_of_its_published_plan(name: str) -> None:
    channels = VGG_CHANNELS[name]
    weights = sum(9 * a * b for a, b in zip([3, *channels[:-1]], channels, strict=True))
    head = 512 * 10 + 10
    assert count(name) == weights + 2 * sum(channels) + head
    assert count(name, "none") == weights + sum(channels) + head


def test_vgg16_with_batch_norm_has_14_724_042_parameters() -> None:
    assert count("vgg16") == 14_724_042


def test_mlp_has_the_parameters_that_its_layers_need() -> None:
    assert count("mlp", depth=3, width=10) == (3072 * 10 + 20) + 2 * (100 + 20) + 110
    assert count("mlp", "none", depth=3, width=10) == (3072 * 10 + 10) + 2 * (100 + 10) + 110


def test_a_projection_costs_its_weights_and_its_norm() -> None:
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count("resnet20", shortcut="B") == PUBLISHED["resnet20"] + projections


def pad_shortcut(x: torch.Tensor, width: int) -> torch.Tensor:
    """Shortcut A, written out: zero maps around every second pixel of x."""
    if x.shape[1] == width:
        return x
    kept = x[:, :, ::2, ::2]
    zeros = torch.zeros(kept.shape[0], (width - x.shape[1]) // 2, *kept.shape[2:], dtype=x.dtype)
    return torch.cat([zeros, kept, zeros], dim=1)


def functional_resnet(order: str, weights: dict[str, torch.Tensor], x: torch.Tensor, n: int) -> torch.Tensor:
    """A CIFAR ResNet with batch norm and shortcut A, written out from its parameters by name."""

    def conv(at: str, value: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return F.conv2d(value, weights[f"{at}.weight"], weights.get(f"{at}.bias"), stride, padding=1)

    def bn(at: str, value: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            value, None, None, weights[f"{at}.weight"], weights[f"{at}.bias"], True, 0.1, 1e-5
        )

    pair: Callable[[str, torch.Tensor], torch.Tensor] = {
        "act-norm": lambda at, value: bn(at, F.relu(value)),
    }.get(order, lambda at, value: F.relu(bn(at, value)))

    h = conv("stem.conv", x)
    if order != "pre-act":
        h = pair("stem.norm", h)
    for i in range(3 * n):
        stride = 2 if i in (n, 2 * n) else 1
        skip = pad_shortcut(h, 16 * 2 ** (i // n))
        block = f"layers.{i}"
        r = pair(f"{block}.before.norm", h) if order == "pre-act" else h
        r = pair(f"{block}.branch.norm", conv(f"{block}.branch.conv1", r, stride))
        r = conv(f"{block}.branch.conv2", r)
        if order == "norm-act":
            h = F.relu(bn(f"{block}.branch.last_norm", r) + skip)
        elif order == "pre-act":
            h = r + skip
        else:
            h = pair(f"{block}.after.norm", r + skip)
    if order == "pre-act":
        h = pair("final.norm", h)
    return F.adaptive_avg_pool2d(h, 1)[:, :, 0, 0] @ weights["head.weight"].T + weights["head.bias"]


@pytest.mark.parametrize("order", ["norm-act", "act-norm", "pre-act", "post-add"])
def test_resnet20_equals_its_definition_in_float64(order: str) -> None:
    generator = torch.Generator().manual_seed(3)
    model = build_model("resnet20", (3, 16, 16), 10, Slot(order=order))
    initialize(model, "he", bias="uniform", generator=generator)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=generator)
    weights = dict(model.named_parameters())
    expected = functional_resnet(order, weights, x, 3)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ["norm-act", "pre-act"])
def test_projection_reads_the_input_or_in_pre_activation_blocks_what_the_branch_reads(order: str) -> None:
    model = build_model("resnet18", (1, 8, 8), 3, Slot(order=order), width=4)
    block = model.layers[2]
    x = torch.randn(4, 4, 8, 8)
    seen: dict[str, torch.Tensor] = {}
    block.shortcut.conv.register_forward_hook(lambda _, args, __: seen.update(projection=args[0]))
    block.branch.conv1.register_forward_hook(lambda _, args, __: seen.update(branch=args[0]))
    block(x)
    assert torch.equal(seen["projection"], seen["branch"])
    assert torch.equal(seen["projection"], x) == (order == "norm-act")


@pytest.mark.parametrize("in_shape", [(1, 8, 8), (1, 40), (3, 7, 9), (2, 1)])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_both_shortcuts_fit_every_size_of_input(in_shape: tuple[int, ...], shortcut: str) -> None:
    model = build_model("resnet20", in_shape, 3, Slot("none"), width=3, shortcut=shortcut)
    assert model(torch.randn(2, *in_shape)).shape == (2, 3)


@pytest.mark.parametrize("in_shape", [(1, 8, 8), (1, 40)])
def test_zero_gamma_starts_every_block_as_its_shortcut(in_shape: tuple[int, ...]) -> None:
    model = build_model("resnet20", in_shape, 3, Slot(), width=4, zero_gamma=True)
    initialize(model, "he", generator=torch.Generator().manual_seed(0))
    for block in model.layers:
        channels = block.branch.conv1.in_channels
        x = torch.randn(4, channels, *in_shape[1:]).relu()
        assert torch.equal(block(x), block.shortcut(x))
    gammas = [p for n, p in model.named_parameters() if "norm.weight" in n]
    assert sum(bool((gamma == 0).all()) for gamma in gammas) == 9
    assert all((gamma == 0).all() or (gamma == 1).all() for gamma in gammas)


def test_zero_gamma_blocks_learn() -> None:
    model = build_model("resnet20", (1, 8, 8), 3, Slot(), width=4, zero_gamma=True)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(block.branch.last_norm.weight.grad.abs().sum() > 0 for block in model.layers)


@pytest.mark.parametrize(
    "slot",
    [
        Slot("none"),
        Slot("batch", {"affine": False}),
        *[Slot(order=order) for order in ("act-norm", "pre-act", "post-add")],
    ],
)
def test_zero_gamma_is_refused_where_no_branch_ends_in_a_learned_scale(slot: Slot) -> None:
    with pytest.raises(BadInput, match="zero_gamma needs a norm"):
        build_model("resnet20", (1, 8, 8), 3, slot, zero_gamma=True)


def test_an_unknown_shortcut_is_refused() -> None:
    with pytest.raises(BadInput, match=r"shortcut cannot be 'C'\. Known: A, B"):
        build_model("resnet20", (1, 8, 8), 3, Slot(), shortcut="C")


def test_vgg_pools_to_one_pixel_and_averages_what_is_left_of_larger_images() -> None:
    for size, left in ((32, 1), (8, 1), (64, 2)):
        model = build_model("vgg11", (1, size, size), 3, Slot("none"), width=2)
        assert isinstance(model.layers, nn.Sequential)
        maps = model.layers(torch.randn(1, 1, size, size))
        assert maps.shape == (1, 16, left, left)
        torch.testing.assert_close(
            model(torch.ones(1, 1, size, size)),
            model.head(F.adaptive_avg_pool2d(model.layers(torch.ones(1, 1, size, size)), 1).flatten(1)),
        )


def test_vgg_pools_after_the_layers_of_the_published_plan() -> None:
    with torch.device("meta"):
        model = build_model("vgg16", (3, 32, 32), 10, Slot())
    pooled = [i + 1 for i, layer in enumerate(model.layers) if hasattr(layer, "pool")]
    assert pooled == [2, 4, 7, 10, 13]
    assert [layer.conv.out_channels for layer in model.layers] == VGG_CHANNELS["vgg16"]
