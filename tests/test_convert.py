"""Norms swapped in models that exist: what is kept, what must agree, what is refused, and the way back."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnbench.models import Slot, build_model
from bnbench.norms import (
    NORMS,
    NormEntry,
    build_norm,
    convert_norm,
    fold_norm,
    freeze_norm,
    norm_names,
    recalibrate,
    revert,
)
from bnbench.norms.surgery.convert import OverLastAxis
from bnbench.norms.surgery.handover import compare
from bnbench.norms.surgery.layers import Site
from bnbench.registry import BadInput

PAGE = (Path(__file__).parent.parent / "docs" / "convert.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
#: They compute in evaluation what batch normalization does, with its state.
RELATED = ("batch", "sync_batch", "frozen_batch", "ghost_batch", "batch_renorm", "noisy_batch")


def images(samples=6, seed=0, channels=3, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, channels, size, size, generator=generator) * 2 + 1


class Bottleneck(nn.Module):
    """A residual block with the layout and the names of torchvision's."""

    def __init__(self, inputs, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, 2 * width, 1, stride, bias=False), nn.BatchNorm2d(2 * width)
        )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def residual_network():
    """Two blocks in evaluation mode, whose norms have statistics, γ and β that are not those of a start."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        blocks = [Bottleneck(3, 4), Bottleneck(8, 4, stride=2)]
        model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    with torch.no_grad():
        for seed in range(3):
            model(images(seed=seed))
    return model.eval()


def layer_with_statistics(dim=2, **options):
    layer = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim](6, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for values in (layer.weight, layer.bias, layer.running_mean):
            values.copy_(torch.randn(6, generator=generator))
        layer.running_var.copy_(torch.rand(6, generator=generator) + 0.5)
        layer.num_batches_tracked.fill_(7)
    return layer


def plain_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", RELATED)
def test_a_relative_of_batch_norm_leaves_the_outputs_as_they_are_and_reverts(name):
    model, x = residual_network(), images(seed=9)
    before, state = model(x), copy.deepcopy(model.state_dict())
    conversion = convert_norm(model, name)
    assert conversion.model is model and not plain_norms(model)
    assert len(conversion.changed) == 8 and conversion.left == ()
    torch.testing.assert_close(model(x), before)
    assert conversion.max_difference is not None and conversion.max_difference < 1e-6
    back = revert(conversion)
    assert back.model is model and len(plain_norms(model)) == len(back.changed) == 8
    torch.testing.assert_close(model(x), before)
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        # batch_renorm keeps the root of the variance.
        torch.testing.assert_close(value, state[key], msg=key)


@pytest.mark.parametrize("name", norm_names())
def test_every_norm_can_stand_in_and_learn(name):
    model = residual_network().train()
    model[0].conv1.requires_grad_(False)
    conversion = convert_norm(model, name, **({"ghost_size": 2} if name == "ghost_batch" else {}))
    assert {change.after for change in conversion.changed} == {name}
    assert "8 changed, 0 left" in str(conversion)
    assert all(module.training for module in model.modules())
    output = model(images(seed=9))
    assert torch.isfinite(output).all()
    output.square().sum().backward()
    assert model[0].conv1.weight.grad is None and model[0].conv2.weight.grad is not None
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_changed_model_has_the_statistics_of_its_old_layer_in_float64():
    """Against the formula: what batch_renorm keeps is √(var + eps)."""
    layer = layer_with_statistics(eps=0.1).double()
    new = convert_norm(layer, "batch_renorm").model
    torch.testing.assert_close(new.running_std, (layer.running_var + 0.1).sqrt())
    assert new.eps == 0.1 and torch.equal(new.running_mean, layer.running_mean)
    back = revert(new, example=torch.zeros(2, 6, 3, 3, dtype=torch.float64)).model
    torch.testing.assert_close(back.running_var, layer.running_var)
    assert int(back.num_batches_tracked) == 7


def test_a_batch_norm_with_a_mean_far_from_zero_agrees_too():
    layer = layer_with_statistics()
    layer.running_mean.fill_(1e4)
    x = torch.randn(5, 6, 4, 4) + 1e4
    before = layer.eval()(x)
    for name in RELATED:
        new = convert_norm(copy.deepcopy(layer), name).model
        torch.testing.assert_close(new(x), before, rtol=1e-3, atol=1e-3)


def test_parameters_stay_the_same_objects_so_that_an_optimizer_goes_on():
    model = residual_network()
    before = dict(model.named_parameters())
    convert_norm(model, "sync_batch")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(dict(model.named_parameters())) == list(before)


def test_what_did_not_learn_does_not_learn_and_constants_become_parameters_on_the_way_back():
    layer = layer_with_statistics().requires_grad_(False)
    assert not any(p.requires_grad for p in convert_norm(layer, "batch_instance").model.parameters())
    layer = layer_with_statistics()
    conversion = convert_norm(layer, "frozen_batch")
    assert list(conversion.model.parameters()) == []
    # A copy: an optimizer that still has the old parameter must not move the constant.
    with torch.no_grad():
        layer.weight.add_(1)
    assert not torch.equal(conversion.model.weight, layer.weight)
    back = revert(conversion).model
    assert type(back) is nn.BatchNorm2d and all(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_type_and_mode_are_those_of_the_old_layer(dtype):
    layer = layer_with_statistics().to(dtype).eval()
    for name in ("ghost_batch", "batch_renorm", "switchable", "group"):
        new = convert_norm(copy.deepcopy(layer), name).model
        assert not new.training
        tensors = [*new.parameters(), *new.buffers()]
        assert {t.dtype for t in tensors if t.is_floating_point()} == {dtype}
        assert new(torch.ones(2, 6, 4, 4, dtype=dtype)).dtype == dtype


def test_eps_and_momentum_go_along_where_they_mean_the_same_and_given_ones_count():
    layer = layer_with_statistics(eps=1e-3, momentum=0.01)
    new = convert_norm(copy.deepcopy(layer), "ghost_batch", ghost_size=4).model
    assert (new.eps, new.momentum, new.ghost_size) == (1e-3, 0.01, 4)
    changed = convert_norm(copy.deepcopy(layer), "sync_batch", eps=0.5)
    assert (changed.model.eps, changed.max_difference) == (0.5, None)
    assert convert_norm(copy.deepcopy(layer), "rms").model.eps == 1e-6
    without_momentum = layer_with_statistics(momentum=None)
    assert convert_norm(copy.deepcopy(without_momentum), "batch").model.momentum is None
    assert convert_norm(without_momentum, "frozen_batch").model.momentum == 0.1
    assert convert_norm(nn.GroupNorm(3, 6), "batch_channel").model.num_groups == 3


def test_a_fixed_scale_that_was_asked_for_is_not_overwritten():
    conversion = convert_norm(layer_with_statistics(), "batch", gamma=0.5, learn_gamma=False)
    assert torch.equal(conversion.model.weight, torch.full((6,), 0.5))
    assert "weight" in conversion.changed[0].new and conversion.max_difference is None


def test_a_layer_without_scale_stays_without():
    assert convert_norm(nn.BatchNorm2d(6, affine=False), "group").model.weight is None
    assert convert_norm(nn.InstanceNorm2d(6), "batch").model.weight is None


@pytest.mark.parametrize(
    ("layer", "name", "shape"),
    [
        (nn.GroupNorm(3, 6, eps=0.1), "group", (4, 6, 3, 3)),
        (nn.InstanceNorm1d(6, affine=True, eps=0.1), "instance", (4, 6, 5)),
        (nn.InstanceNorm3d(6), "instance", (4, 6, 3, 2, 2)),
        (nn.LayerNorm(6, eps=0.1), "layer", (4, 5, 3, 6)),
        (nn.LayerNorm(6, bias=False), "layer", (4, 6)),
        (nn.RMSNorm(6), "rms", (4, 5, 6)),
        (nn.SyncBatchNorm(6), "batch", (4, 6, 5)),
    ],
    ids=str,
)
def test_the_same_layer_of_torch_computes_the_same(layer, name, shape):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape) + 1
    layer.eval()
    conversion = convert_norm(copy.deepcopy(layer), name)
    torch.testing.assert_close(conversion.model(x), layer(x))
    assert conversion.max_difference is not None


def test_a_norm_over_the_last_axis_becomes_one_over_the_channels_there():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU())
    conversion = convert_norm(model, "batch")
    assert conversion.changed[0].after == "batch over the last axis"
    x = torch.randn(7, 4, 5)
    hidden = model[0](x)
    wanted = F.batch_norm(hidden.reshape(-1, 6), None, None, training=True).reshape(7, 4, 6)
    torch.testing.assert_close(model[1](hidden), wanted)
    # An example shows where the last axis is axis 1.
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6))
    assert not isinstance(convert_norm(model, "batch", example=torch.zeros(2, 5)).model[1], OverLastAxis)


def test_a_norm_over_the_only_other_axis_becomes_the_same_one_of_ours():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6, eps=0.1)).eval()
    x = torch.randn(7, 5)
    before = model(x)
    conversion = convert_norm(model, "layer", example=x)
    assert conversion.max_difference is not None
    assert not isinstance(model[1], OverLastAxis)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("learns", [True, False])
def test_a_norm_of_another_package_need_not_say_how_many_channels_it_has(learns, monkeypatch):
    class Halve(nn.Module):
        def __init__(self, num_features, dim=2):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(num_features)) if learns else None

        def forward(self, x):
            return x / 2 if self.weight is None else x / 2 * self.weight.view(-1, *(1,) * (x.ndim - 2))

    monkeypatch.setattr(NORMS, "_entries", dict(NORMS._entries))
    NORMS.add("halve", NormEntry(**{**vars(NORMS["none"]), "name": "halve", "layer": Halve}))
    model = nn.Sequential(nn.Linear(5, 6), build_norm("halve", 6, 0)).eval()
    x = torch.randn(7, 5)
    if not learns:
        with pytest.raises(BadInput, match="Halve does not say how many channels it has"):
            convert_norm(model, "layer")
        return
    before = model(x)
    assert fold_norm(copy.deepcopy(model), x).folded
    assert [change.kept for change in convert_norm(model, "rms", example=x).changed] == [("weight",)]
    assert not torch.equal(model(x), before)


def test_a_shared_layer_stays_one():
    shared, other = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    block = nn.Sequential(nn.Linear(6, 6), other)
    model = nn.Sequential(shared, block, shared, block)
    conversion = convert_norm(model, "ghost_batch", ghost_size=2)
    assert model[0] is model[2] and model[1] is model[3]
    assert type(model[0]) is type(build_norm("ghost_batch", 6)) is type(block[1])
    assert [change.path for change in conversion.changed] == ["0, 2", "1.1, 3.1"]
    revert(conversion)
    assert model[0] is model[2] and type(model[0]) is type(block[1]) is nn.BatchNorm1d


def test_what_is_left_is_said_and_why():
    inside = nn.TransformerEncoderLayer(6, 2, 6, batch_first=True)
    model = nn.ModuleDict(
        {
            "lazy": nn.LazyBatchNorm2d(),
            "axes": nn.LayerNorm((6, 3)),
            "skipped": nn.Sequential(nn.BatchNorm1d(6)),
            "response": nn.LocalResponseNorm(3),
            "same": build_norm("group", 6),
            "kernel": inside,
            "nothing": build_norm("none", 6),
            "taken": nn.BatchNorm1d(6),
            "linear": nn.Linear(6, 6),
        }
    )
    conversion = convert_norm(model, "group", skip=["skipped"])
    reasons = {left.path: left.reason for left in conversion.left}
    assert [change.path for change in conversion.changed] == ["taken"]
    for path, words in {
        "lazy": "no shape yet",
        "axes": "several axes",
        "skipped.0": "skipped",
        "response": "does not know",
        "same": "group already",
        "kernel.norm1": "TransformerEncoderLayer",
        "kernel.norm2": "TransformerEncoderLayer",
        "nothing": "how many channels",
    }.items():
        assert words in reasons.pop(path)
    assert reasons == {}
    assert "1 changed, 8 left" in str(conversion) and "left axes (LayerNorm): " in str(conversion)
    skipping = convert_norm(residual_network(), "group", skip=lambda path, layer: not path.endswith("bn1"))
    assert [change.path for change in skipping.changed] == ["0.bn1", "1.bn1"]


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm with an activation inside, as in timm."""

    def forward(self, x):
        return super().forward(x).relu()


