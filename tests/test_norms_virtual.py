"""Virtual batch normalization against its formula in E[x] and E[x²], and the reference batch in a network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnbench.norms import build_norm, normalization_batch_size, recalibrate
from bnbench.norms.reference import (
    layers_with_reference,
    reference_size,
    refresh_reference,
    run_with_reference,
)
from bnbench.registry import BadInput

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
each_dim = pytest.mark.parametrize("dim", SHAPES)
each_weight = pytest.mark.parametrize("own_weight", [None, 0.0, 0.3])


def batch_of(dim, samples=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 8, *SHAPES[dim], generator=generator, dtype=torch.float64) * 3 + 1


def virtual(dim, **options):
    layer = build_norm("virtual_batch", 8, dim, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 8))
        layer.bias.copy_(torch.linspace(-1, 1, 8))
    return layer


def by_formula(x, reference, layer, own_weight):
    """Each sample by itself, from mixtures of E[x] and E[x²]."""
    w = 1 / (len(reference) + 1) if own_weight is None else own_weight
    columns = reference.movedim(1, 0).flatten(1)
    outputs = []
    for sample in x:
        own = sample.reshape(8, -1)
        mean = (1 - w) * columns.mean(1) + w * own.mean(1)
        mean_square = (1 - w) * columns.square().mean(1) + w * own.square().mean(1)
        scale = layer.weight / (mean_square - mean.square() + layer.eps).sqrt()
        outputs.append(((own - mean[:, None]) * scale[:, None] + layer.bias[:, None]).view_as(sample))
    return torch.stack(outputs)


@each_dim
@each_weight
def test_a_sample_is_normalized_by_the_reference_and_by_itself(dim, own_weight):
    layer, reference, x = virtual(dim, own_weight=own_weight), batch_of(dim, 5, seed=1), batch_of(dim)
    layer.set_reference(reference)
    wanted = by_formula(x, reference, layer, own_weight)
    torch.testing.assert_close(layer.train()(x), wanted)
    assert torch.equal(layer.eval()(x), layer.train()(x))


@each_dim
@each_weight
def test_the_reference_itself_is_normalized_by_its_own_statistics_alone(dim, own_weight):
    layer, reference, x = virtual(dim, own_weight=own_weight), batch_of(dim, 5, seed=1), batch_of(dim)
    layer.set_reference(batch_of(dim, 3, seed=2))
    layer.reference_rows = 5
    y = layer(torch.cat([reference, x]))
    alone = F.batch_norm(reference, None, None, layer.weight, layer.bias, True, eps=layer.eps)
    torch.testing.assert_close(y[:5], alone)
    torch.testing.assert_close(y[5:], by_formula(x, reference, layer, own_weight))
    layer.reference_rows = 0
    torch.testing.assert_close(layer.eval()(x), y[5:])  # the reference stays


@each_weight
def test_without_a_reference_the_first_training_batch_is_it(own_weight):
    layer, first, second = virtual(2, own_weight=own_weight), batch_of(2, seed=1), batch_of(2, seed=2)
    layer.eval()(second)
    alone = F.batch_norm(first, None, None, layer.weight, layer.bias, True, eps=layer.eps)
    torch.testing.assert_close(layer.train()(first), alone)
    assert int(layer.reference_samples) == 8
    for _ in range(2):
        torch.testing.assert_close(layer(second), by_formula(second, first, layer, own_weight))


@each_dim
def test_without_its_own_weight_a_sample_depends_on_no_other(dim):
    layer, x = virtual(dim, own_weight=0.0).float(), batch_of(dim).float()
    layer.set_reference(batch_of(dim, seed=1).float())
    others = 5 * batch_of(dim, seed=2).float()
    assert torch.equal(layer(torch.cat([x[:1], others]))[0], layer(x)[0])
    jacobian = torch.autograd.functional.jacobian(lambda given: layer(given)[0].sum(), x)
    assert not jacobian[1:].any()


def test_a_layer_whose_reference_was_loaded_takes_no_other():
    layer, reference, x = virtual(0), batch_of(0, seed=1), batch_of(0)
    layer(reference)
    loaded = nn.Sequential(build_norm("virtual_batch", 8, 0).double())
    loaded.load_state_dict(nn.Sequential(layer).state_dict())
    assert torch.equal(loaded(x), layer(x))
    fresh = build_norm("virtual_batch", 8, 0).double()
    loaded[0].load_state_dict(fresh.state_dict())
    torch.testing.assert_close(loaded(x), F.batch_norm(x, None, None, training=True))


def test_a_reference_in_bfloat16_is_measured_in_float32():
    layer, reference = build_norm("virtual_batch", 8, 2), (batch_of(2, 64) + 8).bfloat16()
    layer.set_reference(reference)
    exact = reference.double()
    torch.testing.assert_close(layer.running_mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        layer.running_var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=0
    )


# In a network


def network(norm="virtual_batch", dropout=0.0, **options):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 6),
            build_norm(norm, 6, 0, **options),
            nn.Dropout(dropout),
            nn.Tanh(),
            nn.Linear(6, 5),
            build_norm(norm, 5, 0, **options),
            nn.Tanh(),
            nn.Linear(5, 3),
        ).double()


def run(model, reference, x):
    return run_with_reference(model, layers_with_reference(model), reference, x)


def gradients_of(logits, model):
    loss = F.cross_entropy(logits, torch.arange(len(logits)) % 3)
    return torch.autograd.grad(loss, list(model.parameters()))


def two_passes(model, reference, x, w):
    """The same network by hand: first the reference alone, whose statistics stay in the graph, then x."""
    hidden, statistics = reference, []
    for linear, norm in ((model[0], model[1]), (model[4], model[5])):
        z = linear(hidden)
        statistics.append((z.mean(0), z.square().mean(0)))
        scale = (statistics[-1][1] - statistics[-1][0] ** 2 + norm.eps).sqrt()
        hidden = torch.tanh(norm.weight * (z - z.mean(0)) / scale + norm.bias)
    hidden = x
    for (linear, norm), (mean, square) in zip(
        ((model[0], model[1]), (model[4], model[5])), statistics, strict=True
    ):
        z = linear(hidden)
        mean, square = (1 - w) * mean + w * z, (1 - w) * square + w * z.square()
        hidden = torch.tanh(norm.weight * (z - mean) / (square - mean**2 + norm.eps).sqrt() + norm.bias)
    return model[7](hidden)


@pytest.mark.parametrize("own_weight", [None, 0.0])
def test_gradients_flow_through_the_reference(own_weight):
    model, reference, x = network(own_weight=own_weight), batch_of(0, 7, seed=1), batch_of(0)
    logits, wanted = (
        run(model, reference, x),
        two_passes(model, reference, x, 1 / 8 if own_weight is None else 0),
    )
    torch.testing.assert_close(logits, wanted)
    ours = gradients_of(logits, model)
    torch.testing.assert_close(ours, gradients_of(wanted, model))
    constant = gradients_of(model(x), model)  # the same statistics, as constants
    torch.testing.assert_close(model(x), logits)
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(ours[:2], constant[:2], strict=True))


def test_a_network_whose_reference_is_the_batch_is_one_with_batch_normalization():
    model, x = network(own_weight=0.0), batch_of(0)
    batch = network("batch")
    logits, wanted = run(model, x, x), batch(x)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(gradients_of(logits, model), gradients_of(wanted, batch))


def test_evaluation_after_a_refresh_is_the_function_of_training():
    model, reference, x = network(), batch_of(0, 7, seed=1), batch_of(0)
    layers = layers_with_reference(model)
    refresh_reference(model, layers, reference)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    stale = model.eval()(x)
    refresh_reference(model.train(), layers, reference)
    torch.testing.assert_close(model.eval()(x), run(model.train(), reference, x))
    assert (model.eval()(x) - stale).abs().max() > 1e-3


def test_a_refresh_draws_nothing_and_puts_modes_back():
    model, reference = network(dropout=0.5), batch_of(0, 7, seed=1)
    model[5].eval()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    refresh_reference(model, layers_with_reference(model), reference)
    first = copy.deepcopy(model.state_dict())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    undropped = network()
    refresh_reference(undropped, layers_with_reference(undropped), reference)
    torch.testing.assert_close(first, undropped.state_dict())
    assert model[1].reference_rows == 0


def test_in_training_dropout_reaches_the_reference_as_it_does_the_batch():
    model, reference = network(dropout=0.5), batch_of(0, 7, seed=1)
    means = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        run(model, reference, batch_of(0))
        means.append(model[5].running_mean.clone())
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


def test_an_error_on_the_way_leaves_no_layer_waiting_for_a_reference():
    model = network()
    with pytest.raises(RuntimeError):
        run(model, batch_of(0, 7)[:, :5], batch_of(0)[:, :5])
    assert [layer.reference_rows for layer in layers_with_reference(model)] == [0, 0]


def test_recalibration_leaves_the_reference_as_it_is():
    model = network()
    refresh_reference(model, layers_with_reference(model), batch_of(0, 7))
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, [batch_of(0, seed=4)])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# What is refused


@pytest.mark.parametrize("weight", [-0.1, 1.0, float("nan")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(BadInput, match="own_weight must be at least 0 and below 1"):
        build_norm("virtual_batch", 8, own_weight=weight)


def test_a_reference_of_one_value_a_channel_is_refused():
    with pytest.raises(BadInput, match="reference_size must be 2 or more"):
        build_norm("virtual_batch", 8, reference_size=1)
    layer = virtual(0)
    for take in (layer.set_reference, layer):
        with pytest.raises(ValueError, match="more than one value a channel"):
            take(batch_of(0, 1))
    virtual(1).set_reference(batch_of(1, 1))  # one sample has five positions


def test_layers_of_one_model_ask_for_one_reference():
    layers = [build_norm("virtual_batch", 8, reference_size=size) for size in (None, 64, 32)]
    assert reference_size(layers[:2], 64) == 64
    with pytest.raises(BadInput, match="reference_size is 32 and 64 in one model"):
        reference_size(layers, 64)


def test_it_uses_no_batch_statistics():
    assert normalization_batch_size("virtual_batch", 1, reference_size=64) is None
