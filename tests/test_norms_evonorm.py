"""The EvoNorms against their formulas, written a channel of a sample at a time."""

import copy

import pytest
import torch
from torch import nn

from bnbench.models import Slot
from bnbench.norms import build_norm, normalization_batch_size, recalibrate
from bnbench.registry import BadInput

SHAPES = {1: (5,), 2: (4, 3), 3: (3, 2, 2)}
BATCHED, BY_SAMPLE = ("evonorm_b0", "evonorm_b1", "evonorm_b2"), ("evonorm_s0", "evonorm_s1")
each_dim = pytest.mark.parametrize("dim", SHAPES)
each_name = pytest.mark.parametrize("name", BATCHED + BY_SAMPLE)
each_batched = pytest.mark.parametrize("name", BATCHED)


def batch_of(dim, samples=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 8, *SHAPES[dim], generator=generator, dtype=torch.float64) * 3 + 1


def evonorm(name, dim, **options):
    """A layer whose parameters differ from channel to channel."""
    layer = build_norm(name, 8, dim, **options).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(8, generator=generator))
    return layer


def by_formula(name, layer, x, variances):
    """Each channel of each sample by itself; variances are those that stand for the batch."""
    v = getattr(layer, "v", torch.ones(8))
    size = 8 // getattr(layer, "num_groups", 8)
    outputs = []
    for sample in x:
        for c, values in enumerate(sample):
            group = sample[c // size * size : (c // size + 1) * size]
            own_std = (values.var(correction=0) + layer.eps) ** 0.5
            group_std = (group.var(correction=0) + layer.eps) ** 0.5
            rms = ((values**2).mean() + layer.eps) ** 0.5
            floor = ((variances[c] + layer.eps) ** 0.5).expand_as(values)
            quotient = {
                "evonorm_b0": lambda x, c=c, f=floor, s=own_std: x / torch.max(f, v[c] * x + s),
                "evonorm_b1": lambda x, f=floor, r=rms: x / torch.max(f, (x + 1) * r),
                "evonorm_b2": lambda x, f=floor, r=rms: x / torch.max(f, r - x),
                "evonorm_s0": lambda x, c=c, s=group_std: x / (1 + torch.exp(-v[c] * x)) / s,
                "evonorm_s1": lambda x, s=group_std: x / (1 + torch.exp(-x)) / s,
            }[name]
            outputs.append(layer.weight[c] * quotient(values) + layer.bias[c])
    return torch.stack(outputs).view_as(x)


def variances_of(x, correction=0):
    return x.movedim(1, 0).flatten(1).var(1, correction=correction)


def gradients(y, x, layer):
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])


@each_name
@each_dim
def test_training_is_the_formula_and_so_are_its_gradients(name, dim):
    layer, x = evonorm(name, dim), batch_of(dim).requires_grad_()
    y, wanted = layer(x), by_formula(name, layer, x, variances_of(x))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradients(y, x, layer), gradients(wanted, x, layer))


@each_name
@each_dim
def test_evaluation_is_the_formula_with_the_running_variance(name, dim):
    layer, x = evonorm(name, dim).eval(), batch_of(dim).requires_grad_()
    if name in BATCHED:
        layer.running_var.copy_(torch.linspace(0.5, 20, 8))
    y = layer(x)
    wanted = by_formula(name, layer, x, torch.linspace(0.5, 20, 8, dtype=torch.float64))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradients(y, x, layer), gradients(wanted, x, layer))


@each_batched
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_the_running_variance_averages_unbiased_variances(name, momentum):
    layer, torchs = evonorm(name, 2, momentum=momentum), nn.BatchNorm2d(8, momentum=momentum).double()
    for seed in range(3):
        layer(batch_of(2, seed=seed))
        torchs(batch_of(2, seed=seed))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(torchs.named_buffers()))


@each_batched
def test_recalibration_gives_the_variance_of_the_population(name):
    layer, batches = evonorm(name, 1), [batch_of(1, samples, seed=samples) for samples in (2, 5)]
    recalibrate(nn.Sequential(layer), batches)
    torch.testing.assert_close(layer.running_var, variances_of(torch.cat(batches)))


@each_batched
@each_dim
def test_a_batch_of_one_sample_has_its_own_variance(name, dim):
    layer, x = evonorm(name, dim), batch_of(dim, 1)
    torch.testing.assert_close(layer(x), by_formula(name, layer, x, variances_of(x)))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * variances_of(x, correction=1))


@each_batched
def test_one_value_a_channel_is_refused_in_training_and_moves_nothing(name):
    layer, x = evonorm(name, 2), batch_of(2)[:1, :, :1, :1]
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"more than one value a channel, and the input is \(1, 8, 1, 1\)"):
        layer(x)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert layer.eval()(x).isfinite().all()


def test_b0_follows_a_rectifier_of_the_deviations():
    """Far above the deviation it is 1 / v, far below it the linear map by the batch's deviation."""
    layer = build_norm("evonorm_b0", 1, 1, eps=1e-12).double()
    x = torch.tensor([[[1e6, 1e6 - 1e-3]], [[-1e6, -1e6 - 1e-3]]], dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y[0], torch.ones(1, 2, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(y[1], -torch.ones(1, 2, dtype=torch.float64), rtol=1e-5, atol=0)


@each_dim
def test_s1_is_s0_with_v_fixed_at_one(dim):
    fixed, fresh, x = build_norm("evonorm_s1", 8, dim), build_norm("evonorm_s0", 8, dim), batch_of(dim)
    torch.testing.assert_close(fixed.double()(x), fresh.double()(x))
    assert len(list(fixed.parameters())) == 2


def test_s0_without_its_gate_is_half_of_group_norm_of_centred_inputs():
    layer, x = build_norm("evonorm_s0", 8, 2, num_groups=4).double(), batch_of(2)
    grouped = x.view(6, 4, -1)
    x = (grouped - grouped.mean(2, keepdim=True)).view_as(x)
    with torch.no_grad():
        layer.v.zero_()
    torch.testing.assert_close(layer(x), nn.GroupNorm(4, 8).double()(x) / 2)


@pytest.mark.parametrize(("num_features", "num_groups"), [(1, 1), (8, 2), (16, 4), (18, 2), (128, 32)])
def test_groups_are_those_of_group_norm(num_features, num_groups):
    for name in (*BY_SAMPLE, "group"):
        assert build_norm(name, num_features).num_groups == num_groups


@each_name
def test_no_activation_follows(name):
    slot = Slot(norm=name)
    assert isinstance(slot.build_activation(), nn.Identity)
    assert not any(isinstance(part, nn.ReLU) for part in slot.build_pair(8, 2).modules())


@each_name
def test_affine_false_leaves_only_v(name):
    layer = build_norm(name, 8, affine=False)
    assert [key for key, _ in layer.named_parameters()] == (["v"] if name.endswith("0") else [])
    x = batch_of(2)
    torch.testing.assert_close(layer.double()(x), build_norm(name, 8).double()(x))


def test_what_cannot_be_is_one_clear_line():
    for name in BATCHED + BY_SAMPLE:
        with pytest.raises(BadInput, match=f"norm '{name}': it needs spatial axes, and dim=0 has none"):
            build_norm(name, 8, 0)
    for name in BY_SAMPLE:
        with pytest.raises(BadInput, match="num_groups=3 does not divide 8 channels; what would do: 1, 2, 4"):
            build_norm(name, 8, num_groups=3)
        assert normalization_batch_size(name, 1) is None
    for name in BATCHED:
        with pytest.raises(BadInput, match="cannot train on a batch of 1"):
            normalization_batch_size(name, 1)
