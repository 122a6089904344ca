"""Norms against torch's own modules, and properties that hold for any input."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from bnbench.norms import build_norm, ghost_batch, norm_names, normalization_batch_size
from bnbench.registry import BadInput

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
TORCH_BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TORCH_INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def batch_of(dim, samples=8, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, channels, *SHAPES[dim], generator=generator, dtype=torch.float64) * 3 + 1


def with_random_affine(layer):
    """Affine parameters away from 1 and 0, so that their use is seen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.double()


def assert_equal_training(ours, torchs, x, tolerance=1e-12):
    """Outputs, gradients of input and parameters, in training then evaluation, and buffers are equal."""
    close = {"rtol": tolerance, "atol": tolerance}
    for training in (True, True, False):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for layer, leaf in zip((ours, torchs), leaves, strict=True):
            layer.train(training).zero_grad()
            y = layer(leaf)
            (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        torch.testing.assert_close(ours(x), torchs(x), **close)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **close)
        for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.flatten(), theirs.grad.flatten(), **close)
    for name, buffer in torchs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, **close)


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["batch", "sync_batch"])
def test_batch_norm_is_that_of_torch(name, dim, momentum, affine):
    ours = with_random_affine(build_norm(name, 8, dim, momentum=momentum, affine=affine))
    torchs = with_random_affine(TORCH_BATCH_NORM[dim](8, momentum=momentum, affine=affine))
    assert_equal_training(ours, torchs, batch_of(dim))


def test_batch_norm_in_float32_is_that_of_torch_to_the_last_bit():
    ours, torchs, x = build_norm("batch", 8, 2), nn.BatchNorm2d(8), batch_of(2).float()
    for _ in range(3):
        assert torch.equal(ours(x), torchs(x))
    for name, buffer in torchs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer)


@pytest.mark.parametrize("name", ["batch", "ghost_batch", "sync_batch"])
def test_batch_norm_shares_its_state_dict_with_torch(name):
    torchs = with_random_affine(nn.BatchNorm2d(8))
    torchs(batch_of(2))
    ours = build_norm(name, 8, 2).double()
    ours.load_state_dict(torchs.state_dict())
    back = nn.BatchNorm2d(8).double()
    back.load_state_dict(ours.state_dict())
    x = batch_of(2, seed=1)
    assert torch.equal(ours.eval()(x), torchs.eval()(x))
    assert torch.equal(back.eval()(x), torchs.eval()(x))


def test_running_variance_is_unbiased_and_the_output_is_not():
    layer, x = build_norm("batch", 8, 0, momentum=1.0, eps=1e-12).double(), batch_of(0)
    y = layer(x)
    torch.testing.assert_close(layer.running_var, x.var(0, correction=1))
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("over", ["sample", "channels"])
@pytest.mark.parametrize("last", [False, True])
def test_layer_norm_is_that_of_torch(dim, over, last):
    ours = with_random_affine(build_norm("layer", 8, dim, over=over))
    torchs = with_random_affine(nn.GroupNorm(1, 8) if over == "sample" else ChannelsLast(nn.LayerNorm(8)))
    x = batch_of(dim)
    if last and dim == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_equal_training(ours, torchs, x)


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("last", [False, True])
def test_rms_norm_is_that_of_torch(dim, last):
    ours = with_random_affine(build_norm("rms", 8, dim))
    torchs = with_random_affine(ChannelsLast(nn.RMSNorm(8, eps=1e-6)))
    x = batch_of(dim)
    if last and dim == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_equal_training(ours, torchs, x)


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_group_norm_is_that_of_torch(dim, num_groups):
    ours = with_random_affine(build_norm("group", 8, dim, num_groups=num_groups))
    assert_equal_training(ours, with_random_affine(nn.GroupNorm(num_groups, 8)), batch_of(dim))


@pytest.mark.parametrize("dim", TORCH_INSTANCE_NORM)
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_is_that_of_torch(dim, affine):
    ours = with_random_affine(build_norm("instance", 8, dim, affine=affine))
    torchs = with_random_affine(TORCH_INSTANCE_NORM[dim](8, affine=affine))
    assert_equal_training(ours, torchs, batch_of(dim))


