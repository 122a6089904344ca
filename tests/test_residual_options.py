"""Residual options of the ResNets: Fixup, SkipInit and ReZero against their definitions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnbench.data import Arrays, step_indices
from bnbench.engine.fleet import FleetClassifier, can_fleet
from bnbench.engine.rows import classifier_of, module_arguments
from bnbench.lit import NormClassifier
from bnbench.models import Slot, build_model, describe, initialize
from bnbench.models.residual import Multiplier, Shift
from bnbench.registry import BadInput
from bnbench.study.trial import Trial
from tests.test_models_resnet import pad_shortcut

OPTIONS = ("fixup", "skip_init", "rezero")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(
    residual: str,
    slot: Slot = Slot("none"),  # noqa: B008 (it is frozen)
    name: str = "resnet8",
    in_shape: tuple[int, ...] = (3, 8, 8),
    width: int = 4,
    **options: object,
) -> nn.Module:
    model = build_model(name, in_shape, 5, slot, width=width, residual=residual, **options)
    initialize(model, "he", generator=generator())
    return model


def expected_logits(
    weights: dict[str, torch.Tensor], x: torch.Tensor, residual: str, order: str, normed: bool
) -> torch.Tensor:
    """The forward pass of a ResNet-8, written out over its parameters by name."""

    def conv(at: str, value: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return F.conv2d(value, weights[f"{at}.weight"], weights.get(f"{at}.bias"), stride, padding=1)

    def shift(at: str, value: torch.Tensor) -> torch.Tensor:
        return value + weights[f"{at}.bias"].item() if residual == "fixup" else value

    def bn(at: str, value: torch.Tensor) -> torch.Tensor:
        if not normed:
            return value
        return F.batch_norm(value, None, None, weights[f"{at}.weight"], weights[f"{at}.bias"], True)

    def activate(at: str, value: torch.Tensor) -> torch.Tensor:
        return F.relu(shift(f"{at}.activation_shift", bn(f"{at}.norm", value)))

    h = conv("stem.conv", x)
    if order == "norm-act":
        h = activate("stem", h)
    for i in range(3):
        block, skip = f"layers.{i}", pad_shortcut(h, 4 * 2**i)
        r = activate(f"{block}.before", h) if order == "pre-act" else h
        r = conv(f"{block}.branch.conv1", shift(f"{block}.before.shift", r), 1 if i == 0 else 2)
        r = activate(f"{block}.branch", r)
        r = conv(f"{block}.branch.conv2", shift(f"{block}.branch.conv2_shift", r))
        r = bn(f"{block}.branch.last_norm", r) if order == "norm-act" else r
        r = F.relu(r) if order == "norm-act" and residual == "rezero" else r
        r = shift(f"{block}.branch.shift", weights[f"{block}.branch.multiplier.alpha"].item() * r)
        h = F.relu(skip + r) if order == "norm-act" and residual != "rezero" else skip + r
    h = activate("final", h) if order == "pre-act" else h
    return shift("dropout.shift", h.mean((2, 3))) @ weights["head.weight"].T + weights["head.bias"]


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("order", ["norm-act", "pre-act"])
@pytest.mark.parametrize("residual", OPTIONS)
def test_a_network_equals_its_definition_in_float64(residual: str, order: str, norm: str) -> None:
    model = model_of(residual, Slot(norm, order=order)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(parameter.numel())))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator(1))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = expected_logits(weights, x, residual, order, norm == "batch")
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("order", ["norm-act", "pre-act"])
@pytest.mark.parametrize("residual", OPTIONS)
def test_every_block_starts_as_its_shortcut(residual: str, order: str, norm: str) -> None:
    model = model_of(residual, Slot(norm, order=order))
    for block in model.layers:
        x = torch.randn(4, block.branch.conv1.in_channels, 8, 8, generator=generator(1)).relu()
        assert torch.equal(block(x), block.shortcut(x))


@pytest.mark.parametrize("order", ["norm-act", "act-norm"])
def test_rezero_has_nothing_behind_the_addition_and_skip_init_has(order: str) -> None:
    x = torch.randn(4, 4, 8, 8, generator=generator(1))
    slot = Slot("none", order=order)
    assert torch.equal(model_of("rezero", slot).layers[0](x), x)
    assert torch.equal(model_of("skip_init", slot).layers[0](x), x.relu())


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_fixup_scales_what_plain_draws(shortcut: str) -> None:
    plain, fixup = (
        model_of(each, name="resnet20", width=16, shortcut=shortcut) for each in ("plain", "fixup")
    )
    drawn = []
    for ours, theirs in zip(fixup.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.branch.conv1.weight, theirs.branch.conv1.weight / 3)
        assert not ours.branch.conv2.weight.any()
        drawn.append(ours.branch.conv1.weight.flatten() * math.sqrt(9 * ours.branch.conv1.in_channels / 2))
    assert torch.cat(drawn).std().item() == pytest.approx(9**-0.5, rel=0.01)
    assert torch.equal(fixup.stem.conv.weight, plain.stem.conv.weight)
    if shortcut == "B":
        assert torch.equal(fixup.layers[3].shortcut.conv.weight, plain.layers[3].shortcut.conv.weight)
    assert not fixup.head.weight.any() and not fixup.head.bias.any()


def test_fixup_starts_there_after_every_initialization() -> None:
    model = build_model("resnet8", (3, 8, 8), 5, Slot("none"), width=4, residual="fixup")
    for init in ("xavier", "orthogonal"):
        initialize(model, init, bias=0.5, generator=generator())
        assert not model(torch.randn(2, 3, 8, 8)).any()
        assert all(block.branch.conv1.weight.any() for block in model.layers)


def test_fixup_has_the_scalars_of_the_authors_network_and_no_other_biases() -> None:
    plain, fixup = (describe(model_of(each, name="resnet20")) for each in ("plain", "fixup"))
    assert fixup.weights == plain.weights
    assert fixup.biases == 5
    assert fixup.norm == 9 * (4 + 1) + 2


@pytest.mark.parametrize("reparam", ["weight_norm", "scaled_weight_standardization"])
def test_fixup_scales_reparametrized_weights(reparam: str) -> None:
    slot = Slot("none", reparam=reparam)
    plain, fixup = (model_of(each, slot) for each in ("plain", "fixup"))
    initialize(fixup, "he", generator=generator())  # a second time
    for ours, theirs in zip(fixup.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.branch.conv1.weight, theirs.branch.conv1.weight * 3**-0.5)
        assert not ours.branch.conv2.weight.any()
    fixup(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in fixup.parameters())


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("residual", OPTIONS)
def test_everything_learns_after_a_few_steps(residual: str, norm: str) -> None:
    model = model_of(residual, Slot(norm))
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(20, 3, 8, 8, generator=generator(1)), torch.arange(20) % 5
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


def second_moments(model: nn.Module, x: torch.Tensor) -> list[float]:
    """The mean square of what the stem and each block put out."""
    hidden, moments = model.stem(x), []
    for block in [nn.Identity(), *model.layers]:
        hidden = block(hidden)
        moments.append(hidden.square().mean().item())
    return moments


@torch.no_grad()
def growth_of_a_block(residual: str, alpha: float) -> float:
    """By how much a block without a norm multiplies the mean square, on average over drawn weights."""
    x = torch.randn(2, 3, 32, 32, generator=generator(1))
    found = []
    for seed in range(8):
        model = build_model(
            "resnet8", x.shape[1:], 5, Slot(order="pre-act", norm="none"), width=32, residual=residual
        )
        initialize(model, "he", generator=generator(seed))
        for module in model.modules():
            if isinstance(module, Multiplier):
                module.alpha.fill_(alpha)
        stem, first, *_ = second_moments(model, x)
        found.append(first / stem)
    return sum(found) / len(found)


def test_without_a_norm_a_plain_block_doubles_the_signal_and_alpha_damps_it() -> None:
    # De & Smith (2020), section 3: He's weights give a branch the second moment of its input.
    assert growth_of_a_block("plain", 1.0) == pytest.approx(2, rel=0.1)
    assert growth_of_a_block("skip_init", 0.5) == pytest.approx(1.25, rel=0.1)


@torch.no_grad()
def test_skip_init_keeps_the_signal_over_a_deep_net_that_explodes_without() -> None:
    x, slot = torch.randn(2, 3, 8, 8, generator=generator(1)), Slot("none", order="pre-act")
    plain, kept = (second_moments(model_of(each, slot, "resnet56"), x) for each in ("plain", "skip_init"))
    assert plain[9] > 10 * plain[0]
    assert kept[:10] == [kept[0]] * 10


def change_of_logits(name: str) -> float:
    """How far the outputs of a Fixup network move in three steps of SGD without momentum."""
    model = model_of("fixup", name=name)
    x, y = torch.randn(20, 3, 8, 8, generator=generator(1)), torch.arange(20) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model(x).abs().mean().item()


def test_an_update_of_fixup_changes_the_outputs_alike_at_every_depth() -> None:
    shallow, deep = change_of_logits("resnet8"), change_of_logits("resnet56")
    assert shallow > 0
    assert 1 / 3 < deep / shallow < 3


@pytest.mark.parametrize(
    ("residual", "slot", "options", "words"),
    [
        *[(each, Slot(), {"zero_gamma": True}, f"zero_gamma beside residual '{each}'") for each in OPTIONS],
        ("rezero", Slot(order="post-add"), {}, "residual 'rezero' has nothing behind the addition"),
        ("fixup", Slot(reparam="weight_standardization"), {}, "'weight_standardization' fixes their size"),
        ("skipinit", Slot(), {}, "residual cannot be 'skipinit'; did you mean 'skip_init'?"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(residual, slot, options, words) -> None:
    with pytest.raises(BadInput) as refusal:
        build_model("resnet8", (3, 8, 8), 5, slot, width=4, residual=residual, **options)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg11"])
def test_models_without_branches_have_no_such_option(name: str) -> None:
    with pytest.raises(BadInput, match="has no option 'residual'"):
        build_model(name, (3, 8, 8), 5, Slot(), residual="fixup")


@pytest.mark.parametrize(
    ("residual", "order"),
    [
        (residual, order)
        for residual in OPTIONS
        for order in ("norm-act", "act-norm", "pre-act", "post-add")
        if (residual, order) != ("rezero", "post-add")
    ],
)
def test_every_order_and_norm_combines(residual: str, order: str) -> None:
    for norm in ("layer", "ghost_batch"):
        options = {"ghost_size": 4} if norm == "ghost_batch" else {}
        slot = Slot(norm, options, order=order, dropout=0.1, last_norm_options={"eps": 1e-3})
        model = model_of(residual, slot, in_shape=(2, 12))
        loss = model(torch.randn(8, 2, 12)).square().sum()
        loss.backward()
        assert loss.isfinite()


@pytest.mark.parametrize("scalar", [Shift(), Multiplier(0.5)], ids=["shift", "multiplier"])
def test_scalars_keep_the_type_of_what_they_read(scalar: nn.Module) -> None:
    assert scalar(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


ROW = Trial(
    data="digits",
    model="resnet8",
    model_options={"width": 4, "residual": "fixup"},
    norm="none",
    precision="64-true",
    batch_size=8,
    steps=6,
    lr=0.1,
    weight_decay=0.01,
)


def arrays(seed: int = 0) -> Arrays:
    x = torch.randn(40, 1, 8, 8, generator=generator(seed), dtype=torch.float64)
    return Arrays(x, torch.randint(10, (40,), generator=generator(seed)))


def test_the_scalars_of_fixup_learn_at_a_tenth_of_the_rate() -> None:
    module = classifier_of(ROW, arrays()).double()
    module.prepare()
    module.do_steps(0, 6)
    model = NormClassifier(**module_arguments(ROW)).model.double()
    scalars = [p for p in model.parameters() if p.numel() == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.numel() > 1 and p.ndim == 1]
    assert len(scalars) == 3 * 5 + 2
    optimizer = torch.optim.SGD(
        [{"params": scalars, "lr": 0.01}, {"params": weights, "weight_decay": 0.01}, {"params": rest}],
        lr=0.1,
        momentum=0.9,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (1 + math.cos(math.pi * s / 6)) / 2)
    for index in step_indices(40, 8, 0, 6, *ROW.training_seed):
        optimizer.zero_grad()
        F.cross_entropy(model(arrays().x[index]), arrays().y[index]).backward()
        optimizer.step()
        schedule.step()
    for (name, ours), theirs in zip(module.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)
    assert any(p.abs().item() not in (0, 1) for p in scalars)


def test_a_share_of_the_learning_rate_is_that_of_the_innermost_module_that_has_one() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(4, 3), inner)
    inner.lr_scale, inner[1].lr_scale = 0.5, 0.0
    module = NormClassifier(copy.deepcopy(model), in_shape=(4,), num_classes=3, lr=2.0, weight_decay=0.1)
    shares = {id(p): group.lr_scale for group in module.parameter_groups() for p in group.parameters}
    assert [shares[id(p)] for p in module.model.parameters()] == [1, 1, 0.5, 0.5, 0, 0]
    assert {(group.decay, group.lr_scale) for group in module.parameter_groups()} == {
        (decay, share) for decay in (0.1, 0.0) for share in (1.0, 0.5, 0.0)
    }


def test_one_share_leaves_the_groups_as_they_are() -> None:
    module = NormClassifier("resnet8", in_shape=(1, 8, 8), num_classes=3, weight_decay=0.1)
    groups = [(group.parameters, group.decay) for group in module.parameter_groups()]
    assert [([id(p) for p in parameters], decay) for parameters, decay in groups] == [
        ([id(p) for p in parameters], decay) for parameters, decay in module.decay_groups()
    ]
    assert {group.lr_scale for group in module.parameter_groups()} == {1.0}


@pytest.mark.parametrize("residual", OPTIONS)
def test_a_row_of_a_fleet_is_what_its_separate_training_is(residual: str) -> None:
    base = ROW.replace(model_options={"width": 4, "residual": residual}, norm="group")
    rows = [base.replace(seed=seed, lr=0.02 * (1 + seed)) for seed in range(3)]
    assert can_fleet(rows[0])
    together, alone = ([classifier_of(row, arrays(row.seed)).double() for row in rows] for _ in range(2))
    for member in [*together, *alone]:
        member.prepare()
    losses = torch.stack(FleetClassifier(together).do_steps(0, 4), dim=1)
    for member, lonely, own in zip(together, alone, losses, strict=True):
        torch.testing.assert_close(own, torch.stack(lonely.do_steps(0, 4)), rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(member.model.parameters(), lonely.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
