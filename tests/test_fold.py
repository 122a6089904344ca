"""Norms folded into the maps before them: the same outputs, by formula, and only where that is right."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from bnbench.models import MODELS, Slot, build_model
from bnbench.norms import apply_reparam, build_norm, convert_norm, fold_norm, freeze_norm, norm_names
from bnbench.registry import BadInput
from tests.test_convert import BatchNormAct2d, images, residual_network

#: Their evaluation, once trained, is a fixed scale and shift of each channel.
AFFINE = ("batch", "ghost_batch", "sync_batch", "frozen_batch", "batch_renorm", "noisy_batch", "l1_batch")
AFFINE += ("range_batch", "mean_only_batch", "variance_only_batch", "power", "moving_average_batch")
CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, groups=2, padding="same"), 1),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, padding_mode="circular"), 2),
    (nn.Conv2d(6, 6, (3, 1), groups=6, bias=False), 2),
    (nn.Conv3d(4, 6, 2), 3),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), 1),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, bias=False), 2),
    (nn.ConvTranspose3d(4, 6, 2, groups=2), 3),
]


def trained(layer, seed=0):
    """A batch norm of torch with any statistics, γ and β."""
    generator = torch.Generator().manual_seed(seed)
    channels = layer.num_features
    with torch.no_grad():
        for values in (layer.weight, layer.bias, layer.running_mean):
            values.copy_(torch.randn(channels, generator=generator))
        layer.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return layer.eval()


def batch_norm(dim, channels=6):
    return trained((nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim](channels))


@pytest.mark.parametrize(("conv", "dim"), CONVOLUTIONS, ids=[str(conv) for conv, _ in CONVOLUTIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_kind_of_convolution_gives_the_same_outputs(conv, dim, dtype):
    model = nn.Sequential(copy.deepcopy(conv), batch_norm(dim)).to(dtype).eval()
    x = torch.randn(3, conv.in_channels, *(7,) * dim, dtype=dtype)
    wanted = model(x)
    folding = fold_norm(model, x)
    assert type(model[0]) is type(conv) and type(model[1]) is nn.Identity
    assert [(fold.map, fold.norm) for fold in folding.folded] == [("0", "1")] and folding.left == ()
    torch.testing.assert_close(model(x), wanted)
    assert model[0].weight.dtype == dtype and folding.found_by == "tracing"


def test_the_folded_weights_are_those_of_the_formula():
    linear, norm = nn.Linear(5, 6).double(), batch_norm(0).double()
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight, bias = slope[:, None] * linear.weight, slope * (linear.bias - norm.running_mean) + norm.bias
    model = nn.Sequential(linear, norm)
    fold_norm(model)
    torch.testing.assert_close(model[0].weight, weight)
    torch.testing.assert_close(model[0].bias, bias)
    assert isinstance(model[0].weight, nn.Parameter) and isinstance(model[0].bias, nn.Parameter)


@pytest.mark.parametrize("name", AFFINE)
def test_every_norm_that_scales_and_shifts_in_evaluation_is_folded(name):
    options = {"ghost_size": 3} if name == "ghost_batch" else {}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), build_norm(name, 8, **options), nn.ReLU())
    for seed in range(3):
        model(images(seed=seed)).square().sum().backward()
    x = images(seed=9)
    wanted = model.eval()(x)
    assert len(fold_norm(model, x).folded) == 1
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted({*norm_names()} - {*AFFINE, "none", "batch_instance"}))
def test_every_other_norm_is_left_or_gives_the_same_outputs(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), build_norm(name, 8))
    for seed in range(2):
        model(images(seed=seed)).square().sum().backward()
    x = images(seed=9)
    wanted = model.eval()(x)
    folding = fold_norm(model, x)
    assert folding.folded == () and "not a fixed scale and shift" in folding.left[0].reason
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "weight_standardization"])
def test_a_parametrized_weight_is_folded_as_it_is_in_evaluation(name):
    linear = nn.Linear(5, 6)
    if name == "weight_standardization":
        apply_reparam(linear, name)
    else:
        {"weight_norm": weight_norm, "spectral_norm": spectral_norm}[name](linear)
    model = nn.Sequential(linear, batch_norm(0)).eval()
    x = torch.randn(4, 5)
    wanted = model(x)
    fold_norm(model, x)
    assert type(model[0]) is nn.Linear and list(model.state_dict()) == ["0.weight", "0.bias"]
    torch.testing.assert_close(model(x), wanted)
    # The old map, which others may hold, is as it was.
    assert nn.utils.parametrize.is_parametrized(linear)
    assert torch.isfinite(linear(x)).all()


@pytest.mark.parametrize("name", ["mlp", "resnet20", "cnn"])
def test_our_own_models_fold_wholly(name):
    shape = (1, 8, 8)
    model = build_model(name, shape, 10, Slot(norm="batch"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for seed in range(2):
        model(images(seed=seed, channels=1))
    x = images(seed=9, channels=1)
    wanted = model.eval()(x)
    folding = fold_norm(model, x)
    assert folding.left == () and len(folding.folded) > 1 and name in MODELS
    torch.testing.assert_close(model(x), wanted, rtol=1e-3, atol=1e-3 * float(wanted.detach().abs().max()))
    assert not [module for module in model.modules() if hasattr(module, "running_mean")]


def test_a_residual_network_folds_in_any_dress():
    x = images(seed=9)
    for name in (None, "batch_renorm", "frozen_batch"):
        model = residual_network()
        wanted = model(x)
        if name is not None:
            convert_norm(model, name)
        folding = fold_norm(model, x)
        assert len(folding.folded) == 8 and folding.difference is not None and folding.difference < 1e-5
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert "0.bn1           0.conv1" in str(folding) and "8 folded, 0 left" in str(folding)


class Reading(nn.Module):
    """Maps that a norm follows directly, but not alone, not plainly or not at all, and one that is right."""

    def __init__(self):
        super().__init__()
        self.both, self.both_norm = nn.Linear(6, 6), batch_norm(0)
        self.first_norm, self.after = batch_norm(0), nn.Linear(6, 6)
        self.twice, self.norm_once = nn.Linear(6, 6), batch_norm(0)
        self.fusing, self.fused = nn.Conv2d(1, 6, 1), BatchNormAct2d(6)
        self.tied, self.tied_norm = nn.Linear(6, 6), batch_norm(0)
        self.hooked, self.hooked_norm = nn.Linear(6, 6), batch_norm(0)
        self.hooked.register_forward_hook(lambda module, inputs, output: output * 2)
        self.alone, self.alone_norm = nn.Linear(6, 6), batch_norm(0)

    def forward(self, x):
        y = self.both(x)
        x = self.both_norm(y) + y
        x = self.after(self.first_norm(x.relu()))
        x = self.norm_once(self.twice(self.twice(x)))
        x = x + self.fused(self.fusing(x[:, None, None])).sum((2, 3))
        x = self.tied_norm(self.tied(x)) @ self.tied.weight
        x = self.hooked_norm(self.hooked(x))
        return self.alone_norm(self.alone(x))


@pytest.mark.parametrize("with_example", [True, False])
def test_only_a_norm_that_alone_reads_its_map_is_folded(with_example):
    model = Reading().eval()
    x = torch.randn(5, 6)
    wanted = model(x)
    folding = fold_norm(model, x if with_example else None)
    assert [(fold.map, fold.norm) for fold in folding.folded] == [("alone", "alone_norm")]
    reasons = {left.path: left.reason for left in folding.left}
    for path in ("both_norm", "first_norm", "norm_once", "tied_norm"):
        assert "no linear map comes directly before it and feeds it alone" in reasons.pop(path)
    assert "may do more" in reasons.pop("fused") and "hooks" in reasons.pop("hooked_norm")
    assert reasons == {}
    torch.testing.assert_close(model(x), wanted)


class Untraceable(nn.Module):
    """A model whose forward looks at values; `peek` also reads a map's output past the Sequential."""

    def __init__(self, peek=False):
        super().__init__()
        shared = nn.Linear(6, 6)
        self.body = nn.Sequential(nn.Linear(5, 6), batch_norm(0), nn.ReLU(), shared, batch_norm(0), shared)
        self.peek = peek

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        y = self.body(x)
        return y + self.body[0](x) if self.peek else y


