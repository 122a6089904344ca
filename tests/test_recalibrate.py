"""Precise statistics against closed forms, and what they leave alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnbench.norms import build_norm, norm_names, precise_statistics, recalibrate
from bnbench.registry import BadInput


def batches_of(sizes, shape=(4,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, *shape, generator=generator, dtype=torch.float64) * (1 + index) + index
        for index, size in enumerate(sizes)
    ]


def network(first="batch", second="batch", **options):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 6),
            build_norm(first, 6, 0, **options),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(6, 5),
            build_norm(second, 5, 0, **options),
        )
    return model.double()


def state(model):
    return copy.deepcopy(model.state_dict())


@settings(max_examples=30)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(0, 1000))
def test_statistics_are_those_of_the_joined_population(sizes, seed):
    layer, batches = build_norm("batch", 4, 0).double(), batches_of(sizes, seed=seed)
    recalibrate(layer, batches)
    population = torch.cat(batches)
    torch.testing.assert_close(layer.running_mean, population.mean(0))
    torch.testing.assert_close(layer.running_var, population.var(0, correction=0))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["batch", "ghost_batch", "sync_batch", "torch"])
def test_every_rank_and_norm_gets_population_statistics(name, dim):
    shape = (4, 5, 3, 2)[: dim + 1]
    torchs = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim]
    options = {"ghost_size": 2} if name == "ghost_batch" else {}
    layer = torchs(4) if name == "torch" else build_norm(name, 4, dim, **options)
    batches = batches_of([4, 2, 6], shape)
    recalibrate(layer.double(), batches)
    dims = (0, *range(2, dim + 2))
    torch.testing.assert_close(layer.running_mean, torch.cat(batches).mean(dims))
    torch.testing.assert_close(layer.running_var, torch.cat(batches).var(dims, correction=0))


def test_deeper_layers_see_inputs_that_earlier_ones_normalized_by_the_batch():
    model, batches = network(), batches_of([8, 3])
    model.eval()
    hidden = []
    for x in batches:
        z = model[0](x)
        z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
        hidden.append(model[4](z.relu()))
    recalibrate(model, batches)
    torch.testing.assert_close(model[5].running_mean, torch.cat(hidden).mean(0))
    torch.testing.assert_close(model[5].running_var, torch.cat(hidden).var(0, correction=0))


def test_ghosts_normalize_by_chunk_while_deeper_statistics_are_gathered():
    model, (x,) = network("ghost_batch", "ghost_batch", ghost_size=2), batches_of([4])
    hidden = []
    for chunk in x.split(2):
        z = model[0](chunk)
        hidden.append(model[4](((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()).relu()))
    recalibrate(model, [x])
    torch.testing.assert_close(model[5].running_var, torch.cat(hidden).var(0, correction=0))


def test_a_large_mean_does_not_cancel():
    layer = build_norm("batch", 4, 0)
    batches = [batch.float() + 1e4 for batch in batches_of([50, 50])]
    recalibrate(layer, batches)
    exact = torch.cat(batches).double().var(0, correction=0)
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=1e-6, atol=0)


def test_nothing_else_changes():
    model = network()
    model.register_buffer("other", torch.tensor(3.0))
    model(batches_of([6])[0]).sum().backward()
    model[3].eval()
    before, gradients = state(model), [parameter.grad.clone() for parameter in model.parameters()]
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    loader = torch.utils.data.DataLoader(batches_of([32])[0], batch_size=8, shuffle=True)
    recalibrate(model, loader)
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"}
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_dropout_is_off():
    first, second = network(), network()
    second[3].p = 0.0
    for model in (first, second):
        recalibrate(model, batches_of([16]))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_pairs_are_batches_too():
    first, second, batches = network(), network(), batches_of([4, 5])
    recalibrate(first, batches)
    recalibrate(second, [(batch, torch.zeros(len(batch))) for batch in batches])
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_a_model_without_running_statistics_is_not_run():
    class Refuses(nn.Linear):
        def forward(self, x):
            raise AssertionError("it ran")

    for name in norm_names(running_stats=False):
        recalibrate(nn.Sequential(Refuses(4, 4), build_norm(name, 4, 1)), batches_of([4]))
    recalibrate(nn.Sequential(Refuses(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), batches_of([4]))


def test_no_batch_is_refused():
    model = network()
    before = state(model)
    with pytest.raises(BadInput, match="at least one batch"):
        recalibrate(model, [])
    with pytest.raises(BadInput, match="a batch must be a tensor"):
        recalibrate(model, ["batch"])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_batch_that_ghosts_do_not_divide_raises_and_leaves_the_model_as_it_was():
    model = network("ghost_batch", "ghost_batch", ghost_size=4)
    before = state(model)
    with pytest.raises(ValueError, match="ghost_size=4 does not divide the batch of 6"):
        recalibrate(model, batches_of([4, 6]))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_precise_statistics_end_with_the_block():
    model, batches = network(), batches_of([16, 16])
    model(batches[0])
    before, twin = state(model), copy.deepcopy(model)
    recalibrate(twin, batches)
    with precise_statistics(model, batches) as inside:
        assert inside is model
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="stop"), precise_statistics(model, batches):
        raise RuntimeError("stop")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("first", ["power", "batch_renorm", "moving_average_batch"])
def test_a_norm_that_trains_by_its_averages_hands_on_what_its_own_precise_statistics_give(first):
    options = {"moving_average_batch": {"warmup": 0}}.get(first, {})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(build_norm(first, 4, 0, **options), nn.Linear(4, 5), build_norm("batch", 5, 0))
    model = model.double()
    # Of one batch, the population is the batch.
    (batch,) = batches_of([40])
    recalibrate(model, [batch + 3])
    hidden = model.eval()[:2](batch + 3)
    torch.testing.assert_close(model[2].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[2].running_var, hidden.var(0, correction=0), rtol=1e-4, atol=1e-4)
