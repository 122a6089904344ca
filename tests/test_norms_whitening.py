"""Whitening norms: the covariance of their output, their averages, their gradients where these are hard."""

import copy
import itertools

import numpy as np
import pytest
import torch

from bnbench.norms import build_norm, recalibrate
from bnbench.registry import BadInput

SHAPES = {0: (), 1: (7,), 2: (4, 3), 3: (3, 2, 2)}
NAMES = ("decorrelated_batch", "iterative_whitening")
CHANNELS = 6


def batch_of(dim, seed=0, samples=40):
    """Channels that are mixed by a fixed matrix, so that they correlate."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(samples, *SHAPES[dim], CHANNELS, generator=generator, dtype=torch.float64)
    return (x @ mixing + torch.linspace(-2, 2, CHANNELS)).movedim(-1, 1).contiguous()


def as_rows(tensor):
    return np.moveaxis(np.asarray(tensor.detach()), 1, -1).reshape(-1, tensor.shape[1])


def covariance_of(tensor):
    return np.cov(as_rows(tensor), rowvar=False, bias=True)


def inverse_root(matrix):
    """By another road than the layers': the square root by Denman and Beavers' iteration."""
    root, other = matrix, np.eye(len(matrix))
    for _ in range(60):
        root, other = (root + np.linalg.inv(other)) / 2, (other + np.linalg.inv(root)) / 2
    return other


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
def test_the_decorrelated_output_has_the_identity_for_a_covariance(dim, group_size):
    layer = build_norm("decorrelated_batch", CHANNELS, dim, group_size=group_size, eps=1e-9).double()
    y = layer(batch_of(dim))
    np.testing.assert_allclose(as_rows(y).mean(0), 0, atol=1e-10)
    covariance = covariance_of(y)
    for start in range(0, CHANNELS, group_size):
        block = covariance[start : start + group_size, start : start + group_size]
        np.testing.assert_allclose(block, np.eye(group_size), atol=1e-6)
    if group_size < CHANNELS:
        assert np.abs(covariance - np.eye(CHANNELS)).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", SHAPES)
def test_it_turns_the_channels_as_little_as_it_can(name, dim):
    options = {"iterations": 40} if name == "iterative_whitening" else {}
    layer = build_norm(name, CHANNELS, dim, eps=1e-3, **options).double()
    x = batch_of(dim)
    rows = as_rows(x)
    root = inverse_root(covariance_of(x) + 1e-3 * np.eye(CHANNELS))
    np.testing.assert_allclose(as_rows(layer(x)), (rows - rows.mean(0)) @ root, rtol=1e-7, atol=1e-7)


def test_more_iterations_whiten_more():
    x = batch_of(2)
    errors = []
    for iterations in (1, 3, 5, 7, 9, 12):
        layer = build_norm("iterative_whitening", CHANNELS, 2, iterations=iterations, eps=1e-9).double()
        errors.append(np.abs(covariance_of(layer(x)) - np.eye(CHANNELS)).max())
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[0] > 0.5
    assert errors[-1] < 1e-3


def test_three_iterations_are_those_of_the_paper():
    layer = build_norm("iterative_whitening", CHANNELS, 1, iterations=3, eps=0.01, momentum=1.0).double()
    x = batch_of(1)
    layer(x)
    covariance = covariance_of(x) + 0.01 * np.eye(CHANNELS)
    root = np.eye(CHANNELS)
    for _ in range(3):
        root = (3 * root - root @ root @ root @ covariance / np.trace(covariance)) / 2
    np.testing.assert_allclose(
        layer.running_whitening[0].numpy(), root / np.sqrt(np.trace(covariance)), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [0, 2])
def test_evaluation_uses_the_averages_of_mean_and_matrix(name, dim):
    layer = build_norm(name, CHANNELS, dim, group_size=3, momentum=0.3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        layer.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    mean, matrices = np.zeros(CHANNELS), np.stack([np.eye(3)] * 2)
    for seed in range(3):
        x = batch_of(dim, seed)
        # With momentum 1 a layer's averages are those of the batch.
        other = build_norm(name, CHANNELS, dim, group_size=3, momentum=1.0).double()
        other(x)
        layer(x)
        mean = 0.7 * mean + 0.3 * as_rows(x).mean(0)
        matrices = 0.7 * matrices + 0.3 * other.running_whitening.numpy()
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_whitening.numpy(), matrices, rtol=1e-12, atol=1e-14)
    before, x = copy.deepcopy(layer.state_dict()), batch_of(dim, 9)
    groups = np.split(as_rows(x) - mean, 2, axis=1)
    whitened = np.concatenate([rows @ matrix for rows, matrix in zip(groups, matrices, strict=True)], 1)
    wanted = whitened * np.linspace(0.5, 2, CHANNELS) + np.linspace(-1, 1, CHANNELS)
    np.testing.assert_allclose(as_rows(layer.eval()(x)), wanted, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [0, 1])
def test_recalibration_sets_the_matrix_of_the_whole_population(name, dim):
    layer = build_norm(name, CHANNELS, dim, group_size=3)
    model = torch.nn.Sequential(layer).double()
    parts = [batch_of(dim, 0, samples=30), batch_of(dim, 1, samples=10)]
    layer(batch_of(dim, 5))
    recalibrate(model, parts)
    whole = torch.cat(parts)
    once = build_norm(name, CHANNELS, dim, group_size=3, momentum=1.0).double()
    once(whole)
    torch.testing.assert_close(layer.running_mean, once.running_mean)
    torch.testing.assert_close(layer.running_whitening, once.running_whitening)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradients_are_the_numeric_ones(name, dim):
    layer = build_norm(name, CHANNELS, dim, group_size=3).double()
    x = batch_of(dim, samples=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(layer)(x), [x], fast_mode=True)


@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 6)])
def test_gradients_are_right_where_all_eigenvalues_are_equal(shape):
    """The derivative of an eigendecomposition does not exist there; that of the whitening does."""
    directions = torch.cat([torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64)])
    x = directions if len(shape) == 2 else directions[:, :, None].repeat(1, 1, 6)
    layer = build_norm("decorrelated_batch", 4, len(shape) - 2, momentum=1.0).double()
    layer(x)
    assert np.ptp(np.linalg.eigvalsh(layer.running_whitening[0].numpy())) < 1e-12
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(layer)(x), [x.clone().requires_grad_()])


@pytest.mark.parametrize("name", NAMES)
def test_a_large_mean_costs_no_precision_though_the_matrix_enlarges(name):
    x = (batch_of(2) + 1e4).float()
    y = build_norm(name, CHANNELS, 2)(x)
    wanted = build_norm(name, CHANNELS, 2).double()(x.double())
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_to_multiply_give_the_same(name):
    """Many positions are multiplied sample by sample, few in one product; the numbers are the same."""
    many = batch_of(2, samples=10)
    few = many.movedim(1, -1).reshape(-1, CHANNELS)
    outputs = [build_norm(name, CHANNELS, dim).double()(x) for dim, x in ((2, many), (0, few))]
    np.testing.assert_allclose(as_rows(outputs[0]), as_rows(outputs[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("channels", "sizes"), [(6, (6, 6)), (64, (16, 64)), (96, (16, 48)), (7, (7, 7))])
def test_groups_are_the_largest_divisor_up_to_the_papers_size(channels, sizes):
    assert tuple(build_norm(name, channels).group_size for name in NAMES) == sizes


@pytest.mark.parametrize("name", NAMES)
def test_wrong_options_and_one_value_are_refused(name):
    with pytest.raises(BadInput, match="group_size=4 does not divide 6 channels; what would do: 1, 2, 3, 6"):
        build_norm(name, CHANNELS, group_size=4)
    with pytest.raises(BadInput, match="group_size=0 does not divide"):
        build_norm(name, CHANNELS, group_size=0)
    with pytest.raises(BadInput, match=r"momentum must be a number from 0 to 1, not 2\.0"):
        build_norm(name, CHANNELS, momentum=2.0)
    with pytest.raises(ValueError, match="more than one value a channel"):
        build_norm(name, CHANNELS, 0)(torch.ones(1, CHANNELS))


def test_iterations_below_one_are_refused():
    with pytest.raises(BadInput, match="iterations must be a number of steps of at least 1, not 0"):
        build_norm("iterative_whitening", CHANNELS, iterations=0)