class ChannelsLast(nn.Module):
    """A torch norm of the last axis, applied to axis 1."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


class ChunkLoop(nn.Module):
    """Ghost batch norm as a loop: torch's batch norm on each chunk, averages of its statistics."""

    def __init__(self, dim, ghost_size, momentum):
        super().__init__()
        self.norm = TORCH_BATCH_NORM[dim](8, momentum=momentum)
        self.ghost_size = ghost_size

    def forward(self, x):
        if not self.training:
            return self.norm(x)
        outputs, states = [], []
        for chunk in x.split(self.ghost_size):
            states.append(copy.deepcopy(dict(self.norm.named_buffers())))
            outputs.append(functional_call(self.norm, states[-1], chunk))
        for name, buffer in self.norm.named_buffers():
            buffer.copy_(torch.stack([state[name] for state in states]).double().mean(0))
        return torch.cat(outputs)


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("ghost_size", [2, 4, 8])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("looped_values", [0, 10**9])
def test_ghost_batch_norm_is_a_loop_over_chunks(dim, ghost_size, momentum, looped_values, monkeypatch):
    monkeypatch.setattr(ghost_batch, "LOOPED_VALUES", looped_values)
    ours = with_random_affine(build_norm("ghost_batch", 8, dim, ghost_size=ghost_size, momentum=momentum))
    loop = with_random_affine(ChunkLoop(dim, ghost_size, momentum))
    x = batch_of(dim)
    for training in (True, True, False):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer.train(training)(leaf) for layer, leaf in zip((ours, loop), leaves, strict=True)]
        weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
        gradients = [
            torch.autograd.grad((y * weights).sum(), [leaf, *layer.parameters()])
            for y, leaf, layer in zip(outputs, leaves, (ours, loop), strict=True)
        ]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(loop.norm.named_buffers()))


def test_one_step_with_ghosts_counts_as_one_step():
    layer = build_norm("ghost_batch", 8, 0, ghost_size=2).double()
    layer(batch_of(0))
    assert int(layer.num_batches_tracked) == 1


# Options


def test_gamma_may_start_elsewhere_or_be_fixed():
    x = batch_of(2)
    plain = build_norm("batch", 8).double()(x)
    started = build_norm("batch", 8, gamma_init=0.25).double()
    fixed = build_norm("batch", 8, gamma=0.25, learn_gamma=False).double()
    torch.testing.assert_close(started(x), 0.25 * plain)
    torch.testing.assert_close(fixed(x), 0.25 * plain)
    assert [name for name, _ in started.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in fixed.named_parameters()] == ["bias"]
    assert [name for name, _ in build_norm("batch", 8, learn_beta=False).named_parameters()] == ["weight"]
    frozen = build_norm("batch", 8, gamma_init=0.25, learn_gamma=False, learn_beta=False).double()
    assert list(frozen.parameters()) == []
    torch.testing.assert_close(frozen(x), 0.25 * plain)


@pytest.mark.parametrize("name", ["batch", "ghost_batch", "sync_batch", "layer", "group", "instance", "rms"])
def test_affine_false_leaves_no_parameters(name):
    assert list(build_norm(name, 8, affine=False).parameters()) == []


@pytest.mark.parametrize(
    ("num_features", "num_groups"),
    [(1, 1), (2, 1), (3, 1), (4, 1), (8, 2), (12, 1), (16, 4), (18, 2), (64, 16), (128, 32), (512, 32)],
)
def test_default_groups_hold_at_least_four_channels(num_features, num_groups):
    assert build_norm("group", num_features).num_groups == num_groups


@given(st.integers(1, 600))
def test_default_groups_divide_any_number_of_channels(num_features):
    num_groups = build_norm("group", num_features).num_groups
    assert num_features % num_groups == 0
    assert num_groups == 1 or num_features // num_groups >= 4


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bacth", {}, "no norm named 'bacth'; did you mean 'batch'?"),
        ("batch", {"epz": 1e-3}, "norm 'batch' has no option 'epz'; did you mean 'eps'?"),
        ("none", {"eps": 1e-3}, "norm 'none' has no option 'eps'. Known: none"),
        ("batch", {"eps": "small"}, "norm 'batch': eps must be float, not 'small'"),
        ("batch", {"eps": True}, "norm 'batch': eps must be float, not True"),
        ("batch", {"affine": 1}, "norm 'batch': affine must be bool, not 1"),
        ("batch", {"momentum": "cumulative"}, "norm 'batch': momentum must be float | None"),
        ("batch", {"momentum": 1.5}, "norm 'batch': momentum must be a number from 0 to 1"),
        ("batch", {"gamma": 0.5}, "norm 'batch': gamma=0.5 fixes the scale"),
        ("batch", {"gamma": 0.5, "learn_gamma": False, "affine": False}, "leaves no scale to set"),
        ("group", {"num_groups": 3}, "num_groups=3 does not divide 8 channels; what would do: 1, 2, 4, 8"),
        ("group", {"num_groups": 2.0}, "norm 'group': num_groups must be int | None, not 2.0"),
        ("group", {"num_groups": 0}, "num_groups=0 does not divide 8 channels"),
        ("layer", {"over": "chanels"}, "over cannot be 'chanels'; did you mean 'channels'?"),
        ("rms", {"over": 1}, "norm 'rms': over cannot be 1"),
        ("ghost_batch", {"ghost_size": 1}, "norm 'ghost_batch': ghost_size must be at least 2, not 1"),
    ],
)
def test_a_wrong_option_is_one_clear_line(name, options, words):
    with pytest.raises(BadInput) as caught:
        build_norm(name, 8, 2, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", norm_names())
@pytest.mark.parametrize(
    "arguments", [(0, 2), (-1, 2), (2.0, 2), (True, 2), ("8", 2), (8, 4), (8, -1), (8, True), (8, None)]
)
def test_wrong_sizes_are_refused(name, arguments):
    with pytest.raises(BadInput, match=f"norm '{name}': (num_features|dim)"):
        build_norm(name, *arguments)


@pytest.mark.parametrize("name", ["batch", "layer", "group", "instance", "rms", "ghost_batch", "sync_batch"])
@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), float("inf")])
def test_eps_must_be_positive_and_finite(name, eps):
    with pytest.raises(BadInput, match="eps must be a positive number"):
        build_norm(name, 8, 2, eps=eps)