class InPlaceABN(nn.Module):
    """A norm with an activation inside that inherits from no norm."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x):
        return F.leaky_relu(F.batch_norm(x, self.running_mean, self.running_var))


@pytest.mark.parametrize("fused", [BatchNormAct2d(6), InPlaceABN()], ids=lambda f: type(f).__name__)
def test_a_class_that_may_do_more_is_refused_by_name_and_nothing_has_changed(fused):
    model = nn.Sequential(nn.BatchNorm2d(6), nn.Sequential(fused))
    before = list(model.modules())
    with pytest.raises(
        BadInput, match=rf"1\.0 is a .*{type(fused).__name__}, which may do more than normalize"
    ):
        convert_norm(model, "group")
    assert all(one is other for one, other in zip(model.modules(), before, strict=True))
    assert [change.path for change in convert_norm(model, "group", skip="1").changed] == ["0"]
    assert model[1][0] is fused
    assert "may do more" in revert(model).left[-1].reason


def test_the_frozen_layer_of_torchvision_is_known_by_its_name():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-5
            for name, value in layer_with_statistics().state_dict().items():
                if name != "num_batches_tracked":
                    self.register_buffer(name, value)

        def forward(self, x):
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    FrozenBatchNorm2d.__module__, FrozenBatchNorm2d.__qualname__ = "torchvision.ops.misc", "FrozenBatchNorm2d"
    x, layer = images(channels=6), FrozenBatchNorm2d()
    for name in ("frozen_batch", "batch"):
        torch.testing.assert_close(convert_norm(layer, name).model.eval()(x), layer(x))
    back = revert(layer, example=x).model
    assert type(back) is nn.BatchNorm2d
    torch.testing.assert_close(back.eval()(x), layer(x))


def test_hooks_and_parametrizations_are_not_lost_in_silence():
    hooked = nn.BatchNorm1d(6)
    handle = hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(BadInput, match="0 has hooks, which would be lost"):
        convert_norm(nn.Sequential(hooked), "group")
    handle.remove()
    frozen = nn.Sequential(nn.BatchNorm1d(6))
    freeze_norm(frozen)
    with pytest.raises(BadInput, match="unfreeze_norm"):
        convert_norm(frozen, "group")
    bounded = nn.BatchNorm1d(6)
    nn.utils.parametrize.register_parametrization(bounded, "weight", nn.Softplus())
    with pytest.raises(BadInput, match="parametrizations"):
        convert_norm(bounded, "group")


@pytest.mark.parametrize(
    ("make", "name", "options", "words"),
    [
        (lambda: nn.BatchNorm1d(6), "bach", {}, "no norm named 'bach'; did you mean 'batch'"),
        (lambda: nn.BatchNorm1d(6), "ghost_batch", {"size": 2}, "no option 'size'"),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(6)),
            "group",
            {"num_groups": 4},
            "0: norm 'group': num_groups=4",
        ),
        (lambda: nn.BatchNorm1d(6, device="meta"), "batch", {}, "meta device"),
        (lambda: nn.Sequential(nn.BatchNorm1d(6)), "batch", {"skip": ["1"]}, "has no module '1'. Known: 0"),
        (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm1d(6))), "batch", {}, "scripted"),
    ],
    ids=["name", "option", "value", "meta", "skip", "script"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_bad_input_is_refused_in_one_line(make, name, options, words):
    with pytest.raises(BadInput, match=re.escape(words)) as caught:
        convert_norm(make(), name, **options)
    assert "\n" not in str(caught.value)


def test_a_function_that_changes_where_it_must_not_is_noticed():
    wrong = copy.deepcopy(layer_with_statistics().eval())
    with torch.no_grad():
        wrong.running_var.mul_(1.001)
    with pytest.raises(BadInput, match="evaluation must stay the same"):
        compare(Site(layer_with_statistics().eval(), ["0"]), wrong)
    wrong.running_var.fill_(float("nan"))
    with pytest.raises(BadInput, match="nan"):
        compare(Site(layer_with_statistics().eval(), ["0"]), wrong)


def test_reverting_needs_to_know_the_class():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), build_norm("sync_batch", 6), nn.Flatten(), nn.LazyLinear(4))
    model(images())
    model.append(build_norm("ghost_batch", 4, 0, ghost_size=2)).append(build_norm("group", 4, 0))
    with pytest.raises(BadInput, match="1: nothing tells whether BatchNorm1d, 2d or 3d"):
        revert(model)
    assert not plain_norms(model)
    conversion = revert(model, example=images())
    assert [type(model[place]) for place in (1, 4)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert [left.path for left in conversion.left] == ["5"]


def test_a_conversion_does_not_tell_the_class_of_what_was_no_batch_norm():
    conversion = convert_norm(nn.Sequential(nn.BatchNorm1d(6), nn.GroupNorm(2, 6)), "batch")
    with pytest.raises(BadInput, match=r"^1: nothing tells .* this one was no batch norm of torch$"):
        revert(conversion)
    reverted = revert(conversion, example=torch.zeros(2, 6, 3)).model
    assert [type(layer) for layer in reverted] == [nn.BatchNorm1d, nn.BatchNorm1d]


@pytest.mark.parametrize("name", ["mlp", "resnet20"])
def test_our_own_models_convert_as_if_built_so(name):
    shape = (1, 8, 8)
    options = {"width": 8} if name == "mlp" else {}
    model = build_model(name, shape, 10, Slot(norm="batch"), **options)
    built = build_model(name, shape, 10, Slot(norm="group"), **options)
    conversion = convert_norm(model, "group", example=torch.zeros(2, *shape))
    assert len(conversion.changed) == (len([m for m in built.modules() if type(m).__name__ == "GroupNorm"]))
    assert str(model) == str(built) and list(model.state_dict()) == list(built.state_dict())


@pytest.mark.parametrize("name", ["batch_renorm", "l1_batch", "example_weighted_batch"])
def test_recalibration_sets_a_converted_model(name):
    model = residual_network()
    conversion = convert_norm(model, name)
    fresh = "running_scale" in str(conversion)
    assert fresh == (name == "l1_batch") == any("recalibrate" in note for note in conversion.notes)
    batches = [images(samples=16, seed=seed) for seed in range(20, 23)]
    recalibrate(model, batches)
    hidden = model[0].conv1(torch.cat(batches))
    torch.testing.assert_close(model[0].bn1.running_mean, hidden.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_converted_model_can_be_copied_and_pickled():
    model = residual_network()
    convert_norm(model, "batch_renorm")
    x = images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_a_norm_that_is_an_activation_too_is_reported():
    assert any(
        "activations behind it" in note for note in convert_norm(residual_network(), "evonorm_s0").notes
    )
    assert convert_norm(nn.Linear(2, 2), "evonorm_s0").notes == ()


def test_converting_draws_no_random_numbers_and_keeps_the_old_layers_modes():
    model = residual_network()
    model[0].bn2.train()
    before = torch.get_rng_state()
    convert_norm(model, "group", example=images())
    assert torch.equal(torch.get_rng_state(), before)
    assert model[0].bn2.training and not model[0].bn1.training


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timms_models_convert_or_are_refused_by_name():
    import timm

    model = timm.create_model("resnet18").eval()
    assert convert_norm(model, "frozen_batch").max_difference == 0
    with pytest.raises(BadInput, match="BatchNormAct2d"):
        convert_norm(timm.create_model("efficientnet_b0"), "group")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_each_piece_of_code_on_the_page_runs(snippet, capsys):
    found: dict[str, object] = {}
    exec(compile(snippet, "page", "exec"), found)
    assert capsys.readouterr().out or "print" not in snippet