def test_without_tracing_the_order_in_sequential_counts_and_an_example_is_needed():
    model, x = Untraceable().eval(), torch.randn(4, 5)
    wanted = model(x)
    with pytest.raises(BadInput, match=r"cannot trace this Untraceable .*give an example"):
        fold_norm(model)
    folding = fold_norm(model, x)
    assert folding.found_by == "order in Sequential"
    assert [fold.norm for fold in folding.folded] == ["body.1"]
    assert [left.path for left in folding.left] == ["body.4"]
    torch.testing.assert_close(model(x), wanted)


def test_a_result_that_differs_is_noticed_and_the_model_put_back():
    model, x = Untraceable(peek=True).eval(), torch.randn(4, 5)
    wanted, modules = model(x), list(model.modules())
    with pytest.raises(BadInput, match="output for the example differs"):
        fold_norm(model, x)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(x), wanted)


def test_a_linear_map_over_another_axis_than_the_norms_is_noticed_by_the_example():
    model, x = nn.Sequential(nn.Linear(6, 6), batch_norm(0)).eval(), torch.randn(4, 6, 6)
    wanted = model(x)
    with pytest.raises(BadInput, match="output for the example differs"):
        fold_norm(model, x)
    assert torch.equal(model(x), wanted)


def test_training_mode_is_refused_and_a_frozen_norm_folds():
    model = nn.Sequential(nn.Linear(5, 6), batch_norm(0))
    with pytest.raises(BadInput, match=r"1 is in training mode.*model\.eval"):
        fold_norm(model.train())
    freeze_norm(model)
    x = torch.randn(4, 5)
    wanted = model.eval()(x)
    assert len(fold_norm(model, x).folded) == 1
    torch.testing.assert_close(model(x), wanted)


def test_means_far_from_zero_cost_no_more_than_they_cost_the_norm():
    linear, norm = nn.Linear(5, 6), batch_norm(0)
    with torch.no_grad():
        linear.bias.fill_(1e4)
        norm.running_mean.fill_(1e4)
    model, x = nn.Sequential(linear, norm), torch.randn(64, 5)
    exact = copy.deepcopy(model).double()(x.double())
    error = (model(x) - exact).abs().max()
    fold_norm(model)
    assert (model(x) - exact).abs().max() <= error


def test_parameters_that_do_not_learn_and_memory_formats_stay():
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    model = nn.Sequential(conv, batch_norm(2)).eval()
    fold_norm(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_outputs_of_several_parts_are_compared():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 6), batch_norm(0))

        def forward(self, x, scale):
            y = self.body(x * scale)
            return {"y": y, "more": [F.relu(y), (y > 0)]}

    model = Two().eval()
    folding = fold_norm(model, (torch.randn(4, 5), torch.tensor(2.0)))
    assert len(folding.folded) == 1 and 0 < folding.difference < 1e-5


def test_a_norm_that_is_no_map_of_a_channel_is_left_in_a_network_without_positions():
    model = build_model("mlp", (1, 8), 10, Slot("switchable")).eval()
    x = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(0))
    before = model(x)
    folding = fold_norm(model, x)
    assert not folding.folded
    torch.testing.assert_close(model(x), before)
