"""Cross-example gradients: exactly where a norm is batch-dependent, and of the size that the formula has."""

import math

import pytest
import torch
from torch import nn

from bnbench.norms import NORMS, TakesReference, build_norm
from bnbench.probes.cross_example import CrossExample, measure_cross_example
from bnbench.registry import BadInput

LABELS = torch.arange(8) % 3


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(name, dim, options):
    torch.manual_seed(0)
    linear = nn.Conv2d(2, 8, 3) if dim else nn.Linear(2, 8)
    layer = build_norm(name, 8, dim, **options)
    head = nn.Linear(8 * 9 if dim else 8, 3)
    model = nn.Sequential(linear, layer, nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Flatten(), head)
    if isinstance(layer, TakesReference):
        layer.set_reference(linear(numbers(8, 2, *(5, 5)[:dim], seed=5).float()))
    return model.double()


EVERY_NORM = [
    pytest.param(name, dim, options, id=f"{name}-{dim}-{number}")
    for name, entry in NORMS.items()
    for dim in (0, 2)
    # Of a backward pass with a memory, gradients tell of more than the forward pass.
    if dim >= entry.min_dim and (entry.exact_gradient or entry.batch_dependent)
    for number, options in enumerate(entry.examples)
]


@pytest.mark.parametrize(("name", "dim", "options"), EVERY_NORM)
def test_examples_depend_on_each_other_exactly_where_the_norm_says_so(name, dim, options):
    x = numbers(8, 2, *(5, 5)[:dim])
    values = measure_cross_example(network(name, dim, options), x, LABELS).values
    if NORMS[name].batch_dependent:
        assert values["dependent"] > 1e-6
        assert values["ratio"] > 1e-6
    else:
        assert values == {"ratio": 0, "dependent": 0}


def test_the_gradient_is_the_jacobian_of_batch_normalization():
    x, eps = numbers(6, 4) * 2 + 1, 1e-5
    model = nn.BatchNorm1d(4, affine=False, eps=eps).double().eval()
    centred = x - x.mean(0)
    scale = (centred.square().mean(0) + eps).sqrt()
    # ∂y_i/∂x_j = (δ_ij − 1/N) / s − (x_i − μ)(x_j − μ) / (N s³), for each unit by itself.
    within = (torch.eye(6) - 1 / 6)[..., None] / scale
    jacobian = within - centred[:, None] * centred[None, :] / (6 * scale**3)
    others = jacobian.clone()
    others[range(6), range(6)] = 0
    ratios = others.flatten(1).norm(dim=1) / jacobian[range(6), range(6)].norm(dim=1)
    values = measure_cross_example(
        model, x, LABELS[:6], examples=5, loss=lambda output, y: output.sum()
    ).values
    assert values["ratio"] == pytest.approx(ratios[:5].mean().item())
    assert values["dependent"] == pytest.approx(others[:5].abs().max().item())


def test_a_batch_smaller_than_the_examples_is_taken_whole():
    model, x = network("batch", 0, {}), numbers(8, 2)[:3]
    readings = [measure_cross_example(model, x, LABELS[:3], examples=examples) for examples in (3, 10)]
    assert readings[0] == readings[1]


def test_a_network_that_does_not_look_at_its_input_has_no_ratio():
    model = nn.Linear(2, 3).double()
    nn.init.zeros_(model.weight)
    values = measure_cross_example(model, numbers(8, 2), LABELS).values
    assert math.isnan(values["ratio"])
    assert values["dependent"] == 0


@pytest.mark.parametrize("x", [torch.ones(1, 2), torch.ones(4, 2, dtype=torch.int64)])
def test_inputs_without_gradients_between_them_are_refused(x):
    with pytest.raises(BadInput, match=r"needs two or more samples of floating-point numbers, not . of"):
        measure_cross_example(nn.Linear(2, 3), x, LABELS[: len(x)])


def test_no_examples_are_refused():
    with pytest.raises(BadInput, match="probe 'cross_example': examples must be 1 or more, not 0"):
        CrossExample(examples=0)
    with pytest.raises(BadInput, match="probe 'cross_example': examples must be 1 or more, not 0"):
        measure_cross_example(nn.Linear(2, 3), torch.ones(4, 2), LABELS[:4], examples=0)