def test_instance_norm_needs_positions():
    with pytest.raises(BadInput, match="dim=0 has none"):
        build_norm("instance", 8, 0)
    with pytest.raises(ValueError, match="one position"):
        build_norm("instance", 8, 2)(torch.randn(4, 8, 1, 1))


def test_norms_are_found_by_trait():
    assert "batch" in norm_names(batch_dependent=True, running_stats=True)
    assert set(norm_names(batch_dependent=False)) >= {"none", "layer", "group", "instance", "rms"}
    assert not set(norm_names(batch_dependent=False)) & set(norm_names(batch_dependent=True))
    with pytest.raises(BadInput, match="did you mean 'batch_dependent'"):
        norm_names(batch_dependant=True)


def test_normalization_batch_size_follows_the_norm():
    assert normalization_batch_size("none", 1) is None
    assert normalization_batch_size("layer", 1) is None
    assert normalization_batch_size("batch", 64) == 64
    assert normalization_batch_size("ghost_batch", 64) == 32
    assert normalization_batch_size("ghost_batch", 64, ghost_size=8) == 8
    with pytest.raises(BadInput, match="needs at least 2"):
        normalization_batch_size("batch", 1)
    with pytest.raises(
        BadInput, match="ghost_size=5 does not divide the batch of 12; what would do: 2, 3, 4, 6, 12"
    ):
        normalization_batch_size("ghost_batch", 12, ghost_size=5)
    with pytest.raises(BadInput, match="did you mean 'ghost_size'"):
        normalization_batch_size("ghost_batch", 12, gost_size=4)
    with pytest.raises(BadInput, match="batch_size must be a whole number"):
        normalization_batch_size("batch", 0)


def test_training_refuses_a_batch_that_ghosts_do_not_divide_and_evaluation_takes_it():
    layer = build_norm("ghost_batch", 8, 0, ghost_size=4)
    with pytest.raises(ValueError, match="does not divide the batch of 6; what would do: 2, 3, 6"):
        layer(torch.randn(6, 8))
    assert layer.eval()(torch.randn(6, 8)).shape == (6, 8)


# Properties

SOME_INPUTS = {
    "samples": st.sampled_from([2, 4, 6]),
    "channels": st.sampled_from([4, 8, 12]),
    "dim": st.integers(1, 3),
    "seed": st.integers(0, 2**32 - 1),
    "scale": st.floats(0.01, 100),
    "shift": st.floats(-100, 100),
}


@settings(max_examples=40)
@given(**SOME_INPUTS, name=st.sampled_from(["batch", "instance", "group", "layer", "ghost_batch"]))
def test_a_change_of_units_changes_nothing(name, samples, channels, dim, seed, scale, shift):
    options = {"ghost_size": 2} if name == "ghost_batch" else {}
    x = batch_of(dim, samples, channels, seed)
    first = build_norm(name, channels, dim, eps=1e-14, **options).double()(x)
    second = build_norm(name, channels, dim, eps=1e-14, **options).double()(scale * x + shift)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@settings(max_examples=40)
@given(**SOME_INPUTS, over=st.sampled_from(["sample", "channels"]))
def test_rms_norm_leaves_a_mean_square_of_one(over, samples, channels, dim, seed, scale, shift):
    y = build_norm("rms", channels, dim, over=over, eps=1e-14).double()(
        scale * batch_of(dim, samples, channels, seed) + shift
    )
    mean_square = y.square().mean(1 if over == "channels" else tuple(range(1, y.ndim)))
    torch.testing.assert_close(mean_square, torch.ones_like(mean_square), rtol=1e-6, atol=1e-6)
